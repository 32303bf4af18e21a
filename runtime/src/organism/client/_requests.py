# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Questions checked before they are sent, so that a mistyped id or state is told at once and by its name."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from organism.client._errors import RequestError

Request = TypeVar("Request", bound=msgspec.Struct)


def build_request(fields: dict[str, Any], kind: type[Request]) -> Request:
    """Raises RequestError. None means "not given"."""
    given = {key: value for key, value in fields.items() if value is not None}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise RequestError(f"{shown}: {error}") from error
