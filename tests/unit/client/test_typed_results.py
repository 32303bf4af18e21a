# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A job's value as a type of the caller's, or an error that says how it differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pytest

from organism.client import JobFailedError, Result, ValueMismatchError


@dataclass
class Score:
    loss: float
    epochs: int


class Loose(TypedDict):
    loss: float


class Strict(msgspec.Struct):
    loss: float
    name: str | None = None


def done(value: Any) -> Result:
    return Result("job", ok=True, state="done", value=value)


def test_a_value_becomes_what_is_asked_for() -> None:
    assert done({"loss": 0.5, "epochs": 3}).value_as(Score) == Score(0.5, 3)
    assert done({"loss": 1}).value_as(Loose) == {"loss": 1.0}
    assert done({"loss": 0.5}).value_as(Strict) == Strict(0.5)
    assert done([1, 2.5]).value_as(list[float]) == [1.0, 2.5]


@pytest.mark.parametrize("value", [None, {"loss": "low", "epochs": 3}, {"loss": 0.5}, [1]])
def test_another_shape_is_told(value: Any) -> None:
    with pytest.raises(ValueMismatchError, match="the value of job is no Score"):
        done(value).value_as(Score)


def test_a_job_that_failed_has_no_value_to_rely_on() -> None:
    failed = Result("job", ok=False, state="failed", error="exit", reason="ended with return code 3", value={"loss": 0})
    with pytest.raises(JobFailedError, match="job is failed: ended with return code 3") as caught:
        failed.value_as(Loose)
    assert (caught.value.state, caught.value.error, caught.value.code) == ("failed", "exit", "job_failed")
    assert done(1).checked().value == 1
