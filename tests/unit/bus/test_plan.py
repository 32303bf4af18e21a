# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan from present to declared streams, without a server; and reading of what a server says."""

from __future__ import annotations

from copy import deepcopy

import pytest

from organism.bus.errors import BusError, StreamFull, SubjectFull, WrongLastSequence, api_error
from organism.bus.tail import ack_parts
from organism.core import _bus, _bus_plan, _nkey

WANTED = _bus.topology()


def as_server_tells(topology: _bus.Topology) -> _bus.Topology:
    """Its own defaults added, false and empty values left out, lists in another order."""
    told = deepcopy(topology)
    for config in told.streams.values():
        config["subjects"] = sorted(config["subjects"], reverse=True)
        config |= {"max_consumers": -1, "compression": "none", "metadata": {"_nats.level": "2"}}
        if not config["max_age"]:
            del config["max_age"]
    return told


def test_equal_configurations_are_equal_however_the_server_writes_them() -> None:
    plan = _bus_plan.plan(as_server_tells(WANTED), WANTED)
    assert not plan.difference.changed
    assert not plan.steps


def test_what_is_not_there_is_created() -> None:
    steps = _bus_plan.plan(_bus.Topology(), WANTED).steps
    assert [(step.verb, step.subject) for step in steps] == [
        ("create", f"STREAM.CREATE.{name}") for name in WANTED.streams
    ]


def test_an_update_keeps_what_is_not_declared() -> None:
    present = as_server_tells(WANTED)
    present.streams[_bus.STREAM_WQ]["max_bytes"] = 1
    plan = _bus_plan.plan(present, WANTED)
    assert [change.name for change in plan.difference.changes] == [f"stream {_bus.STREAM_WQ}: max_bytes"]
    (step,) = plan.steps
    assert step.subject == f"STREAM.UPDATE.{_bus.STREAM_WQ}"
    assert step.body["compression"] == "none"
    assert step.body["max_bytes"] == WANTED.streams[_bus.STREAM_WQ]["max_bytes"]


@pytest.mark.parametrize(
    ("key", "value"), [("storage", "memory"), ("retention", "workqueue"), ("persist_mode", "async")]
)
def test_what_would_need_a_new_stream_is_refused(key: str, value: str) -> None:
    present = as_server_tells(WANTED)
    present.streams[_bus.STREAM_WQ][key] = value
    if key == "persist_mode":
        wanted = deepcopy(WANTED)
        wanted.streams[_bus.STREAM_WQ][key] = "default"
    else:
        wanted = WANTED
    plan = _bus_plan.plan(present, wanted)
    assert len(plan.refusals) == 1
    assert key in plan.refusals[0]


def test_removal_takes_only_what_is_ours() -> None:
    present = as_server_tells(WANTED)
    present.streams["FOREIGN"] = {}
    plan = _bus_plan.plan_absent(present, WANTED)
    assert {step.stream for step in plan.steps} == set(WANTED.streams)
    assert {step.verb for step in plan.steps} == {"delete"}


def test_acknowledgement_subjects_of_both_forms_are_read() -> None:
    short = ack_parts("$JS.ACK.ORG_WQ.GPU_RUN_gpu0.2.30.4.1795317105299621762.7")
    long = ack_parts("$JS.ACK.hub.ACCHASH.ORG_WQ.GPU_RUN_gpu0.2.30.4.1795317105299621762.7.token")
    assert short == long
    assert (short.num_delivered, short.stream_seq, short.consumer_seq, short.pending) == (2, 30, 4, 7)
    for bad in ("", "_INBOX.x", "$JS.ACK.a.b"):
        with pytest.raises(BusError):
            ack_parts(bad)


def test_a_full_subject_is_told_from_a_full_stream() -> None:
    assert isinstance(api_error(503, 10077, "maximum messages per subject exceeded"), SubjectFull)
    assert isinstance(api_error(503, 10077, "maximum bytes exceeded"), StreamFull)
    assert isinstance(api_error(400, 10071, "wrong last sequence: 3"), WrongLastSequence)


def test_public_keys_are_checked_by_their_checksum() -> None:
    import nkeys

    public = bytes(nkeys.from_seed(bytearray(nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_USER))).public_key).decode()
    assert _nkey.is_public(public)
    other = "A" if public[20] != "A" else "B"
    assert not _nkey.is_public(public[:20] + other + public[21:])
    assert not _nkey.is_public("A" + public[1:])
    assert not _nkey.is_public("")
