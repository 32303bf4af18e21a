# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Payloads: what is refused, with words that say where and why."""

from __future__ import annotations

import pytest

from organism.bus import messages
from organism.bus.messages import (
    BadMessage,
    Heartbeat,
    JobSpec,
    check_spec,
    decode,
    encode,
    level_of,
    shown_command,
)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"{", "truncated"),
        (b"\xff", "malformed"),
        (b"[]", "Expected `object`"),
        (b'{"cmdd": ["x"]}', "unknown field `cmdd`"),
        (b'{"cmd": "ls"}', "$.cmd"),
        (b'{"timeout": -1}', "$.timeout"),
        (b'{"timeout": "soon"}', "$.timeout"),
        (b'{"task_id": "a.b"}', "$.task_id"),
        (b'{"task_id": "a\\n"}', "$.task_id"),
        (b'{"gpu": "../../etc"}', "$.gpu"),
        (b'{"priority": 1000}', "$.priority"),
        (b'{"v": 2}', "$.v"),
        (b'{"type": "Shell!"}', "$.type"),
    ],
)
def test_a_bad_submission_is_refused_where_it_is_wrong(payload: bytes, says: str) -> None:
    with pytest.raises(BadMessage) as refusal:
        decode(payload, JobSpec)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (JobSpec(), "needs `cmd`"),
        (JobSpec(type="shell"), "needs `shell`"),
        (JobSpec(type="shell", shell="x", cmd=["y"]), "belongs to type cmd"),
        (JobSpec(cmd=["x"], shell="y"), "belongs to type shell"),
        (JobSpec(type="python"), "needs `python`"),
        (JobSpec(type="python", python="pass", cmd=["y"]), "belongs to type cmd"),
        (JobSpec(cmd=["x"], python="pass"), "belongs to type python"),
        (JobSpec(cmd=["x"], argv=["y"]), "`argv` belongs to type python"),
        (JobSpec(type="python", python="pass\0"), "NUL"),
        (JobSpec(type="python", python="pass", argv=["\0script"]), "NUL"),
        (JobSpec(cmd=["x"], cwd="/etc"), "`cwd`"),
        (JobSpec(cmd=["x"], cwd="a/../../b"), "`cwd`"),
        (JobSpec(cmd=["x"], env={"A=B": "1"}), "`env`"),
        (JobSpec(cmd=["x\0y"]), "NUL"),
    ],
)
def test_what_the_schema_alone_cannot_say(spec: JobSpec, says: str) -> None:
    with pytest.raises(BadMessage, match=says.replace("`", "`")):
        check_spec(spec)


def test_good_specs_pass_and_come_back_as_they_went() -> None:
    for spec in (
        JobSpec(cmd=["echo", "héllo"], env={"A": "b=c"}, timeout=1.5, gpu="gpu0", cwd="out/a..b"),
        JobSpec(type="noop"),
        JobSpec(type="shell", shell="echo hi"),
        JobSpec(type="python", python="print('ä')", argv=["--lr", "0.1"], args={"a": 1}),
        JobSpec(type="embed", args={"texts": ["a"]}),
    ):
        check_spec(spec)
        assert decode(encode(spec), JobSpec) == spec


def test_people_see_what_a_job_runs_and_old_workers_get_none_that_they_cannot_read() -> None:
    program = JobSpec(type="python", python="#!/usr/bin/python3\n\n# trains\nimport torch\nx()\n", argv=["--lr", "1"])
    assert shown_command(program) == "python: import torch --lr 1"
    assert shown_command(JobSpec(cmd=["a", "b"])) == "a b"
    assert shown_command(JobSpec(type="shell", shell="make")) == "make"
    assert shown_command(JobSpec(type="noop")) == ""
    assert [level_of(spec) for spec in (program, JobSpec(cmd=["a"], gpus=2), JobSpec(cmd=["a"]))] == [3, 2, 0]


def test_components_tolerate_fields_of_a_newer_version() -> None:
    beat = decode(
        b'{"ts":"x","gpu_id":"gpu0","incarnation":"i","host":"h","pid":1,"version":"9","device":{"backend":"simulated",'
        b'"address":"sim:0","colour":"red"},"mood":"fine"}',
        Heartbeat,
    )
    assert beat.device.address == "sim:0"


def test_times_are_utc_and_come_back() -> None:
    stamp = messages.now()
    assert stamp.endswith("Z")
    assert len(stamp) == len("2026-11-22T10:00:00.000Z")
    assert messages.seconds_since_epoch("1970-01-01T00:01:00.500Z") == 60.5
