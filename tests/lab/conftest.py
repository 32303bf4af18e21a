# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab tier: real systemd in containers. Needs root, mmdebstrap and systemd-nspawn; skipped aloud where one lacks.

The tests' labs have names of their own, so they never meet a lab that the user has up; the built tree is shared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab import host
from lab.driver import Lab


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    if os.geteuid() != 0:
        pytest.skip("the lab needs root: run the tests as root")
    if missing := host.missing_tools():
        pytest.skip(f"the lab needs {', '.join(missing)}: apt-get install {' '.join(sorted(set(missing.values())))}")


@pytest.fixture(scope="session")
def site_lab() -> Iterator[Lab]:
    """A lab for site.yml, fresh, with one bus node and one pool node."""
    lab = Lab("orgtest0")
    lab.must("clean")
    lab.must("up")
    yield lab
    lab.must("clean")
