# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role on this machine's files, in a mount name space where /etc, /run, /usr/local and /var/lib are copies.

A stand-in takes systemctl's place (systemctl.py); the order at boot and at shutdown is for a real systemd to show.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import COLLECTIONS

REPO = Path(__file__).resolve().parents[3]
FOLDERS = ("/etc", "/run", "/usr/local", "/var/lib")


def script(top: Path) -> str:
    """Copies of the folders, a system that looks booted by systemd, and each run's outcome in a file of its own."""
    lines = ["set -eu"]
    for folder in FOLDERS:
        name = folder.strip("/").replace("/", "-")
        copy = f"lowerdir={folder},upperdir={top}/copy/{name},workdir={top}/work/{name}"
        lines += [
            f"mkdir -p {top}/copy/{name} {top}/work/{name}",
            f"mount -t overlay -o {copy} {name} {folder}",
        ]
    stand_in = f"{sys.executable} {Path(__file__).parent}/systemctl.py"
    lines += [
        "mkdir -p /run/systemd/system /usr/local/sbin /etc/systemd/system",
        f"printf '#!/bin/sh\\nexec {stand_in} \"$@\"\\n' >{top}/bin/systemctl",
        f"printf '#!/bin/sh\\nexport PYTHONPATH={REPO}/runtime/src\\nexec {sys.executable} -m organism.host.ramlayer "
        '"$@"\\n\' >/usr/local/sbin/ramlayer',
        f"chmod 755 {top}/bin/systemctl /usr/local/sbin/ramlayer",
        f"export FAKE_SYSTEMD={top}/systemd.json PATH={top}/bin:$PATH ANSIBLE_COLLECTIONS_PATH={COLLECTIONS}",
        f"export ANSIBLE_HOME={top}/ansible ANSIBLE_LOCALHOST_WARNING=0 ANSIBLE_NOCOLOR=1",
    ]
    play = f"{Path(sys.executable).parent}/ansible-playbook -i localhost, {top}/play.yml"
    runs = {
        "predicted": "--check",
        "made": "",
        "again": "",
        "seen": None,
        "gone": "-e ramlayer_state=absent -e ramlayer_merge=true",
        "gone-again": "-e ramlayer_state=absent -e ramlayer_merge=true",
    }
    for name, options in runs.items():
        if options is None:
            lines += [
                f"echo 42 >{top}/active/answer",
                f"cp /etc/systemd/system/ramlayer.service.d/50-ramlayer.conf {top}/out/dropin",
                f"ramlayer status --json >{top}/out/status",
                f"grep -c ' {top}/active ' /proc/mounts >{top}/out/mounts",
                f"cp {top}/systemd.json {top}/out/systemd",
            ]
        else:
            lines.append(f"{play} {options} >{top}/out/{name} 2>&1")
    lines += [f"ls /etc/systemd/system /etc/organism /var/lib/organism/earlier >{top}/out/left 2>&1 || test $? = 2"]
    return "\n".join(lines) + "\n"


def changed(text: str) -> int:
    found = re.search(r"changed=(\d+)\s+unreachable=0\s+failed=0", text)
    assert found, text
    return int(found[1])


def test_from_nothing_to_a_layer_and_back(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    for folder in ("bin", "out", "disk/base"):
        (tmp_path / folder).mkdir(parents=True)
    variables = {
        "ramlayer_lowerdir": f"{tmp_path}/disk/base",
        "ramlayer_persist_dir": f"{tmp_path}/disk/persist",
        "ramlayer_merged": f"{tmp_path}/active",
        "ramlayer_ramdir": f"{tmp_path}/ram",
        "ramlayer_ram_mb": 32,
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
    }
    play = {
        "name": "Build the layer", "hosts": "localhost", "connection": "local", "gather_facts": False,
        "vars": variables, "roles": ["organism.proxmox.ramlayer"],
    }  # fmt: skip
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play], sort_keys=False), encoding="utf-8")
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", script(tmp_path)],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    out = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir()}
    if done.returncode:
        pytest.fail(done.stderr + "\n".join(text for name, text in out.items() if name != "systemd"))

    assert changed(out["predicted"]) == changed(out["made"]) > 0
    assert changed(out["again"]) == 0
    places = " ".join(f"{tmp_path}/{name}" for name in ("disk/base", "disk/persist", "ram", "active"))
    assert f"RequiresMountsFor={places}\n" in out["dropin"]
    assert json.loads(out["status"])["overlay"] and out["mounts"] == "1\n"
    systemd = json.loads(out["systemd"])
    assert sorted(systemd["active"]) == ["ram-sync.timer", "ramlayer.service"]
    assert sorted(systemd["enabled"]) == ["ram-sync.timer", "ramlayer.service"]

    assert changed(out["gone"]) > 0 and changed(out["gone-again"]) == 0
    assert (tmp_path / "disk/base/answer").read_text(encoding="utf-8") == "42\n"
    assert not (tmp_path / "active").exists() and not (tmp_path / "ram").exists()
    assert "ramlayer" not in out["left"] and "ram-sync" not in out["left"]
    after = json.loads((tmp_path / "systemd.json").read_text(encoding="utf-8"))
    assert not after["active"] and not after["enabled"]
