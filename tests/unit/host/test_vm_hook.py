# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Telling Proxmox VE of the hook: registered, chained, idempotent, and taken back to what was there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from organism.core import _hook, _vm_hook
from organism.core._earlier import EarlierState
from organism.core._root import Root

STORAGE = """\
dir: local
\tpath /var/lib/vz
\tcontent iso,vztmpl,backup
\tshared 0

zfspool: fast
\tpool fast
\tcontent images,rootdir

dir: scripts
\tpath /mnt/scripts/
\tcontent snippets
"""


class Node:
    """A node of Proxmox VE as far as the module sees it: its files, and qm and pvesm that change them."""

    def __init__(self, top: Path) -> None:
        self.root = Root(top)
        self.calls: list[str] = []
        for path, text in {
            "usr/sbin/qm": "",
            "etc/pve/storage.cfg": STORAGE,
            "etc/pve/qemu-server/100.conf": "cores: 4\nname: a\n\n[before]\nhookscript: local:snippets/older.pl\n",
            "etc/pve/qemu-server/101.conf": "cores: 4\nhookscript: local:snippets/mine.pl\n",
            "etc/pve/qemu-server/102.conf": "template: 1\n",
        }.items():
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            (top / path).write_text(text)

    def run(self, argv: list[str], **_options: object) -> str:
        self.calls.append(" ".join(argv))
        if argv[:2] == ["pvesm", "path"]:
            return f"/var/lib/vz/{argv[2].partition(':')[2]}\n"
        if argv[:2] == ["pvesm", "set"]:
            path = self.root.path("/etc/pve/storage.cfg")
            path.write_text(re.sub(r"content \S+", f"content {argv[4]}", path.read_text(), count=1))
            return ""
        assert argv[:2] == ["/usr/sbin/qm", "set"]
        assert self.root.exists("/var/lib/vz/snippets/organism-hook"), "Proxmox VE refuses a snippet that is not there"
        path = self.root.path(f"/etc/pve/qemu-server/{argv[2]}.conf")
        head, section, rest = path.read_text().partition("\n[")
        lines = [line for line in head.splitlines() if not line.startswith("hookscript:")]
        lines += [f"hookscript: {argv[4]}"] if argv[3] == "--hookscript" else []
        path.write_text("\n".join(lines) + "\n" + section + rest)
        return ""

    def present(self, *vmids: int, dry: bool = False) -> _vm_hook.Plan:
        earlier = EarlierState("vm_hook", self.root)
        facts = _vm_hook.read(self.root, "local")
        plan = _vm_hook.plan_present(self.root, earlier, facts, vmids, _hook.Settings(), self.run)
        if not dry:
            _vm_hook.apply(self.root, earlier, plan, self.run)
        return plan

    def absent(self) -> _vm_hook.Plan:
        earlier = EarlierState("vm_hook", self.root)
        plan = _vm_hook.plan_absent(self.root, earlier, _vm_hook.read(self.root, "local"))
        _vm_hook.apply(self.root, earlier, plan, self.run)
        return plan

    def files(self) -> dict[str, str]:
        top = self.root.top
        return {str(path.relative_to(top)): path.read_text() for path in sorted(top.rglob("*")) if path.is_file()}

    def hookscripts(self) -> dict[int, str | None]:
        return dict(_vm_hook.read(self.root, "local").hookscripts)


OURS = "local:snippets/organism-hook"


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_register_chain_and_take_back_exactly(node: Node) -> None:
    before = node.files()
    predicted = node.present(100, 101, dry=True)
    assert node.files() == before
    made = node.present(100, 101)
    assert str(predicted.difference.message) == made.difference.message
    assert node.hookscripts() == {100: OURS, 101: OURS}
    assert made.chained == {101: "local:snippets/mine.pl"}
    assert _hook.foreign_record(node.root, 101) == {
        "format": 1,
        "volume": "local:snippets/mine.pl",
        "path": "/var/lib/vz/snippets/mine.pl",
    }
    assert _hook.foreign_record(node.root, 100) is None, "a snapshot's hookscript is none of the VM"
    assert "pvesm set local --content iso,vztmpl,backup,snippets" in node.calls
    assert node.root.path("/var/lib/vz/snippets/organism-hook").stat().st_mode & 0o777 == 0o755

    assert _vm_hook.snippets(node.root) == ["/var/lib/vz/snippets/organism-hook"], "host_tools must stay"

    node.calls.clear()
    assert not node.present(100, 101).difference
    assert node.calls == []

    assert node.absent().difference
    after = node.files()
    assert {name: sorted(text.split()) for name, text in after.items()} == {
        name: sorted(text.split()) for name, text in before.items()
    }
    assert not node.absent().difference
    assert _vm_hook.snippets(node.root) == []


def test_a_vm_that_is_no_longer_named_gets_its_own_back(node: Node) -> None:
    node.present(100, 101)
    node.present(100)
    assert node.hookscripts() == {100: OURS, 101: "local:snippets/mine.pl"}
    assert _hook.foreign_record(node.root, 101) is None


def test_what_somebody_has_set_since_is_kept_or_chained(node: Node) -> None:
    node.present(100, 101)
    config = node.root.path("/etc/pve/qemu-server/101.conf")
    config.write_text(config.read_text().replace(OURS, "local:snippets/newer.pl"))
    taken = node.present(100)
    assert taken.kept_by_others[0]["key"] == "hookscript of VM 101"
    assert node.hookscripts()[101] == "local:snippets/newer.pl"

    assert node.present(100, 101).chained == {101: "local:snippets/newer.pl"}
    assert not node.present(100, 101).difference
    node.absent()
    assert node.hookscripts()[101] == "local:snippets/newer.pl"


def test_a_later_choice_is_chained_while_we_are_registered(node: Node) -> None:
    node.present(101)
    config = node.root.path("/etc/pve/qemu-server/101.conf")
    config.write_text(config.read_text().replace(OURS, "local:snippets/newer.pl"))
    assert node.present(101).chained == {101: "local:snippets/newer.pl"}
    assert not node.present(101).difference
    node.absent()
    assert node.hookscripts()[101] == "local:snippets/newer.pl"


@pytest.mark.parametrize(("vmid", "why"), [(102, "is a template"), (999, "is not on this node")])
def test_what_cannot_be_registered_is_refused(node: Node, vmid: int, why: str) -> None:
    with pytest.raises(_vm_hook.HookRefusedError, match=rf"VM {vmid} .*{why}"):
        node.present(vmid)
    assert node.calls == []


def test_a_storage_without_a_path_is_refused(node: Node) -> None:
    with pytest.raises(_vm_hook.HookRefusedError, match="no storage fast with a path; those with one: local, scripts"):
        _vm_hook.read(node.root, "fast")
    assert _vm_hook.read(node.root, "scripts").storage == _vm_hook.Storage("scripts", "/mnt/scripts", ("snippets",))


def test_a_host_without_proxmox_gets_the_settings_alone(tmp_path: Path) -> None:
    root = Root(tmp_path)
    earlier = EarlierState("vm_hook", root)

    def never(argv: list[str]) -> str:
        raise AssertionError(argv)

    plan = _vm_hook.plan_present(root, earlier, _vm_hook.read(root, "local"), [], _hook.Settings(5, 6), never)
    _vm_hook.apply(root, earlier, plan, never)
    assert _hook.settings(root) == _hook.Settings(5, 6)
    assert not root.exists("/var/lib/vz")
    with pytest.raises(_vm_hook.HookRefusedError, match="VM 100: this host has no /usr/sbin/qm"):
        _vm_hook.plan_present(root, earlier, _vm_hook.read(root, "local"), [100], _hook.Settings(), never)
