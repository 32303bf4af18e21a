# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong between a client and the pool; each kind says whether the job is safe and what to do next."""

from __future__ import annotations


class MaestroError(Exception):
    """The base of all. ``code`` is one word for programs, the text a sentence for people."""

    code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class BusUnreachableError(MaestroError):
    """No connection, or no answer of the server in time."""

    code = "bus_unreachable"


class ConductorUnreachableError(MaestroError):
    """The bus is there, no conductor answers. Submitted jobs are safe on the bus and run when one is back."""

    code = "conductor_unreachable"


class AccessDeniedError(MaestroError):
    """Wrong credentials, or not permitted to this user."""

    code = "forbidden"


class InvalidJobError(MaestroError):
    """The job cannot be submitted as it is written; nothing was sent."""

    code = "invalid_job"


class PayloadTooLargeError(InvalidJobError):
    """The job is larger than a message may be; nothing was sent."""

    code = "payload_too_large"


class QueueFullError(MaestroError):
    """The queue takes no more; the job was not accepted."""

    code = "queue_full"


class NotFoundError(MaestroError):
    """No such job, GPU or letter (or it is not yours)."""

    code = "not_found"


class ConflictError(MaestroError):
    """Not possible in the present state, such as the cancelling of a finished job."""

    code = "conflict"


class JobFailedError(MaestroError):
    """A job whose success was taken for granted did not end well; ``task_id``, ``state`` and ``error`` tell how."""

    code = "job_failed"

    def __init__(self, message: str, *, task_id: str, state: str, error: str | None) -> None:
        super().__init__(message)
        self.task_id, self.state, self.error = task_id, state, error


class ValueMismatchError(MaestroError):
    """The value that a job left is not of the type that was asked for; the text says where it differs."""

    code = "value_mismatch"


class RequestError(MaestroError):
    """The conductor refused the question, or its answer does not fit: another version."""

    code = "bad_request"


class WaitTimeoutError(MaestroError):
    """The caller's time-out passed; the jobs go on. ``pending`` are their ids."""

    code = "wait_timeout"

    def __init__(self, message: str, pending: list[str]) -> None:
        super().__init__(message)
        self.pending = pending
