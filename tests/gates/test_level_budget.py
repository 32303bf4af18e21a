# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""At most 25 tasks a level go to a host, and no task loops over CPUs, interrupts or devices.

``ansible-playbook --list-tasks`` does not see what is included, so the files are walked here, as a run of the level
with everything present walks them:

- a task that runs on the host counts one, whatever its ``when`` says; the tasks of a block each
- ``import_*`` and ``include_*`` count what they bring
- what the controller does by itself (``CONTROLLER``) does not count, as it costs no way to the host; nor does the check
  of a role's arguments, which Ansible puts before a role
- a file named by a role's ``*_state`` variable is ``present.yml``, since that is the longer way
- an include with a condition of ``NOT_IN_A_LEVEL`` does not count, as it never holds in a whole level
- an optional role that is off by default (``ramlayer``) counts like any other

A loop is fine over a list that is written out in the task; any other is in ``LOOPS`` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
BUDGET = 25
LEVELS = (1, 2, 3, 4, 6)

CONTROLLER = ("assert", "debug", "fail", "set_fact")

NOT_IN_A_LEVEL = {"memory_result is not defined": "level 1 has brought the memory to its state just before the profile"}

LOOPS = {
    "{{ memory_budget.pages | dict2items }}": "sizes of hugepages: one or two on any machine",
    "{{ __ramlayer_units }}": "the unit files of the one RAM layer",
}

Task = dict[str, Any]


def _load(file: Path) -> list[Task]:
    return yaml.safe_load(file.read_text()) or []


def _action(task: Task, name: str) -> Any:
    return task.get(f"ansible.builtin.{name}", task.get(name))


def walk(tasks: list[Task], role: Path | None, repo: Path = REPO) -> Iterator[Task]:
    """The tasks of a run in order, without imports and includes themselves."""
    for task in tasks:
        for part in ("block", "rescue", "always"):
            if part in task:
                yield from walk(task[part], role, repo)
        if "block" in task or str(task.get("when")) in NOT_IN_A_LEVEL:
            continue
        imported, included = _action(task, "import_role"), _action(task, "include_role")
        if imported or included:
            chosen = imported or included
            below = repo / "roles" / chosen["name"].rpartition(".")[2]
            yield from walk(_load(below / "tasks" / f"{chosen.get('tasks_from', 'main')}.yml"), below, repo)
            continue
        files = _action(task, "import_tasks"), _action(task, "include_tasks")
        if any(files):
            assert role is not None, f"a playbook includes tasks: {task}"
            name = files[0] or files[1]
            name = name if isinstance(name, str) else name["file"]
            if "{{" in name:
                assert name == f"{{{{ {role.name}_state }}}}.yml", f"roles/{role.name}: no way to tell what {name} is"
                name = "present.yml"
            yield from walk(_load(role / "tasks" / name), role, repo)
            continue
        yield task


def steps(play: Task, repo: Path = REPO) -> list[Task]:
    found: list[Task] = []
    for entry in play.get("roles", []):
        below = repo / "roles" / (entry if isinstance(entry, str) else entry["role"]).rpartition(".")[2]
        found += walk(_load(below / "tasks/main.yml"), below, repo)
    for part in ("pre_tasks", "tasks", "post_tasks"):
        found += walk(play.get(part, []), None, repo)
    return found


def bad_loops(tasks: list[Task]) -> list[str]:
    found = []
    for task in tasks:
        for key, over in task.items():
            if (key == "loop" or key.startswith("with_")) and not isinstance(over, list) and over not in LOOPS:
                found.append(f"{task.get('name')}: {key} {over}")
    return found


def of_level(level: int) -> list[Task]:
    return [step for play in _load(REPO / f"playbooks/level{level}.yml") for step in steps(play)]


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_keeps_to_its_budget(level: int) -> None:
    names = [str(task.get("name")) for task in of_level(level) if not any(_action(task, name) for name in CONTROLLER)]
    assert 3 < len(names) <= BUDGET, f"level {level} has {len(names)} tasks:\n" + "\n".join(names)


@pytest.mark.parametrize("level", LEVELS)
def test_no_task_loops_over_what_a_host_has(level: int) -> None:
    """One call of a module looks at all of them; a task for each would take seconds a CPU."""
    assert not bad_loops(of_level(level))


def test_the_walk_follows_every_way_in(tmp_path: Path) -> None:
    for name, text in {
        "roles/one/tasks/main.yml": "- ansible.builtin.include_tasks: '{{ one_state }}.yml'\n",
        "roles/one/tasks/present.yml": "- block: [{name: a, debug: {}}]\n  rescue: [{name: b, debug: {}}]\n"
        "- include_role: {name: organism.proxmox.two}\n",
        "roles/two/tasks/main.yml": "- {name: c, debug: {}, loop: '{{ cpus }}'}\n- import_tasks: more.yml\n",
        "roles/two/tasks/more.yml": "- {name: d, debug: {}, loop: [1, 2]}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = steps({"tasks": [{"import_role": {"name": "organism.proxmox.one"}}]}, tmp_path)
    assert [task.get("name") for task in found] == ["a", "b", "c", "d"]
    assert bad_loops(found) == ["c: loop {{ cpus }}"]
