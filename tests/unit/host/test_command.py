# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a failed program's words become."""

from __future__ import annotations

import sys

import pytest

from organism.core._systemd import CommandError, run_command


def failed(program: str) -> str:
    with pytest.raises(CommandError) as told:
        run_command([sys.executable, "-c", program])
    return str(told.value)


def test_both_ends_of_a_long_complaint_are_told() -> None:
    """``zfs get`` says which property it does not know and then prints pages of usage; others name the cause last."""
    told = failed("import sys; print('the cause', *range(5000), 'the end', sep='\\n', file=sys.stderr); sys.exit(2)")
    assert "ended with 2: the cause\n" in told
    assert told.endswith("the end")
    assert len(told) < 2500


def test_a_short_one_is_told_as_it_is() -> None:
    assert failed("import sys; sys.exit('no such pool')").endswith("ended with 1: no such pool")
