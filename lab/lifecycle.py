# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""up, down, clean and status of a lab."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from . import cgroups, host, net, nodes, tree
from .config import DEFAULT_GPUS, Node, Settings, State, load_state, plan_nodes, save_state
from .errors import LabError, UsageError
from .show import say, step


@dataclass(frozen=True)
class Wish:
    """What the command line asks for; None keeps what the lab has, or the default (one bus, one pool, four GPUs)."""

    bus: int | None = None
    pool: int | None = None
    gpus: int | None = None
    subnet: str | None = None


def plan(wish: Wish, current: State | None, name: str, subnet: str) -> State:
    """The lab to bring up. A lab grows in place; to shrink one or to move it to another network it must be removed."""
    if current is None:
        gpus = DEFAULT_GPUS if wish.gpus is None else wish.gpus
        state = State(name=name, subnet=subnet, gpus=gpus, nodes=plan_nodes(subnet, wish.bus or 1, wish.pool or 1))
    else:
        have = {kind: sum(1 for node in current.nodes if node.name.startswith(kind)) for kind in ("bus", "pool")}
        wanted = {"bus": wish.bus or have["bus"], "pool": wish.pool or have["pool"]}
        if any(wanted[kind] < have[kind] for kind in have) or (wish.subnet or current.subnet) != current.subnet:
            raise UsageError(
                f"the lab {name} has {have['bus']} bus and {have['pool']} pool nodes on {current.subnet}: "
                "it can grow, not shrink or move",
                "remove it first: ./run clean",
            )
        state = replace(
            current,
            gpus=current.gpus if wish.gpus is None else wish.gpus,
            nodes=plan_nodes(current.subnet, wanted["bus"], wanted["pool"]),
        )
    if not 1 <= state.gpus <= 16:
        raise UsageError(f"--gpus {state.gpus}: a pool node has 1 to 16 simulated GPUs")
    return state


def _complete(where: Settings, state: State) -> bool:
    running = nodes.running(where)
    return {node.name for node in state.nodes} <= set(running) and net.present(where, state)


def up(where: Settings, wish: Wish) -> None:
    """Bring the lab up; on a complete one nothing is done, a half-made one is completed."""
    host.require_tools()
    current = load_state(where)
    if current is None:
        wanted = wish.subnet or os.environ.get("ORGANISM_LAB_SUBNET") or None
        subnet = net.choose_subnet(wanted, net.used_networks(where.name))
    else:
        subnet = current.subnet
    state = plan(wish, current, where.name, subnet)
    if state == current and _complete(where, state):
        _greet(where, [(node, None) for node in state.nodes])
        for node in state.nodes:
            _check_login(where, node)
        say(f"the lab is up already, nothing to do: {', '.join(node.name for node in state.nodes)}")
        return
    tree.build(where)
    where.folder.mkdir(parents=True, exist_ok=True)
    save_state(where, state)
    where.logs.mkdir(parents=True, exist_ok=True)
    host.give_to_user(where.folder, where.logs, where.state_file)
    nodes.make_key(where)
    if not net.present(where, state):
        if stopped := nodes.stop_all(where):
            say(f"the lab's network is incomplete: stopped {', '.join(stopped)} to build it again")
        net.make(where, state)
    names = ", ".join(node.name for node in state.nodes)
    with step(f"preparing {names}", f"{names} prepared"):
        for node in state.nodes:
            nodes.make_root(where, state, node)
        nodes.write_known_hosts(where, state)
    with step(f"booting {names}", f"{names} answer on SSH"):
        running = nodes.running(where)
        begun = [(node, None if node.name in running else nodes.start(where, node)) for node in state.nodes]
        _greet(where, begun)
    for node, watch in begun:
        _check_login(where, node)
        if watch is not None:
            _check_systemd(where, node)


def _greet(where: Settings, begun: list[tuple[Node, host.Watch | None]]) -> None:
    running = nodes.running(where)
    for node, watch in begun:
        watch = watch or host.Watch(running[node.name].supervisor)
        try:
            nodes.wait_ssh(where, node, watch)
        finally:
            watch.close()


def ssh_command(where: Settings, node: Node, *command: str, shared: bool = True) -> list[str]:
    """The ssh command line into a node (as root); ``command`` words are joined by the remote shell as ssh does.

    ``shared``: by the connection that stays open between commands.
    """
    where.control_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    host.give_to_user(where.control_path.parent)
    # The first value of an option wins (ssh_config(5)).
    alone = [] if shared else ["-o", "ControlPath=none"]
    return ["ssh", *alone, *where.ssh_options(), f"root@{node.address}", *command]


def _command(where: Settings, node: Node, command: str) -> subprocess.CompletedProcess[str]:
    # Not shared: this may run under sudo, and root's open connection would be of no use to the user.
    words = ssh_command(where, node, command, shared=False)
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


def _check_login(where: Settings, node: Node) -> None:
    done = _command(where, node, "true")
    if done.returncode:
        raise LabError(
            f"cannot enter node {node.name}: {done.stderr.strip()}", "make the lab anew: ./run clean, ./run lab up"
        )


def _check_systemd(where: Settings, node: Node) -> None:
    """A node whose units failed at boot is told at once, with their names."""
    done = _command(
        where, node, "systemctl is-system-running --wait; systemctl list-units --failed --plain --no-legend"
    )
    state, *failed = done.stdout.split("\n")
    if state != "running":
        units = ", ".join(line.split()[0] for line in failed if line)
        raise LabError(f"node {node.name} is {state}: {units}", f"./run lab ssh {node.name} journalctl -b -p err")


def down(where: Settings) -> None:
    """Stop all containers; trees, keys and network stay for the next `up`."""
    _close_connections(where)
    with step("stopping the nodes", "nodes stopped"):
        stopped = nodes.stop_all(where)
    say(f"stopped: {', '.join(stopped) or 'nothing was running'}")


def _close_connections(where: Settings) -> None:
    """End OpenSSH's shared connections, which outlive the commands that opened them."""
    folder = where.control_path.parent
    for socket in sorted(folder.glob("*")) if folder.is_dir() else []:
        done = subprocess.run(
            ["ssh", "-F", "/dev/null", "-o", f"ControlPath={socket}", "-O", "exit", "lab"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        if done.returncode and socket.exists():
            socket.unlink()  # nobody listens there any more


def clean(where: Settings) -> None:
    """Remove the lab and prove that nothing of it is left. Raises `LabError` with the list of what is."""
    _close_connections(where)
    with step("stopping the nodes", "nodes stopped"):
        nodes.stop_all(where)
    inode = where.netns.stat().st_ino if host.mounts_below(where.netns) else None
    net.remove(where)
    cgroups.remove_all(where)
    doomed = [folder for folder in (where.folder, where.control_path.parent) if folder.exists()]
    for folder in doomed:
        if points := host.mounts_below(folder):
            raise LabError(
                f"still mounted: {', '.join(map(str, points))}", "find who holds it with `fuser -vm`, then clean again"
            )
        if folder == where.cache:
            raise LabError(f"refusing to remove {folder}", "set ORGANISM_CACHE to a folder of its own")
    with step("removing files", f"removed {', '.join(map(str, doomed)) or 'no files: there were none'}"):
        for folder in doomed:
            if folder.exists():
                shutil.rmtree(folder)
    left = leftovers(where, inode)
    if left:
        raise LabError(
            "something of the lab is left:\n  " + "\n  ".join(left), "remove it by hand, then run clean again"
        )
    say("nothing of the lab is left: no container, process, unit, control group, mount, namespace, interface or file")


def leftovers(where: Settings, netns_inode: int | None = None) -> list[str]:
    """Everything of this lab that can still be found on the host, one line each."""
    found = [f"container {name} (process {entry.supervisor})" for name, entry in nodes.running(where).items()]
    found += [f"process {pid} in the lab's network namespace" for pid in net.members(where)]
    own = {os.getpid(), os.getppid()}
    for process in host.processes():
        if process.pid in own:
            continue
        if any(str(where.control_path.parent) in word for word in process.argv):
            found.append(f"process {process.pid}: {' '.join(process.argv)[:100]}")
        if netns_inode is not None and _inode(Path(f"/proc/{process.pid}/ns/net")) == netns_inode:
            found.append(f"process {process.pid} keeps the network namespace {netns_inode}")
        found += [
            f"mount {point} seen by process {process.pid}" for point in _foreign_mounts(process.pid, where.folder)
        ]
    if host.systemd_is_pid_1():
        pattern = f"organism-{where.name}-*"
        listing = host.run("systemctl", "list-units", "--all", "--plain", "--no-legend", pattern)
        found += [f"unit {line.split()[0]}" for line in listing.splitlines() if line.strip()]
    found += [f"control group {group}" for group in cgroups.groups(where)]
    if Path(f"/sys/class/net/{where.name}").exists():
        found.append(f"interface {where.name}")
    found += [f"file {folder}" for folder in (where.folder, where.control_path.parent) if folder.exists()]
    return found


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def _foreign_mounts(pid: int, folder: Path) -> list[str]:
    """Mounts below ``folder`` in the mount namespace of another process."""
    try:
        text = Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError, PermissionError, OSError):
        return []  # it ended, or it is a kernel thread
    points = [line.split()[4] for line in text.splitlines()]
    return [point for point in points if point == str(folder) or point.startswith(f"{folder}/")]


def status(where: Settings) -> list[dict[str, object]]:
    """One record a node: name, groups, address, state (running, stopped) and the pid of its PID 1 on the host."""
    state = load_state(where)
    if state is None:
        return []
    running = nodes.running(where)
    records: list[dict[str, object]] = []
    for node in state.nodes:
        entry = running.get(node.name)
        records.append({
            "name": node.name,
            "groups": list(node.groups),
            "address": node.address,
            "gpus": state.gpus if "gpu_pool" in node.groups else 0,
            "state": "running" if entry else "stopped",
            "pid": entry.leader if entry else None,
        })  # fmt: skip
    return records


def enter(where: Settings, node: Node, command: list[str]) -> int:
    """ssh into a node with this terminal; gives the remote exit code."""
    sys.stdout.flush()
    return subprocess.run(ssh_command(where, node, *command), check=False).returncode
