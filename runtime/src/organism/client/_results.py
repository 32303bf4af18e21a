# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a client hands out: results and pieces of output, typed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import msgspec

from organism.bus import messages
from organism.client._errors import JobFailedError, ValueMismatchError

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """How a job ended. Times are UTC, RFC 3339; text of stdout and stderr is head and tail when there was much."""

    task_id: str
    ok: bool
    state: messages.State
    """``done``, ``failed``, ``cancelled`` or ``dead``."""
    error: str | None = None
    """One word: ``exit``, ``timeout``, ``signal``, ``start``, ..."""
    reason: str = ""
    """One sentence for people."""
    user: str = ""
    group: str = ""
    """The user's group in the site's limits file."""
    gpu: str | None = None
    returncode: int | None = None
    stdout: str = ""
    stderr: str = ""
    value: Any = None
    attempts: int = 0
    submitted: str = ""
    started: str | None = None
    finished: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    history: list[messages.StateEvent] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """The last attempt as the worker reported it."""

    def checked(self) -> Self:
        """The result itself, of a job that is done. Raises JobFailedError for any other end."""
        if not self.ok:
            told = f"{self.task_id} is {self.state}: {self.reason or self.error or 'no reason given'}"
            raise JobFailedError(told, task_id=self.task_id, state=self.state, error=self.error)
        return self

    def value_as(self, kind: type[T]) -> T:
        """The value that the job left, as ``kind``: a dataclass, a TypedDict, a msgspec.Struct, ``list[float]``, ...

        Raises JobFailedError when the job is not done, ValueMismatchError when its value is of another shape.
        """
        self.checked()
        try:
            return msgspec.convert(self.value, kind)
        except msgspec.ValidationError as error:
            shown = getattr(kind, "__name__", str(kind))
            raise ValueMismatchError(f"the value of {self.task_id} is no {shown}: {error}") from error

    @classmethod
    def of(cls, message: messages.Result) -> Result:
        data = message.data
        return cls(
            task_id=message.task_id,
            ok=message.ok,
            state=message.state,
            error=message.error,
            reason=message.reason,
            user=message.user,
            group=message.group,
            gpu=data.get("gpu_id"),
            returncode=data.get("returncode"),
            stdout=str(data.get("stdout") or ""),
            stderr=str(data.get("stderr") or ""),
            value=data.get("value"),
            attempts=message.attempts,
            submitted=message.submitted,
            started=data.get("started"),
            finished=data.get("finished"),
            labels=message.labels,
            history=message.history,
            data=data,
        )


@dataclass(frozen=True)
class LogChunk:
    """A piece of a job's output; ``attempt`` changes when the job was started again."""

    text: str
    attempt: int
    state: str
