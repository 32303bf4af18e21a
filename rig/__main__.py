# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig's command: `./run rig` and `python3 -m rig`. Exit codes: 0 done, 1 it failed, 2 usage."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

from . import remote
from .driver import Rig, purge
from .errors import RigError, UsageError
from .hardware import LOADERS, Machine
from .image import FLAVOURS
from .show import say


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run rig",
        description="A virtual machine with a real kernel and the shape of the reference host: 6 cores of 2 threads, "
        "12 emulated AMD GPUs, NVMe, a 4-queue network port, disks for ZFS.",
    )
    parser.add_argument("--name", default="", help="which rig (default: ORGANISM_RIG_NAME, or rig)")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    up = verbs.add_parser("up", help="start it: from the snapshot, or by a boot (this is what no verb means)")
    up.add_argument("--cold", action="store_true", help="boot through the boot loader")
    up.add_argument("--gpus", type=int, default=12, help="0 to 12 (default: %(default)s)")
    up.add_argument("--memory", type=int, default=3072, metavar="MIB", help="memory in MiB (default: %(default)s)")
    up.add_argument(
        "--kernel", choices=FLAVOURS, default=FLAVOURS[0], help="flavour of Debian's kernel (default: %(default)s)"
    )
    up.add_argument(
        "--shared-group", action="store_true", help="with --cold: a 13th GPU in one IOMMU group with a network card"
    )
    up.add_argument("--loader", choices=LOADERS, default="grub", help="with --cold (default: %(default)s)")
    up.add_argument("--append", metavar="TEXT", help="with --cold: start the kernel directly, with this command line")
    ssh = verbs.add_parser("ssh", help="a shell in it, or a command: ssh -- uname -r")
    ssh.add_argument("command", nargs=argparse.REMAINDER)
    status = verbs.add_parser("status", help="what is known of it")
    status.add_argument("--json", action="store_true", help="for machines")
    verbs.add_parser("reboot", help="reboot it from inside and wait until it is back")
    reset = verbs.add_parser("reset", help="press its reset button (nothing is synced)")
    reset.add_argument("--power", action="store_true", help="cut the power instead")
    restart = verbs.add_parser("restart", help="boot it again, with another command line or boot loader")
    restart.add_argument("--append", metavar="TEXT", help="start the kernel directly with this command line")
    restart.add_argument("--loader", choices=LOADERS, default="grub")
    verbs.add_parser("restore", help="back to the snapshot, with fresh disks: a few seconds")
    play = verbs.add_parser("play", help="ansible-playbook on it: play PLAYBOOK [arguments]")
    play.add_argument("words", nargs=argparse.REMAINDER)
    put = verbs.add_parser("put", help="copy a file or folder in: put LOCAL FAR")
    put.add_argument("paths", nargs=2)
    get = verbs.add_parser("get", help="copy a file or folder out: get FAR LOCAL")
    get.add_argument("paths", nargs=2)
    qmp = verbs.add_parser("qmp", help="a command of QEMU's machine protocol: qmp query-status ['{...}']")
    qmp.add_argument("command")
    qmp.add_argument("arguments", nargs="?", default="{}")
    verbs.add_parser("serial", help="its serial console so far")
    down = verbs.add_parser("down", help="end it and remove all of it but the cache")
    down.add_argument("--all", action="store_true", help="every rig of this checkout")
    down.add_argument("--purge", action="store_true", help="remove the cache too: image, snapshot, ZFS modules")
    return parser


def _machine(options: argparse.Namespace) -> Machine:
    return Machine(
        gpus=options.gpus, memory=options.memory, flavour=options.kernel, cold=options.cold,
        shared_group=options.shared_group, loader=options.loader, append=options.append,
    )  # fmt: skip


def _up(options: argparse.Namespace) -> int:
    rig = Rig(options.name, _machine(options))
    known = rig.start()
    say(
        f"rig {rig.where.name} is up (life {known.life}, {known.how}, {known.seconds[-1]:.1f} s to its sshd); "
        "enter it with ./run rig ssh"
    )
    return 0


def _ssh(options: argparse.Namespace) -> int:
    rig = Rig(options.name)
    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    far = words[0] if len(words) == 1 else words  # one word may be a whole command line for the shell
    command = remote.command(rig.where, rig.port, far, terminal=sys.stdin.isatty() and not words)
    sys.stdout.flush()
    os.execvp(command[0], command)  # noqa: S606 - its exit code and terminal are the caller's


def _status(options: argparse.Namespace) -> int:
    rig = Rig(options.name)
    known = rig.status()
    if options.json:
        print(json.dumps({"name": rig.where.name, **(asdict(known) if known else {"phase": "none"})}))
    elif known is None:
        print(f"there is no rig {rig.where.name!r}")
    else:
        print(f"{rig.where.name}: {known.phase}{': ' + known.error if known.error else ''}")
        print(f"  life {known.life} ({known.how}), {known.accelerator}, ssh port {known.port}, files {rig.where.run}")
        for number, (end, seconds) in enumerate(zip([*known.ends, "running"], known.seconds, strict=False), 1):
            took = f"{seconds} s to sshd" if seconds else "never came up"
            print(f"  life {number}: {took}; {end}")
    return 0 if known is not None and known.phase == "up" else 1


def _changed(act: Callable[[Rig], object]) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        rig = Rig(options.name)
        act(rig)
        known = rig.status()
        if known is not None and known.seconds:
            say(
                f"rig {rig.where.name} is up again "
                f"(life {known.life}, {known.how}, {known.seconds[-1]:.1f} s to its sshd)"
            )
        return 0

    return run


def _play(options: argparse.Namespace) -> int:
    from .config import REPO

    rig = Rig(options.name)
    os.environ["ORGANISM_RIG_NAME"] = rig.where.name
    if not options.words:
        raise UsageError("play wants the name of a playbook", "for example: ./run rig play playbooks/site.yml --check")
    command = ["ansible-playbook", "-i", str(REPO / "inventories/rig"), *options.words]
    os.execvp(command[0], command)  # noqa: S606 - its exit code and terminal are the caller's


def _qmp(options: argparse.Namespace) -> int:
    print(json.dumps(Rig(options.name).qmp(options.command, json.loads(options.arguments)), indent=2))
    return 0


def _serial(options: argparse.Namespace) -> int:
    sys.stdout.write(Rig(options.name).serial())
    return 0


def _down(options: argparse.Namespace) -> int:
    rig = Rig(options.name)
    names = sorted(folder.name for folder in rig.where.runs.glob("*")) if options.all else [rig.where.name]
    for name in names:
        Rig(name).down()
        say(f"rig {name} is gone")
    if options.purge:
        purge(rig.where)
    return 0


def _copy(options: argparse.Namespace) -> int:
    rig = Rig(options.name)
    (rig.put if options.verb == "put" else rig.get)(*options.paths)
    return 0


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "up": _up,
    "ssh": _ssh,
    "status": _status,
    "reboot": _changed(lambda rig: rig.reboot()),
    "restore": _changed(lambda rig: rig.restore()),
    "play": _play,
    "put": _copy,
    "get": _copy,
    "qmp": _qmp,
    "serial": _serial,
    "down": _down,
}


def main(words: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(words)
    if options.verb is None:
        options = parser.parse_args([*words, "up"])
    try:
        if options.verb == "reset":
            return _changed(lambda rig: rig.hard_reset(power=options.power))(options)
        if options.verb == "restart":
            return _changed(lambda rig: rig.restart(append=options.append, loader=options.loader))(options)
        return VERBS[options.verb](options)
    except RigError as error:
        say(f"{options.verb} failed: {error}")
        if error.hint:
            say(f"next step: {error.hint}")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
