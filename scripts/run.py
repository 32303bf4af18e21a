# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ./run starts: puts scripts/ on the path (Python runs isolated here) and hands over to the house."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from house.main import main

sys.exit(main(sys.argv[1:]))
