# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""By hand: ``./run pvesim [--dir DIR] [--port 8006] [--qemu] ...``; ends with Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from .node import Settings
from .schema import VARIABLE
from .service import SOCKET, Service, ask

HELP = """
A Proxmox VE node to try things on. It answers what is known of PVE 9.2, and 501 to everything else.

  control: ./run pvesim control DIR OPERATION [name=JSON ...]
  as in:   ./run pvesim control /tmp/node crash vmid=100
"""


def main(words: list[str]) -> int:
    if words[:1] == ["control"]:
        return control(words[1:])
    parser = argparse.ArgumentParser(
        prog="pvesim", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="the node's files (default: a new folder)")
    parser.add_argument("--port", type=int, default=8006, help="of the API; 0 lets the kernel choose (default: 8006)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--node", default="pve1", help="name of the node (default: %(default)s)")
    parser.add_argument("--password", default="secret", help="of root@pam (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=12, help="how many cards (default: %(default)s)")
    parser.add_argument("--qemu", action="store_true", help="VMs are QEMU, not sleeping stand-ins")
    parser.add_argument("--lock-timeout", type=float, default=10.0, help="seconds (default: %(default)g, as PVE's)")
    parser.add_argument("--poll", type=float, default=0.05, help=argparse.SUPPRESS)
    parser.add_argument("--hook-server", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    top = (given.dir or Path(tempfile.mkdtemp(prefix="pvesim-"))).absolute()
    top.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        node=given.node,
        root_password=given.password,
        vm_kind="qemu" if given.qemu else "stand-in",
        lock_timeout=given.lock_timeout,
        poll=given.poll,
        gpus=given.gpus,
        hook_server=given.hook_server,
    )
    service = Service(top, settings, given.host, given.port)
    if sys.stdout.isatty():
        port = service.api.up()
        schema = os.environ.get(VARIABLE) or f"none: set {VARIABLE}"
        print(f"API        https://{given.host}:{port}   root@pam, password {given.password}")
        print(f"authority  {top}/etc/pve/pve-root-ca.pem")
        print(f"commands   PATH={top}/bin:$PATH      (pvesh, qm)")
        print(f"snippets   {top}/var/lib/vz/snippets")
        print(f"schema     {schema}")
    service.run(announce=not sys.stdout.isatty())
    return 0


def control(words: list[str]) -> int:
    if len(words) < 2:
        print("control wants DIR OPERATION [name=JSON ...]", file=sys.stderr)
        return 2
    arguments = {}
    for word in words[2:]:
        name, _, value = word.partition("=")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    try:
        answer = ask(Path(words[0]) / SOCKET, words[1], **arguments)
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(answer, indent=2, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
