# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pages of modules, filters and roles as HTML, from their docstrings and argument_specs."""

from __future__ import annotations

import shutil
from pathlib import Path

from .places import Places
from .steps import Steps

CONF = """\
project = "organism.proxmox"
extensions = ["sphinx_antsibull_ext"]
html_theme = "alabaster"
exclude_patterns = []
"""


def build(places: Places) -> int:
    """Write `.cache/docs/html`. Raises StepFailed."""
    docs, env = places.cache / "docs", places.environment()
    if docs.exists():
        shutil.rmtree(docs)
    source = docs / "rst"
    source.mkdir(parents=True)
    steps = Steps(2, places.log / "docs.log")
    steps.begin("Pages from the docstrings")
    antsibull: list[str | Path] = [
        places.venv / "bin" / "antsibull-docs",
        "collection",
        "--use-current",
        "--fail-on-error",
        "--dest-dir",
        source,
    ]
    steps.run([*antsibull, "--squash-hierarchy", "organism.proxmox"], env=env, cwd=places.repo)
    (source / "conf.py").write_text(CONF)
    steps.done()
    steps.begin("HTML")
    steps.run([places.python, "-m", "sphinx", "-q", "-b", "html", source, docs / "html"], env=env)
    steps.done()
    print(docs / "html" / "index.html")
    return 0
