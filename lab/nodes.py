# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One node: a copy of the tree with a name, a key and an address; booted by systemd-nspawn; found again; stopped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from . import cgroups, host, net
from .config import Node, Settings, State
from .errors import LabError

BOOT_LIMIT = 120.0  # seconds; a boot takes 2 to 5, the rest is for a loaded machine
_STOP_LIMIT = 30.0
_NSPAWN_ENVIRONMENT = {
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    # Only net.* of the node's own network namespace is writable; every other sysctl, which is the host's, is read-only.
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
}


@dataclass(frozen=True)
class Running:
    """A container's processes on the host: nspawn itself, and the container's PID 1."""

    supervisor: int
    leader: int | None


def unit_name(where: Settings, node: str) -> str:
    return f"organism-{where.machine(node)}.service"


def make_key(where: Settings) -> None:
    """The key pair with which host and Ansible enter the nodes."""
    if not where.key.exists():
        host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{where.name}-lab", "-f", where.key)
    host.give_to_user(where.key, where.key.with_name(where.key.name + ".pub"))


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def hosts_file(state: State) -> str:
    """/etc/hosts of every node: all names resolve without a name server (facts take 10 s when they do not)."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    lines += [f"{node.address} {node.name}" for node in state.nodes]
    return "\n".join([*lines, f"{state.host_address} controller", ""])


def network_file(state: State, node: Node) -> str:
    return (
        "[Match]\nName=host0\n\n"
        f"[Network]\nAddress={node.address}/{state.prefix}\nLinkLocalAddressing=no\nIPv6AcceptRA=no\nLLDP=no\n"
    )


def make_root(where: Settings, state: State, node: Node) -> bool:
    """Copy the tree for a node unless that was done; its name appears only when it is complete."""
    root = where.root_of(node.name)
    made = not root.exists()
    target = root.with_name(f".{node.name}.new") if made else root
    if made:
        if target.exists():
            shutil.rmtree(target)
        where.nodes.mkdir(parents=True, exist_ok=True)
        where.nodes.chmod(0o700)
        host.run("cp", "-a", "--reflink=auto", where.tree, target, timeout=300)
        _write(target / "etc/hostname", f"{node.name}\n")
        # A machine id of its own: with an empty one systemd would treat this as a first boot and reset all units.
        _write(target / "etc/machine-id", f"{uuid.uuid4().hex}\n", 0o444)
        host_key = target / "etc/ssh/ssh_host_ed25519_key"
        host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", node.name, "-f", host_key)
        keys = target / "root/.ssh"
        keys.mkdir(mode=0o700, exist_ok=True)
        _write(
            keys / "authorized_keys", where.key.with_name(where.key.name + ".pub").read_text(encoding="utf-8"), 0o600
        )
    _write(target / "etc/hosts", hosts_file(state))
    _write(target / "etc/systemd/network/10-host0.network", network_file(state, node))
    if made:
        target.rename(root)
    return made


def write_known_hosts(where: Settings, state: State) -> None:
    """The nodes' host keys are known beforehand, so ssh never has to trust one on first use."""
    lines = []
    for node in state.nodes:
        public = where.root_of(node.name) / "etc/ssh/ssh_host_ed25519_key.pub"
        lines.append(f"{node.name},{node.address} {' '.join(public.read_text(encoding='utf-8').split()[:2])}\n")
    _write(where.known_hosts, "".join(lines))
    host.give_to_user(where.known_hosts)


def running(where: Settings) -> dict[str, Running]:
    """This lab's containers, found by machine name and folder on the command line: pid files can lie, this cannot."""
    prefix = f"--machine={where.name}-"
    found = {}
    for process in host.processes():
        machine = next((word for word in process.argv if word.startswith(prefix)), None)
        if machine is None or Path(process.argv[0]).name != "systemd-nspawn":
            continue
        name = machine.removeprefix(prefix)
        if f"--directory={where.root_of(name)}" in process.argv:
            below = host.children(process.pid)
            found[name] = Running(process.pid, below[0] if below else None)
    return found


def _nspawn(where: Settings, node: Node) -> list[str]:
    return [
        "nsenter", f"--net={where.netns}",
        "systemd-nspawn", f"--directory={where.root_of(node.name)}", f"--machine={where.machine(node.name)}",
        f"--hostname={node.name}", "--boot", "--register=no", "--keep-unit", "--settings=no", "--console=pipe",
        "--capability=all", f"--network-bridge={net.BRIDGE}", "--resolv-conf=off", "--timezone=off",
        "--link-journal=no",
    ]  # fmt: skip


def start(where: Settings, node: Node) -> host.Watch:
    """Boot the container and give a watch on its supervisor. It goes on when this program ends."""
    where.logs.mkdir(parents=True, exist_ok=True)
    log = where.logs / f"{node.name}.log"
    if host.systemd_is_pid_1():
        unit = unit_name(where, node.name)
        host.run(
            "systemd-run", f"--unit={unit}", "--collect", "--quiet", "--service-type=exec", "--property=Delegate=yes",
            "--property=KillMode=mixed", "--property=TasksMax=infinity", f"--property=StandardOutput=append:{log}",
            "--property=StandardError=inherit", f"--description=organism lab node {node.name}",
            *(f"--setenv={key}={value}" for key, value in _NSPAWN_ENVIRONMENT.items()),
            "--", *_nspawn(where, node),
        )  # fmt: skip
        return host.Watch(int(host.run("systemctl", "show", "--property=MainPID", "--value", unit)))
    # The shell enters the node's control groups, then becomes nspawn: $0 is the number of groups.
    enter = (
        'count=$0; while [ "$count" -gt 0 ]; do echo $$ >"$1" || exit 1; shift; count=$((count - 1)); done; exec "$@"'
    )
    groups = [str(file) for file in cgroups.make(where, node.name)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["sh", "-c", enter, str(len(groups)), *groups, *_nspawn(where, node)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, **_NSPAWN_ENVIRONMENT},
        )  # fmt: skip
    return host.Watch(process.pid)


def _log_tail(where: Settings, node: Node) -> str:
    try:
        text = (where.logs / f"{node.name}.log").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(text.splitlines()[-8:])


def wait_ssh(where: Settings, node: Node, watch: host.Watch) -> None:
    """Wait until the node's SSH server greets. Ends early, with the log's last lines, when the container dies."""
    deadline = time.monotonic() + BOOT_LIMIT
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((node.address, 22), timeout=1) as connection:
                if connection.recv(4) == b"SSH-":
                    return
        except OSError as error:
            last = error
        # The pause between two tries is a wait for the container's end, which would be the news that matters.
        if watch.ended(timeout=0.05):
            raise LabError(
                f"node {node.name} ended while booting:\n{_log_tail(where, node)}",
                f"look at {where.logs / (node.name + '.log')}, or remove the lab with `./run clean`",
            )
    raise LabError(
        f"node {node.name} ({node.address}) has no SSH after {BOOT_LIMIT:.0f} s: {last}",
        f"look at {where.logs / (node.name + '.log')}, or remove the lab with `./run clean`",
    )


def stop_all(where: Settings) -> list[str]:
    """Shut all containers down in order (SIGTERM to nspawn makes the container's systemd halt). Gives their names."""
    found = running(where)
    if not found:
        return []
    watches = {name: host.Watch(entry.supervisor) for name, entry in found.items()}
    leaders = [host.Watch(entry.leader) for entry in found.values() if entry.leader is not None]
    try:
        if host.end_all(list(watches.values()), signal.SIGTERM, _STOP_LIMIT):
            # Killing a container's PID 1 ends its whole pid namespace (pid_namespaces(7)); nspawn follows.
            host.end_all(leaders, signal.SIGKILL, _STOP_LIMIT)
            if host.end_all(list(watches.values()), signal.SIGKILL, _STOP_LIMIT):
                raise LabError(
                    f"these containers do not end: {', '.join(found)}", "look at `ps` for a process in state D"
                )
    finally:
        for watch in (*watches.values(), *leaders):
            watch.close()
    cgroups.remove_all(where)
    return sorted(found)
