# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard as a state of a host: written once, foretold, and taken back without a start being refused in between."""

from __future__ import annotations

from pathlib import Path

from organism.core import _guard_host
from organism.core._earlier import EarlierState
from organism.core._guard_config import CONFIG, Config, GroupWish, load
from organism.core._guard_profile import ENTRIES
from organism.core._root import Root

WANTED = Config(groups=(GroupWish("ml", "preempt", ("a", "b")),))


def present(root: Root, config: Config = WANTED, *, dry: bool = False) -> _guard_host.Plan:
    earlier = EarlierState(_guard_host.CAPABILITY, root)
    plan = _guard_host.plan_present(root, earlier, config)
    if not dry:
        _guard_host.apply(root, earlier, plan)
    return plan


def files(top: Path) -> list[str]:
    return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file())


def test_settings_and_entries_are_written_once_and_taken_back(tmp_path: Path) -> None:
    root = Root(tmp_path)
    assert present(root, dry=True).difference.changed
    assert not files(tmp_path)
    first = present(root)
    assert [change.name for change in first.difference.changes] == [CONFIG, *ENTRIES]
    assert load(root) == WANTED
    assert "# organism-hook: timeout=270\n" in root.read(ENTRIES[0])
    assert root.path(ENTRIES[0]).stat().st_mode & 0o777 == 0o755
    assert not present(root).difference.changed
    earlier = EarlierState(_guard_host.CAPABILITY, root)
    plan = _guard_host.plan_absent(root, earlier)
    assert list(plan.files.writes)[-1] == CONFIG, "an entry without settings refuses every start"
    _guard_host.apply(root, earlier, plan)
    assert not files(tmp_path)


def test_vms_that_do_not_ask_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "etc/pve/qemu-server"
    folder.mkdir(parents=True)
    (folder / "100.conf").write_text("hookscript: local:snippets/organism-hook\n")
    (folder / "101.conf").write_text("hookscript: local:snippets/own.pl\n")
    (folder / "102.conf").write_text("template: 1\n")
    assert present(Root(tmp_path)).unguarded == [101]


def test_an_entry_that_somebody_has_changed_stays(tmp_path: Path) -> None:
    root = Root(tmp_path)
    present(root)
    root.path(ENTRIES[1]).write_text("own\n")
    earlier = EarlierState(_guard_host.CAPABILITY, root)
    plan = _guard_host.plan_absent(root, earlier)
    _guard_host.apply(root, earlier, plan)
    assert [each["key"] for each in plan.kept_by_others] == [ENTRIES[1]]
    assert root.read(ENTRIES[1]) == "own"
