# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs of ``python`` jobs: read where they are submitted, run where the GPU is."""

from __future__ import annotations

from pathlib import Path

from organism.client._errors import InvalidJobError


def read_script(path: str | Path) -> str:
    """The text of a Python program, UTF-8 as the job's interpreter will read it. Raises InvalidJobError."""
    try:
        # not read_text(): the program arrives as it is, line ends included
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidJobError(f"the Python program {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidJobError(f"the Python program {path} is not UTF-8: {error}") from error
    if not text.strip():
        raise InvalidJobError(f"the Python program {path} is empty")
    return text
