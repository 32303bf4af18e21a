# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Times as they are written down."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import example, given
from hypothesis import strategies as st

from organism.bus.messages import seconds_since_epoch
from organism.maestro.clock import stamp


@given(st.floats(min_value=0, max_value=4e9))
@example(1790000000.9999996)
@example(1941740962.7609994)
def test_a_stamp_is_what_datetime_would_write(seconds: float) -> None:
    written = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert stamp(seconds) == written
    assert abs(seconds_since_epoch(stamp(seconds)) - seconds) < 0.0011
