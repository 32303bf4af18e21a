# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers of Proxmox VE, sorted by what can be done about them."""

from __future__ import annotations

import pytest

from organism.core import _pve_local
from organism.core._pve_client import (
    PveAuthFailed,
    PveError,
    PveExists,
    PveForbidden,
    PveLocked,
    PveNotFound,
    PveRefused,
    PveStaleDigest,
    PveUnreachable,
    connect,
)
from organism.core._pve_errors import classify

UPID = "UPID:pve1:00001005:00007023:6B02B50D:qmstart:100:root@pam:"


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (401, "Authentication failed!", PveAuthFailed),
        (401, "No ticket", PveAuthFailed),
        (403, "Permission check failed (/vms/100, VM.PowerMgmt)", PveForbidden),
        (403, "Permission check failed", PveForbidden),
        (500, "only root can set 'hugepages' config", PveForbidden),
        (500, "only root can set 'hostpci0' config for non-mapped devices", PveForbidden),
        (500, "only root can set 'serial1' config for real devices", PveForbidden),
        (500, "checksum mismatch (file change by other user?)", PveStaleDigest),
        (500, "detected modified configuration - file changed by other user? Try again.", PveStaleDigest),
        (500, "Configuration file 'nodes/pve1/qemu-server/100.conf' does not exist", PveNotFound),
        (500, "mapping 'gpu0' not found", PveNotFound),
        (500, "storage 'x' does not exist", PveNotFound),
        (500, "unable to create VM 100 - VM 100 already exists on node 'pve1'", PveExists),
        (500, "create hardware mapping failed: pci ID 'gpu0' already defined", PveExists),
        (500, "can't lock file '/var/lock/qemu-server/lock-100.conf' - got timeout", PveLocked),
        (500, "VM is locked (backup)", PveLocked),
        (400, "Parameter verification failed.", PveRefused),
        (595, "Errors during connection establishment, proxy handshake", PveUnreachable),
        (501, "Method 'GET /x' not implemented", PveError),
        (500, "something new", PveError),
    ],
)
def test_kinds(status: int, message: str, kind: type[PveError]) -> None:
    error = classify(status, message, method="PUT", path="/nodes/pve1/qemu/100/config")
    assert type(error) is kind
    assert error.status == status
    assert "PUT /nodes/pve1/qemu/100/config" in str(error) and message in str(error)


def test_a_missing_privilege_is_named() -> None:
    error = classify(403, "Permission check failed (/vms/100, VM.Config.CPU)", method="PUT", path="/x")
    assert isinstance(error, PveForbidden)
    assert (error.privilege, error.object) == ("VM.Config.CPU", "/vms/100")
    assert "pveum acl modify /vms/100" in str(error)


def test_the_way_out_for_what_is_roots_alone() -> None:
    error = classify(500, "only root can set 'affinity' config", method="PUT", path="/x")
    assert isinstance(error, PveForbidden)
    assert error.root_only == ("affinity",)
    assert "backend local" in str(error) and "ticket of root@pam" in str(error)


def test_complaints_by_parameter() -> None:
    error = classify(
        400, "Parameter verification failed.", method="POST", path="/x", errors={"cores": "value must have ...\n"}
    )
    assert error.errors == {"cores": "value must have ...\n"}
    assert str(error).endswith("(cores: value must have ...)")


# ---- pvesh -----------------------------------------------------------------------------------------------------------


def test_what_pvesh_complains_of() -> None:
    text = (
        "400 Parameter verification failed.\ncores: value must have a minimum value of 1\n"
        "net0: invalid format - format error\nnet0.queues: value must have a maximum value of 64\n\n"
        "pvesh set <api_path> [OPTIONS] [FORMAT_OPTIONS]\n"
    )
    error = _pve_local.failure("PUT", "/x", text)
    assert isinstance(error, PveRefused) and error.status == 400
    assert error.errors["cores"] == "value must have a minimum value of 1"
    assert "pvesh set <api_path>" not in str(error)


def test_pvesh_is_roots() -> None:
    with pytest.raises(PveForbidden, match="become: true"):
        raise _pve_local.failure("GET", "/version", "please run as root\n")


@pytest.mark.parametrize(
    ("stdout", "data"),
    [
        ("", None),
        ('{"a":1}\n', {"a": 1}),
        (f'generating cloud-init ISO\nsome {{log}}\n"{UPID}"\n', UPID),
        (f"log\n{UPID}\n", UPID),
    ],
)
def test_answers_of_pvesh(stdout: str, data: object) -> None:
    assert _pve_local.answer("POST", "/x", stdout) == data


def test_an_answer_that_is_none() -> None:
    with pytest.raises(PveError, match="something else than JSON"):
        _pve_local.answer("GET", "/x", "┌────┐\n│ id │\n")


def test_words_for_pvesh() -> None:
    params = {"cores": 2, "onboot": True, "skip": None, "args": "-no-hpet", "map": ["a", "b"]}
    assert _pve_local.command_words(params) == ["--cores=2", "--onboot=1", "--args=-no-hpet", "--map=a", "--map=b"]


# ---- connecting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"backend": "https"}, "needs api_host and api_user"),
        ({"api_host": "h", "api_user": "root"}, "lacks its realm"),
        ({"api_host": "h", "api_user": "root@pam"}, "neither api_token_id"),
        ({"api_host": "h", "api_user": "root@pam", "api_token_id": "t"}, "without api_token_secret"),
    ],
)
def test_connections_that_make_no_sense(
    params: dict[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROXMOX_PASSWORD", raising=False)
    monkeypatch.delenv("PROXMOX_TOKEN_SECRET", raising=False)
    with pytest.raises(PveRefused, match=complaint):
        connect(params)


def test_the_backend_follows_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connect({}).backend == "local"
    assert connect({"backend": "local", "api_host": "h"}).backend == "local"
    monkeypatch.setenv("PROXMOX_TOKEN_SECRET", "s")
    token = connect({"api_host": "h", "api_user": "root@pam", "api_token_id": "root@pam!t"})
    assert (token.backend, token.is_root) == ("https-token", False)
    ticket = connect({"api_host": "h", "api_user": "root@pam", "api_password": "p"})
    assert (ticket.backend, ticket.is_root) == ("https-ticket", True)
    assert "'p'" not in repr(vars(ticket))
