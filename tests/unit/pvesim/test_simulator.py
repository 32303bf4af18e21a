# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The simulator itself: its files, its schema's checks, and that it demands the privileges that the API demands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pvesim.api import router
from pvesim.conf import Conf, Configs, parse
from pvesim.errors import ApiError, Died
from pvesim.formats import parse_cpuset
from pvesim.ha import Ha
from pvesim.node import Node
from pvesim.schema import VARIABLE, Schema


@pytest.fixture(scope="module")
def schema() -> Schema:
    found = Schema.load()
    if found is None:
        pytest.skip(f"requests are not checked: set {VARIABLE} to the dump of the API's schema")
    return found


def test_a_configuration_is_its_file() -> None:
    text = (
        "#first line\n#second%3A line\ncores: 2\nname: a\nnet0: virtio=BC:24:11:00:00:01,bridge=vmbr0\n"
        "\n[PENDING]\ncores: 4\ndelete: !scsi1,onboot\n"
    )
    conf = parse(text)
    assert conf.values["description"] == "first line\nsecond: line\n"
    assert (conf.values["cores"], conf.pending, conf.delete) == ("2", {"cores": "4"}, {"scsi1": True, "onboot": False})
    assert parse(conf.render()).values == conf.values and parse(conf.render()).delete == conf.delete
    assert conf.merged()["cores"] == "4"


def test_a_digest_is_the_files_own(tmp_path: Path) -> None:
    configs = Configs(tmp_path, "pve1")
    configs.write(100, Conf({"cores": "1"}))
    first = configs.load(100).digest
    (tmp_path / "100.conf").write_text("cores: 1\n# by hand\n")
    assert configs.load(100).digest != first
    with pytest.raises(Died, match="Configuration file 'nodes/pve1/qemu-server/101.conf' does not exist"):
        configs.load(101)


def test_every_method_is_one_of_the_api_with_its_permissions(schema: Schema, tmp_path: Path) -> None:
    for route in router(Ha(Node(tmp_path))).routes:
        method = schema.find(route.verb, route.template)
        assert method is not None, f"{route.verb} {route.template} is no method of the API"
        wanted = method.info.get("permissions") or {}
        assert _plain(route.permission.check) == wanted.get("check"), f"{route.verb} {route.template}"
        assert route.permission.user == wanted.get("user"), f"{route.verb} {route.template}"


def _plain(check: object) -> object:
    return [_plain(each) for each in check] if isinstance(check, tuple) else check


@pytest.mark.parametrize(
    ("given", "complaints"),
    [
        ({"cores": "0"}, {"cores": "value must have a minimum value of 1"}),
        ({"cores": "many"}, {"cores": "type check ('integer') failed - got 'many'"}),
        ({"bios": "uefi"}, {"bios": "value 'uefi' does not have a value in the enumeration 'seabios, ovmf'"}),
        (
            {"net32": "virtio"},
            {"net32": "property is not defined in schema and the schema does not allow additional properties"},
        ),
        ({"hostpci16": "mapping=a"}, {"hostpci16": "property is not defined"}),
        (
            {"hostpci0": "0000:01:00,all-functions=1"},
            {"hostpci0": "invalid key in comma-separated list property: all-functions"},
        ),
        ({"hostpci0": "gpu0"}, {"hostpci0": "value does not match the regex pattern"}),
        ({"net0": "virtio,virtio=BC:24:11:00:00:01"}, {"net0": "key alias 'model' is already defined"}),
        ({"net0": "virtio=01:00:00:00:00:01"}, {"net0": "unicast MAC address"}),
        ({"affinity": "0-"}, {"affinity": "cannot parse cpuset"}),
        ({"name": "a_b"}, {"name": "valid DNS name"}),
        ({"onboot": "maybe"}, {"onboot": "type check ('boolean') failed - got 'maybe'"}),
    ],
)
def test_what_the_schema_refuses(schema: Schema, given: dict[str, str], complaints: dict[str, str]) -> None:
    method = schema.find("PUT", "/nodes/{node}/qemu/{vmid}/config")
    assert method is not None
    with pytest.raises(ApiError) as caught:
        schema.check(method, {"node": "pve1", "vmid": "100", **given})
    assert caught.value.status == 400 and caught.value.message == "Parameter verification failed."
    assert set(caught.value.errors) == set(complaints)
    for name, said in complaints.items():
        assert said in caught.value.errors[name]


def test_what_the_schema_lets_pass(schema: Schema) -> None:
    method = schema.find("PUT", "/nodes/{node}/qemu/{vmid}/config")
    assert method is not None
    done = schema.check(
        method,
        {
            "node": "pve1",
            "vmid": "100",
            "cores": "4",
            "onboot": "yes",
            "memory": "current=2048",
            "net0": "virtio,bridge=vmbr0,queues=4",
            "hostpci0": "mapping=gpu0,pcie=1",
            "agent": "1",
            "scsi0": "fast:8,aio=io_uring,cache=none,discard=on,iothread=1",
            "affinity": "0-3,8",
            "boot": "order=scsi0",
            "efidisk0": "fast:1,efitype=4m,pre-enrolled-keys=0",
            "numa0": "cpus=0-3,memory=1024",
            "tags": "a;b",
            "ipconfig0": "ip=dhcp",
            "startup": "order=1,up=5",
            "cpu": "host",
            "machine": "q35",
            "vga": "serial0",
        },
    )
    assert (done["cores"], done["onboot"], done["vmid"]) == (4, 1, 100)


@pytest.mark.parametrize(("text", "cpus"), [("0-3", {0, 1, 2, 3}), ("1,3", {1, 3}), ("5", {5})])
def test_cpusets(text: str, cpus: set[int]) -> None:
    assert parse_cpuset(text) == cpus


def test_no_schema_is_said_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert os.environ.get(VARIABLE) is None and Schema.load() is None
