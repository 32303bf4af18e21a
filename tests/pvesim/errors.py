# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers that are no success, as PVE::Exception makes them."""

from __future__ import annotations

from collections.abc import Mapping


class ApiError(Exception):
    """A status, a message without its newline, and complaints by parameter."""

    def __init__(self, status: int, message: str, errors: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.errors = dict(errors or {})

    @property
    def text(self) -> str:
        """What a command prints (PVE::Exception, stringify): a plain ``die`` has no code in front."""
        head = self.message if self.status == 500 else f"{self.status} {self.message}"
        return head + "\n" + "".join(f"{name}: {said}\n" for name, said in sorted(self.errors.items()))


class Died(ApiError):
    """A Perl ``die`` with a text: status 500."""

    def __init__(self, message: str) -> None:
        super().__init__(500, message)


class Unknown(ApiError):
    """A behaviour that is in neither facts/pve.md nor in what was read of PVE's sources."""

    def __init__(self, what: str) -> None:
        super().__init__(501, f"pvesim does not know: {what}")


def bad_parameters(errors: Mapping[str, str]) -> ApiError:
    return ApiError(400, "Parameter verification failed.", errors)


def forbidden(what: str = "") -> ApiError:
    return ApiError(403, f"Permission check failed ({what})" if what else "Permission check failed")
