# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Content of a storage: added once, nothing taken away."""

from __future__ import annotations

from typing import Any

import pytest
from unit.pve_vm.fake import ROUTES, FakePve

from organism.core import _pve_storage
from organism.core._pve_client import PveRefused, PveStaleDigest


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    storage: dict[str, Any] = {"type": "dir", "path": "/var/lib/vz", "content": "iso,backup", "digest": "1"}

    def put(pve: FakePve, params: dict[str, Any]) -> None:
        if params.pop("digest") != storage["digest"]:
            raise PveStaleDigest("detected modified configuration - file changed by other user? Try again.")
        storage.update(params, digest=storage["digest"] + "1")

    monkeypatch.setitem(ROUTES["GET"], "/storage/local", lambda pve, params: dict(storage))
    monkeypatch.setitem(ROUTES["PUT"], "/storage/local", put)
    return storage


def test_kinds_are_added_once(stored: dict[str, Any]) -> None:
    pve = FakePve()
    assert _pve_storage.allow(pve, "local", ["snippets"], check=True).difference.changed
    assert pve.writes == []
    done = _pve_storage.allow(pve, "local", ["snippets", "iso"], check=False)
    assert (stored["content"], done.path) == ("iso,backup,snippets", "/var/lib/vz")
    assert not _pve_storage.allow(pve, "local", ["snippets"], check=False).difference.changed


def test_a_concurrent_edit_is_read_again(stored: dict[str, Any]) -> None:
    pve = FakePve()
    pve.before_write = lambda fake: stored.update(content="iso,backup,rootdir", digest="9")
    _pve_storage.allow(pve, "local", ["snippets"], check=False)
    assert stored["content"] == "iso,backup,rootdir,snippets"


def test_files_on_a_storage_without_a_folder_are_refused(stored: dict[str, Any]) -> None:
    stored.update(type="zfspool", path=None)
    with pytest.raises(PveRefused, match=r"storage local \(zfspool\) has no folder for snippets"):
        _pve_storage.allow(FakePve(), "local", ["snippets"], check=False)


POOL = "fast/organism/vmdata"


@pytest.mark.parametrize("alien", ["snippets", "iso"])
def test_a_pool_holds_no_files(alien: str) -> None:
    pve = FakePve()
    with pytest.raises(PveRefused, match=f"images and rootdir, and not {alien}"):
        _pve_storage.offer(pve, "vmdata", POOL, ["images", alien], sparse=True, check=False)
    assert pve.calls == []


@pytest.mark.parametrize("pool", ["/organism/vmdata", "", "fast/", "9fast", "fast//x"])
def test_what_names_no_dataset_is_refused_before_anything_is_sent(pool: str) -> None:
    pve = FakePve()
    with pytest.raises(PveRefused, match="names no pool and no dataset"):
        _pve_storage.offer(pve, "vmdata", pool, ["images"], sparse=True, check=False)
    assert pve.calls == []


def test_a_name_that_is_something_else_is_refused(stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTES["GET"], "/storage", lambda pve, params: [{"storage": "local", **stored}])
    pve = FakePve()
    for call in (
        lambda: _pve_storage.offer(pve, "local", POOL, ["images"], sparse=True, check=False),
        lambda: _pve_storage.withdraw(pve, "pve1", "local", POOL, check=False),
    ):
        with pytest.raises(PveRefused, match=rf"is there as dir /var/lib/vz, and not as zfspool {POOL}"):
            call()
    assert pve.writes == []
