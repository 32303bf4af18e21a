# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Job files: what they mean, and that each mistake is told with its line, all of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.client import InvalidJobError, JobFileError
from organism.client._jobfile import load

GOOD = """\
defaults:
  queue: night
  max_retries: 1
  env: {A: common, B: 2}
jobs:
  - name: report
    after: [train, "prepare:any", "other-job:failed"]
    cmd: [sh, -c, "echo done"]
  - name: train
    array: 2
    task_id: sweep
    after: prepare
    cmd: [python3, train.py, --epochs, 3, --fast, yes]
    env: {B: 0.5, ON: true}
  - name: prepare
    queue: day
    type: shell
    shell: |
      make
      ./prepare
    labels: {when: 2026-11-22}
"""


def test_python_programs_stand_in_the_file_or_beside_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print(1)\n")
    text = """
defaults: {queue: night}
jobs:
  - {python_file: train.py, argv: [--lr, 0.1]}
  - python: |
      import sys
      print(sys.argv)
"""
    file = tmp_path / "jobs.yml"
    file.write_text(text)
    beside, within = load(file)
    assert (beside.type, beside.python, beside.argv) == ("python", "print(1)\n", ["--lr", "0.1"])
    assert (within.type, within.python, within.queue) == ("python", "import sys\nprint(sys.argv)\n", "night")


def problems(text: str) -> list[str]:
    with pytest.raises(JobFileError) as caught:
        load("jobs.yml", text)
    return caught.value.problems


def test_names_defaults_arrays_and_order() -> None:
    prepare, first, second, report = load("jobs.yml", GOOD)
    assert (prepare.type, prepare.shell, prepare.queue, prepare.max_retries) == ("shell", "make\n./prepare\n", "day", 1)
    assert prepare.labels == {"when": "2026-11-22"}  # as written, not a date
    assert (first.task_id, second.task_id) == ("sweep-0", "sweep-1")
    # what YAML takes for a number or a truth is a word of a command here
    assert first.cmd == ["python3", "train.py", "--epochs", "3", "--fast", "true"]
    assert first.env["A"] == "common" and first.env["B"] == "0.5" and first.env["ON"] == "true"
    assert [need.task_id for need in first.after] == [prepare.task_id]
    assert [(need.task_id, need.on) for need in report.after] == [
        ("sweep-0", "ok"),
        ("sweep-1", "ok"),
        (prepare.task_id, "any"),
        ("other-job", "failed"),
    ]


def test_a_list_alone_several_documents_and_json_will_do() -> None:
    assert [spec.type for spec in load("x", "- type: noop\n---\n- type: noop\n  priority: 3\n")] == ["noop", "noop"]
    assert load("x", '[{"cmd": ["true"]}]')[0].cmd == ["true"]


def test_all_mistakes_are_told_with_their_lines() -> None:
    text = """\
defaults: {timeout: 60}
jobs:
  - cmd: [true]
    retrys: 3
  - cmd: echo hello
  - cmd: [a]
    timeout: soon
    priority: 500
  - name: x
    name: y
    cmd: [b]
  - just a text
  - type: noop
    shell: id
"""
    found = problems(text)
    assert found[0].startswith("jobs.yml:4: unknown field retrys")
    assert found[1] == "jobs.yml:10: name is given twice, first in line 9"
    assert found[2].startswith("jobs.yml:12: expects a job with its fields, not 'just a text'")
    # what is wrong with a job's content is told once its form is right
    rest = text.replace("    retrys: 3\n", "\n").replace("    name: y\n", "\n").replace("  - just a text\n", "\n")
    found = problems(rest)
    assert [problem.split(": ")[0] for problem in found] == ["jobs.yml:5", "jobs.yml:7", "jobs.yml:14"]
    assert "must be a list of words" in found[0]
    assert "timeout: Expected `float" in found[1]
    assert "`shell` belongs to type shell" in found[2]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("jobs:\n  - cmd: [a\n", 3, "is no YAML"),
        ("- cmd: \tx: y\n", 1, "is no YAML"),
        ("", 1, "no job is in it"),
        ("jobs: []\n", 1, "no job is in it"),
        ("job:\n  - cmd: [a]\n", 1, "unknown part job"),
        ("jobs: 3\n", 1, "expects a list of jobs"),
        ("defaults: {array: 3}\njobs: [{type: noop}]\n", 1, "array cannot be a default"),
        ("version: 2\njobs: [{type: noop}]\n", 1, "of version 2"),
        ("- {name: a, type: noop, after: b}\n- {name: b, type: noop, after: a}\n", 1, "jobs wait for each other"),
        ("- {name: a, type: noop}\n- {name: a, type: noop}\n", 2, "a is the name of a job in line 1 already"),
        ("- type: python\n", 1, "needs `python`"),
        ("- {cmd: [a],\n   argv: [b]}\n", 2, "belongs to type python"),
        ("- priority: 1\n  python_file: is/not/there.py\n", 2, "is/not/there.py cannot be read: No such file"),
        ("- python: pass\n  python_file: a.py\n", 2, "give one of them"),
        ("- python_file: [a.py]\n", 1, "must be the path"),
        ("defaults: {python_file: a}\njobs: [{type: noop}]\n", 1, "python_file cannot be a default"),
        ("- {type: noop, array: many}\n", 1, "array must be a number"),
        ("- {type: noop, array: 0}\n", 1, "an array has 1 to"),
        ("- {type: noop, gpu: 'a b'}\n", 1, "gpu: Expected `str` matching regex"),
        ("- &a {type: noop}\n- !!python/object:os.system {x: y}\n", 2, "unknown field x"),
        ("- {type: !!python/name:os.system ''}\n", 1, "cannot be read"),
        ("- type: noop\n  args: {<<: {a: 1}}\n", 2, "plain word"),
    ],
)
def test_mistakes(text: str, line: int, what: str) -> None:
    found = problems(text)
    assert found[0].startswith(f"jobs.yml:{line}: "), found
    assert what in found[0], found


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidJobError, match=r"absent\.yml: cannot be read"):
        load(tmp_path / "absent.yml")


@given(st.text(alphabet="-[]{}:, \nab&*!'\"|>#%@`0", max_size=60))
def test_nothing_but_job_file_errors_comes_of_nonsense(text: str) -> None:
    found: list[str] = []
    try:
        load("x", text)
    except JobFileError as error:
        found = error.problems
    assert all(problem.startswith("x:") for problem in found)


def test_a_file_nested_beyond_reason_is_refused() -> None:
    assert "nested too deeply" in problems("[" * 5000)[0]
    assert "nested too deeply" in problems("- type: noop\n  args: {a: " + "[" * 100 + "]" * 100 + "}\n")[0]
