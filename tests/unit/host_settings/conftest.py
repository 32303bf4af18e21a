# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest
from unit.host_settings.trees import Host


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)
