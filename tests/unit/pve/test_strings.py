# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Property strings: nothing is lost that was not named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core._pve_strings import NET_ALIAS, PropertyString, StringError, parse, parse_option

WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.:;/", min_size=1, max_size=12)
PARTS = st.dictionaries(WORD, WORD, max_size=6)


@given(PARTS, st.none() | WORD)
def test_what_is_read_is_written_again(parts: dict[str, str], bare: str | None) -> None:
    text = ",".join(([bare] if bare and "the-default" not in parts else []) + [f"{k}={v}" for k, v in parts.items()])
    assert parse("the-default", text).render() == text


@given(PARTS, WORD, WORD)
def test_a_change_changes_one_key(parts: dict[str, str], key: str, value: str) -> None:
    before = parse(None, ",".join(f"{k}={v}" for k, v in parts.items()))
    after = before.with_({key: value})
    assert after.as_dict() == {**parts, key: value}
    assert [k for k in after.as_dict() if k in parts] == list(parts), "the order stays"
    assert after.with_({key: None}).as_dict() == {k: v for k, v in parts.items() if k != key}


@pytest.mark.parametrize(
    ("option", "text", "changes", "expected"),
    [
        (
            "net0",
            "virtio=BC:24:11:00:00:01,bridge=vmbr0",
            {"queues": 4},
            "virtio=BC:24:11:00:00:01,bridge=vmbr0,queues=4",
        ),
        ("net0", "virtio=BC:24:11:00:00:01,bridge=a", {"model": "e1000"}, "e1000=BC:24:11:00:00:01,bridge=a"),
        ("net0", "virtio=BC:24:11:00:00:01", {"macaddr": "BC:24:11:00:00:02"}, "virtio=BC:24:11:00:00:02"),
        ("net0", "virtio=BC:24:11:00:00:01,tag=3", {"macaddr": None}, "model=virtio,tag=3"),
        ("net0", "virtio,bridge=vmbr0", {"model": "e1000"}, "e1000,bridge=vmbr0"),
        (
            "scsi0",
            "fast:vm-1-disk-0,size=8G,new-key=x",
            {"iothread": True},
            "fast:vm-1-disk-0,size=8G,new-key=x,iothread=1",
        ),
        ("hostpci0", "mapping=gpu0,x-vga=1", {"pcie": True, "x-vga": None}, "mapping=gpu0,pcie=1"),
        ("memory", "2048", {"current": 4096}, "4096"),
        ("memory", "current=2048", {"current": 4096}, "current=4096"),
        ("agent", "1,fstrim_cloned_disks=1", {"enabled": False}, "0,fstrim_cloned_disks=1"),
        ("startup", "order=3,up=5", {"down": 60}, "order=3,up=5,down=60"),
        ("numa0", "cpus=0-3,memory=1024", {"policy": "bind"}, "cpus=0-3,memory=1024,policy=bind"),
    ],
)
def test_changes(option: str, text: str, changes: dict[str, object], expected: str) -> None:
    assert parse_option(option, text).with_(changes).render() == expected  # type: ignore[arg-type]  # a table of all kinds


def test_an_alias_is_read_as_what_it_stands_for() -> None:
    one = parse("model", "virtio=BC:24:11:00:00:01,bridge=vmbr0", NET_ALIAS)
    other = parse("model", "bridge=vmbr0,model=virtio,macaddr=BC:24:11:00:00:01", NET_ALIAS)
    assert one.get("model") == "virtio" and one.get("macaddr") == "BC:24:11:00:00:01"
    assert one.same_as(other) and one.render() != other.render()


@pytest.mark.parametrize(
    ("default", "text", "complaint"),
    [
        (None, "4", "no default key"),
        ("x", "a=1,a=2", "comes twice"),
        ("x", "1,x=2", "comes twice"),
        ("x", "a=", "lacks a key or a value"),
        ("x", "=1", "lacks a key or a value"),
    ],
)
def test_what_proxmox_would_refuse(default: str | None, text: str, complaint: str) -> None:
    with pytest.raises(StringError, match=complaint):
        parse(default, text)


@pytest.mark.parametrize("value", ["", "a,b", "two\nlines"])
def test_values_that_cannot_be_written(value: str) -> None:
    with pytest.raises(StringError, match="no comma"):
        PropertyString().with_(key=value)


def test_blank_parts_are_no_parts() -> None:
    assert parse("file", "none, ,media=cdrom,").as_dict() == {"file": "none", "media": "cdrom"}
