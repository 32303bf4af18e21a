# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""limits.toml: what holds for whom, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core import _limits, _maestro_deploy
from organism.core._limits import LimitsError
from organism.core._root import Root

TEXT = """
[defaults]
max_queued = 10
max_running = 2
max_priority = 0
types = ["noop"]
[groups.research]
users = ["alice", "bob"]
max_running = 4
max_gpu_seconds = 7200
[users.alice]
max_running = "unlimited"
types = ["cmd", "noop"]
"""


def test_the_user_counts_before_the_group_and_this_before_the_default() -> None:
    limits = _limits.parse(TEXT)
    alice, bob, carol = (limits.of(name) for name in ("alice", "bob", "carol"))
    assert (alice.max_running, bob.max_running, carol.max_running) == (None, 4, 2)
    assert (alice.max_queued, alice.max_gpu_seconds, carol.max_gpu_seconds) == (10, 7200, None)
    assert (alice.types, bob.types) == ({"cmd", "noop"}, {"noop"})


@pytest.mark.parametrize(
    ("user", "job", "named"),
    [
        ("carol", ("cmd", 0, 0, 60.0), "defaults.types is noop"),
        ("carol", ("noop", 1, 0, 60.0), "defaults.max_priority is 0"),
        ("carol", ("noop", 0, 10, 60.0), "defaults.max_queued is 10"),
        ("bob", ("noop", 0, 9, 7201.0), "groups.research.max_gpu_seconds is 7200"),
        ("alice", ("cmd", 0, 9, 7200.0), ""),
    ],
)
def test_a_refusal_names_the_rule(user: str, job: tuple[str, int, int, float], named: str) -> None:
    why = _limits.parse(TEXT).of(user).refusal(*job)
    assert named in why
    assert bool(named) == bool(why)


def test_running_jobs_bar_by_number_and_by_their_time_limits() -> None:
    limits = _limits.parse(TEXT)
    assert limits.of("carol").hindrance(1, 10**9) == ""
    assert "defaults.max_running is 2" in limits.of("carol").hindrance(2, 0)
    assert "groups.research.max_gpu_seconds" in limits.of("alice").hindrance(0, 7200)
    assert limits.of("alice").hindrance(1000, 7199) == ""


def test_no_file_is_no_limit(tmp_path: Path) -> None:
    limit = _limits.load(Root(tmp_path)).of("anybody")
    assert limit.refusal("cmd", 100, 10**9, 1e9) == ""
    assert limit.hindrance(10**6, 1e12) == ""


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense", "not TOML"),
        ("[other]\na = 1", "unknown section"),
        ("[defaults]\nmax_runing = 3", "no key max_runing"),
        ("[defaults]\nmax_running = -1", "out of range"),
        ("[defaults]\nmax_running = 1.5", "must be a number"),
        ("[defaults]\nmax_running = true", "must be a number"),
        ("[defaults]\nmax_priority = 101", "out of range"),
        ('[defaults]\ntypes = ["Not a type"]', "list of job types"),
        ("[groups.a]\nmax_running = 1", "needs users"),
        ('[groups.a]\nusers = ["x"]\n[groups.b]\nusers = ["x"]', "in group a already"),
        ('[users."no good"]\nmax_running = 1', "a name matches"),
        ("users = 3", "must hold tables"),
        ("[defaults]\nmin_priority = 5\n[users.x]\nmax_priority = 4", "defaults.min_priority is 5"),
    ],
)
def test_a_bad_file_is_refused_by_place(text: str, named: str) -> None:
    with pytest.raises(LimitsError, match=named):
        _limits.parse(text, "limits.toml")


values = st.fixed_dictionaries(
    {},
    optional={
        "max_queued": st.integers(0, 10**6) | st.just("unlimited"),
        "max_running": st.integers(0, 100) | st.just("unlimited"),
        "max_gpu_seconds": st.integers(0, 10**7) | st.just("unlimited"),
        "types": st.lists(st.sampled_from(["cmd", "noop"]), unique=True),
    },
)


@given(values, st.dictionaries(st.sampled_from(["alice", "bob"]), values))
def test_what_is_deployed_is_read_as_it_was_meant(defaults: dict[str, Any], users: dict[str, dict[str, Any]]) -> None:
    text = _maestro_deploy.render_limits({"defaults": defaults, "users": users})
    limits = _limits.parse(text)
    assert tomllib.loads(text).get("defaults", {}) == defaults
    for user in ("alice", "bob", "carol"):
        merged = {**defaults, **users.get(user, {})}
        for key in ("max_queued", "max_running", "max_gpu_seconds"):
            wanted = merged.get(key)
            assert getattr(limits.of(user), key) == (None if wanted == "unlimited" else wanted)


@pytest.mark.parametrize("limits", [{"user": {}}, {"users": []}, {"users": {"a": 3}}, {"defaults": {"x": 1}}])
def test_unfit_limits_are_not_deployed(limits: dict[str, Any]) -> None:
    with pytest.raises(_maestro_deploy.DeployRefusedError):
        _maestro_deploy.render_limits(limits)
