# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ./run chaos and ./run bench make of their words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from house.places import Places
from house.proofs import BENCH, CHAOS, BadWords, bench, chaos

PLACES = Places(Path("/checkout"), Path("/cache"))


def test_words_become_options() -> None:
    program = chaos(PLACES, ["SUITE=ram", "SEED=7", "MINUTES=0.5", "HOW=journal kept, data lost"])
    assert program.words == (
        "-m", "chaos.ram", "--seed", "7", "--minutes", "0.5", "--how", "journal kept, data lost",
    )  # fmt: skip
    assert program.path == "/checkout/tests"
    assert bench(PLACES, []).words == ("-m", "bench.ram")
    assert bench(PLACES, ["--files", "10"]).words == ("-m", "bench.ram", "--files", "10")
    assert bench(PLACES, ["ram", "--repeat", "2"]).words == ("-m", "bench.ram", "--repeat", "2")


@pytest.mark.parametrize("words", [[], ["SUITE=none"], ["ram"], ["SUITE=ram", "SEED="], ["SUITE=ram", "--seed=1"]])
def test_other_words_are_refused(words: list[str]) -> None:
    with pytest.raises(BadWords):
        chaos(PLACES, words)


def test_every_suite_is_a_module() -> None:
    tests = Path(__file__).resolve().parents[2]
    for module in CHAOS.values():
        assert (tests / module.replace(".", "/") / "__main__.py").exists()
    for module in BENCH.values():
        assert (tests / f"{module.replace('.', '/')}.py").exists()
    with pytest.raises(BadWords, match="bench wants one of: ram"):
        bench(PLACES, ["none"])
