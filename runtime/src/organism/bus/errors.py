# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong on the bus, mapped once, so that no other file catches an exception of the NATS client."""

from __future__ import annotations


class BusError(Exception):
    """Anything that the bus, or the way to it, refused or lost."""


class Unreachable(BusError):
    """No server answered; trying again is sensible."""


class Refused(BusError):
    """The server does not accept this key, or this key may not say that; trying again changes nothing."""


class Untrusted(Refused):
    """The server's certificate is not signed by our CA, or it offers no TLS where TLS is wanted."""


class TooOld(BusError):
    """The server's version lacks what the streams need."""


class Unavailable(BusError):
    """No answer in time. The request may or may not have taken effect: ask again with the same message id."""


class FenceBusy(Unavailable):
    """A replicated stream checks one write under a fence at a time, and another one is on its way: ask again.

    It says nothing about who holds the fence (``expectedPerSubjectInProcess`` in nats-server's jetstream_batching.go).
    """


class StreamReset(BusError):
    """A stream ends before the sequence from which it was to be read: it was deleted and made anew, or restored."""


class ApiError(BusError):
    """JetStream's refusal. ``err_code`` is the server's own number (``errors.json`` of nats-server)."""

    def __init__(self, code: int, err_code: int, description: str, subject: str = "") -> None:
        super().__init__(f"{subject}: {description} ({code}/{err_code})" if subject else f"{description} ({err_code})")
        self.code = code
        self.err_code = err_code
        self.description = description
        self.subject = subject


class WrongLastSequence(ApiError):
    """The expected sequence has moved: another writer was there first, or this writer is fenced off."""


class SubjectFull(ApiError):
    """The stream keeps a limited number of messages a subject, and this subject has them: for a result, it exists."""


class StreamFull(ApiError):
    """The stream's size or count is used up (``discard: new``)."""


class DuplicateInBatch(ApiError):
    """One message id of an atomic batch was stored earlier: nothing of the batch is stored."""


class NotFound(ApiError):
    """No such stream, consumer or message."""


WRONG_LAST_SEQUENCE = 10071
FENCE_BUSY = 10164
UNSETTLED = (10008, 10009, 10158, 10163)
"""A cluster that elects a leader (twice); an earlier try of the same message is still on its way (it may yet be stored:
whoever took this for a refusal would decide anew about what is decided already); a fence that cannot be checked yet."""
NOT_LEADING = ("raft: not leader", "raft: stepped down")
STORE_FAILED = 10077
DUPLICATE_IN_BATCH = 10201
NOT_FOUND = (10014, 10037, 10059)  # consumer, message, stream


def api_error(code: int, err_code: int, description: str, subject: str = "") -> ApiError:
    """The most telling class for JetStream's answer."""
    kind: type[ApiError] = ApiError
    if err_code == WRONG_LAST_SEQUENCE:
        kind = WrongLastSequence
    elif err_code == DUPLICATE_IN_BATCH:
        kind = DuplicateInBatch
    elif err_code in NOT_FOUND:
        kind = NotFound
    elif err_code == STORE_FAILED and "per subject" in description:
        kind = SubjectFull
    elif err_code == STORE_FAILED and "maximum" in description:
        kind = StreamFull
    return kind(code, err_code, description, subject)
