# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What `test_level6` runs in a mount namespace of its own: ``python -m service.pve.level6_inside FOLDER``.

There this machine is the simulated node: its /sys, /etc/pve, /run/qemu-server and commands are the simulator's, and the
folders that roles write are empty. The simulator runs inside, too, so that hooks find what the roles install. Prints
one JSON document: a step's name to what Ansible reported and what the node was like afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pvesim.harness import Sim

REPO = Path(__file__).resolve().parents[3]
WRITTEN = ("/opt", "/usr/local/sbin", "/etc/organism", "/var/lib/organism", "/run/organism")
SHOWN = {"sys": "/sys", "etc/pve": "/etc/pve", "run/qemu-server": "/run/qemu-server", "var/lock": "/run/lock"}
VARIABLES: dict[str, Any] = {
    "gpu_pool_vm_gpus": ["0000:01:00", "0000:02:00"],
    "gpu_pool_vm_storage": "fast",
    "gpu_pool_vm_disk_gib": 4,
    "gpu_pool_vm_memory_mib": 1024,
    "gpu_pool_vm_affinity": "1,7",
    "vm_hook_every_vm": True,
    "vm_guard_watchdog": "off",
    "vm_guard_memory": False,
}
STEPS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "foretold": ("level6.yml", {}, ["--check"]),
    "done": ("level6.yml", {}, []),
    "again": ("level6.yml", {}, []),
    "again foretold": ("level6.yml", {}, ["--check"]),
    "back foretold": ("rollback.yml", {"organism_rollback_to": 5}, ["--check"]),
    "back": ("rollback.yml", {"organism_rollback_to": 5}, []),
    "back again": ("rollback.yml", {"organism_rollback_to": 5}, []),
}
ROLLED = "level6"
HANG_S = 1800


def mounted(top: Path) -> None:
    """Only in a private mount namespace."""
    for path in WRITTEN:
        subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    for inside, path in SHOWN.items():
        (top / inside).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", str(top / inside), path], check=True)
    (above_all := top / "above").mkdir()
    grub = above_all / "grub"  # a boot loader, which nothing here changes
    grub.write_text('GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n')
    for folder, name, target in (
        ("/usr/bin", "pvesh", top / "bin/pvesh"),
        ("/usr/sbin", "qm", top / "bin/qm"),
        ("/etc/default", "grub", grub),
    ):
        above = above_all / folder.strip("/")
        for each in (above / "upper", above / "work"):
            each.mkdir(parents=True)
        (above / "upper" / name).symlink_to(target)
        options = f"lowerdir={folder},upperdir={above}/upper,workdir={above}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", folder], check=True)
    marker = Path("/etc/organism/levels/4.json")
    marker.parent.mkdir(parents=True)
    version = next(line for line in (REPO / "galaxy.yml").read_text().splitlines() if line.startswith("version:"))
    record = {"level": 4, "version": version.split()[1], "finished": "2026-11-22T00:00:00Z"}
    marker.write_text(json.dumps(record))


def play(sim: Sim, top: Path, book: str, variables: dict[str, Any], words: list[str]) -> dict[str, Any]:
    said = {**VARIABLES, **variables, "ansible_python_interpreter": sys.executable}
    inventory = top / "inventory.yml"
    host = {"ansible_connection": "local", "ansible_become": False}
    others = {name: {"hosts": {}} for name in ("bus", "gpu_pool", "conductor", "cortex")}
    inventory.write_text(json.dumps({"all": {"children": {"pve": {"hosts": {"pve1": host}}, **others}}}))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ansible", "playbook", "-i", str(inventory), str(REPO / "playbooks" / book)),
            *("--tags", ROLLED, "-e", json.dumps(said), *words),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
        env={
            **sim.environment(),
            "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(top / "collections"),
            "ANSIBLE_HOME": str(top / "ansible"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        },
    )
    if "{\n" not in done.stdout:
        raise RuntimeError(done.stdout + done.stderr)
    report = json.loads(done.stdout[done.stdout.index("{\n") :])
    tasks = [
        (task["task"]["name"], task["hosts"]["pve1"])
        for each in report["plays"]
        for task in each["tasks"]
        if "pve1" in task["hosts"]
    ]
    return {
        "code": done.returncode,
        "changed": [name for name, result in tasks if result.get("changed")],
        "failed": [result.get("msg") for _name, result in tasks if result.get("failed")],
        "node": node(sim),
    }


def node(sim: Sim) -> dict[str, Any]:
    top = sim.top
    return {
        "vms": {path.stem: path.read_text() for path in sorted((top / "etc/pve/qemu-server").glob("*.conf"))},
        "mappings": (top / "etc/pve/mapping/pci.cfg").read_text() if (top / "etc/pve/mapping/pci.cfg").exists() else "",
        "running": sorted(sim.control("machines")),
        "entries": sorted(str(path) for path in Path("/etc/organism/hook.d").rglob("*") if path.is_file()),
        "levels": sorted(path.name for path in Path("/etc/organism/levels").glob("*.json")),
    }


def main(top: Path) -> int:
    link = top / "collections/ansible_collections/organism/proxmox"
    link.parent.mkdir(parents=True)
    link.symlink_to(REPO)
    subprocess.run(["mount", "-t", "tmpfs", "none", "/srv"], check=True)
    node_top = Path("/srv/node")  # roles refuse to leave a file below /tmp
    with Sim(node_top) as sim:
        mounted(node_top)
        sim.qm("create", 150, "--name", "other", "--memory", 512)
        told = {"before": {"node": node(sim)}}
        for name, (book, variables, words) in STEPS.items():
            told[name] = play(sim, top, book, variables, words)
            print(f"{name}: {told[name]['changed']} {told[name]['failed']}", file=sys.stderr, flush=True)
            if told[name]["failed"]:
                break
        print(json.dumps(told))
    return 0


if __name__ == "__main__":
    os.chdir("/")
    sys.exit(main(Path(sys.argv[1])))
