# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who a job is of: the user that the server ties to the key, the group of the limits file, and nothing that is claimed.

That a key publishes only as its own user is shown beside the bus (test_access.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from organism.client import Maestro
from service.client.pool import Pool

LIMITS = """
[groups.research]
users = ["alice"]
types = ["cmd", "noop"]
"""
SHOW = ("sh", "-c", 'echo "$ORGANISM_USER ${ORGANISM_GROUP:-none}"')


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("identity")
    limits = folder / "limits.toml"
    limits.write_text(LIMITS)
    made = Pool(folder, gpus=("gpu0",), LIMITS_FILE=limits).start()
    yield made
    made.stop()


def test_a_job_carries_its_user_and_group(pool: Pool) -> None:
    claims = {"ORGANISM_USER": "root", "ORGANISM_GROUP": "admins"}
    for user, group in (("alice", "research"), ("bob", "")):
        with Maestro(pool.settings(user)) as maestro:
            # what a job claims about itself neither reaches the record nor its own environment
            result = maestro.submit(cmd=list(SHOW), env=claims).result(timeout=60)
        assert (result.user, result.group) == (user, group)
        assert result.stdout == f"{user} {group or 'none'}\n"


def test_a_refused_job_says_of_whom_it_is(pool: Pool) -> None:
    done = pool.run("--json", "submit", "--type", "shell", "--shell", "id")
    told = pool.run("--json", "result", str(done.json["task_id"])).json["result"]
    assert (told["state"], told["error"]) == ("dead", "refused")
    assert "type shell is not allowed by this site's policy" in told["reason"]
    assert (told["user"], told["group"]) == ("alice", "research")
