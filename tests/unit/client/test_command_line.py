# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The grammar of maestroctl, what it prints, and the codes it ends with (S1k-038 to 041, D01)."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from organism.bus import rpc_types
from organism.cli import maestroctl
from organism.cli._jobs import job_fields, read_jsonl, result_lines
from organism.cli._output import Output, clean, exit_code
from organism.cli._parser import parse
from organism.cli._pool import top_lines
from organism.client import (
    BusUnreachableError,
    ConductorUnreachableError,
    InvalidJobError,
    MaestroError,
    NotFoundError,
    PayloadTooLargeError,
    QueueFullError,
    RequestError,
    Result,
    _ids,
)
from organism.client._submitting import build


def fields(*words: str) -> dict[str, Any]:
    return job_fields(parse(["submit", *words]))


# ---- grammar ---------------------------------------------------------------------------------------------------------


def test_everything_after_two_dashes_is_the_command() -> None:
    found = fields("--gpu", "gpu0", "--", "bash", "-lc", "echo --gpu; exit 1", "--timeout", "--", "--json")
    assert found["cmd"] == ["bash", "-lc", "echo --gpu; exit 1", "--timeout", "--", "--json"]
    assert found["gpu"] == "gpu0"
    assert "timeout" not in found


def test_the_operation_and_the_command_do_not_overwrite_each_other() -> None:
    # the command line that S1k-D01 reports as lost: `cmd` was the name of the operation and of the option
    arguments = parse(["submit", "--timeout", "5", "--cmd", "bash", "-lc", "echo hi"])
    assert arguments.operation == "submit"
    assert job_fields(arguments) == {"type": "cmd", "cmd": ["bash", "-lc", "echo hi"], "timeout": 5.0}


def test_no_two_options_share_a_name() -> None:
    from organism.cli._parser import build_parser

    operations = next(action for action in build_parser()._actions if action.dest == "operation")
    assert operations.choices is not None
    for name, parser in dict(operations.choices).items():
        names = [action.dest for action in parser._actions]
        assert len(set(names)) == len(names), name
        assert "operation" not in names


def test_every_option_of_submit_arrives() -> None:
    words = ["--cwd", "sub", "--timeout", "1.5", "--retries", "0", "--task-id", "t1", "--priority", "-5"]
    words += ["--env", "A=1", "--env", "B=x=y", "--label", "run=7"]
    assert fields(*words, "--delay", "3", "--min-vram", "4000", "--shell", "make") == {
        "type": "shell",
        "shell": "make",
        "cwd": "sub",
        "timeout": 1.5,
        "max_retries": 0,
        "task_id": "t1",
        "priority": -5,
        "env": {"A": "1", "B": "x=y"},
        "labels": {"run": "7"},
        "delay": 3.0,
        "min_vram_mb": 4000,
    }


def test_a_python_program_travels_with_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "train.py"
    program.write_bytes("print('ä')\r\n".encode())
    found = fields("--python", str(program), "--timeout", "5", "--args", '{"lr": 1}', "--", "--lr", "0.1", "--python")
    assert found == {
        "type": "python",
        "python": "print('ä')\r\n",
        "argv": ["--lr", "0.1", "--python"],
        "args": {"lr": 1},
        "timeout": 5.0,
    }
    assert build({"python": program, "argv": ["x"]}).python == build(found).python
    monkeypatch.setattr("sys.stdin", io.StringIO("pass\n"))
    assert fields("--python", "-", "--") == {"type": "python", "python": "pass\n"}
    for data, says in ((b"caf\xe9", "not UTF-8"), (b"\n", "is empty"), (None, "No such file")):
        broken = tmp_path / "broken.py"
        broken.unlink(missing_ok=True)
        if data is not None:
            broken.write_bytes(data)
        with pytest.raises(InvalidJobError, match=says):
            fields("--python", str(broken))
        with pytest.raises(InvalidJobError, match=says):
            build({"python": broken})


def test_other_types_need_no_command() -> None:
    assert fields("--type", "noop") == {"type": "noop"}
    assert fields("--type", "render", "--args", '{"frame": 3}') == {"type": "render", "args": {"frame": 3}}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["submit"], "nothing to run"),
        (["submit", "--type", "cmd"], "nothing to run"),
        (["submit", "--type", "shell"], "needs --shell"),
        (["submit", "--type", "python"], "needs --python"),
        (["submit", "--type", "cmd", "--python", "a"], "belongs to type python"),
        (["submit", "--python", "a", "--shell", "b"], "exclude each other"),
        (["submit", "--python", "a", "--cmd", "b"], "exclude each other"),
        (["submit", "--"], "the command is empty"),
        (["submit", "--cmd"], "the command is empty"),
        (["submit", "--shell", "a", "--", "b"], "exclude each other"),
        (["submit", "--cmd", "a", "--", "b"], "say the same thing"),
        (["submit", "--type", "noop", "--", "b"], "belongs to type cmd"),
        (["submit", "--type", "noop", "--shell", "b"], "belongs to type shell"),
        (["submit", "--timeout", "soon", "--", "a"], "must be a number of seconds"),
        (["submit", "--timeout", "0", "--", "a"], "must be above 0"),
        (["submit", "--timeout", "nan", "--", "a"], "finite"),
        (["submit", "--timeout", "-1", "--", "a"], "finite"),
        (["submit", "--env", "A", "--", "a"], "KEY=VALUE"),
        (["submit", "--bogus", "--", "a"], "unrecognized"),
        (["list", "--state", "asleep"], "invalid choice"),
        (["list", "--limit", "0"], "1 to 1000"),
        (["wait"], "required"),
        (["dead", "replay"], "required"),
        (["dead"], "required"),
        ([], "required"),
        (["fly"], "invalid choice"),
    ],
)
def test_a_line_that_makes_no_sense_ends_with_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        maestroctl.main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    with pytest.raises(SystemExit) as caught:
        maestroctl.main(["--json", *words])
    assert caught.value.code == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["error"]["code"]) == (False, "usage")
    assert says in answer["error"]["message"]


@pytest.mark.parametrize("words", [["--json", "list"], ["list", "--json"]])
def test_common_options_stand_on_either_side(words: list[str]) -> None:
    assert parse(words).as_json is True
    assert parse(["--patience", "3", *words]).patience == 3
    assert parse(["--context", "a.toml", *words]).context == "a.toml"


def test_help_ends_with_0_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["submit", "--help"]):
        with pytest.raises(SystemExit) as caught:
            maestroctl.main(words)
        assert caught.value.code == 0
        assert "examples:" in capsys.readouterr().out


# ---- what is sent ----------------------------------------------------------------------------------------------------


def test_one_line_of_jsonl_is_one_job(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"cmd": ["a"]}\n\n{"type": "noop", "priority": 5}\n')
    assert read_jsonl(str(file)) == [{"cmd": ["a"]}, {"type": "noop", "priority": 5}]


@pytest.mark.parametrize(("line", "says"), [("{", "is not JSON"), ("[1]", "must be a JSON object")])
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(f'{{"cmd": ["a"]}}\n{line}\n')
    with pytest.raises(InvalidJobError, match=f"jobs.jsonl:2 {says}"):
        read_jsonl(str(file))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cmd": "echo hi"}, "list of words"),
        ({"cmd": []}, "needs `cmd`"),
        ({}, "needs `cmd`"),
        ({"cmd": ["a"], "timeout": -1}, r"\$.timeout"),
        ({"cmd": ["a"], "timeout": "5"}, r"\$.timeout"),
        ({"cmd": ["a"], "gpu": "gpu 0"}, r"\$.gpu"),
        ({"cmd": ["a"], "task_id": "../x"}, r"\$.task_id"),
        ({"cmd": ["a"], "prio": 1}, "prio"),
        ({"cmd": ["a"], "cwd": "/etc"}, "cwd"),
        ({"cmd": ["a\0b"]}, "NUL"),
        ({"type": "noop", "cmd": ["a"]}, "belongs to type cmd"),
    ],
)
def test_a_job_that_cannot_be_is_refused_before_it_is_sent(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidJobError, match=says):
        build(given)


def test_ids_are_identifiers_differ_and_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for milliseconds in (1_000, 1_000, 1_001, 2**40):
        monkeypatch.setattr(_ids.time, "time_ns", lambda at=milliseconds: at * 1_000_000)
        made.append(_ids.new_task_id())
    assert len(set(made)) == 4
    assert max(made[:2]) < made[2] < made[3]
    assert build({"type": "noop", "task_id": made[0]}).task_id == made[0]


# ---- what is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BusUnreachableError("x"), 3),
        (ConductorUnreachableError("x"), 3),
        (NotFoundError("x"), 1),
        (QueueFullError("x"), 1),
        (PayloadTooLargeError("x"), 1),
        (InvalidJobError("x"), 2),
        (RequestError("x"), 2),
        (RequestError("x", code="version"), 1),
        (MaestroError("x", code="settings"), 2),
        (MaestroError("x"), 1),
    ],
)
def test_each_kind_of_trouble_has_its_exit_code(error: MaestroError, code: int) -> None:
    assert exit_code(error) == code


def test_settings_that_are_missing_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert maestroctl.main(["--json", "--context", str(tmp_path / "no.toml"), "list"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"]["code"] == "settings"
    assert "no.toml" in answer["error"]["message"]


def test_completion_knows_the_operations(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh"):
        assert maestroctl.main(["completion", shell]) == 0
        assert "tail-state" in capsys.readouterr().out


def complete(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    program = (
        f'source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE="{" ".join(words)}";'
        " name=$(complete -p maestroctl | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); $name; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split()


def test_bash_completes_operations_options_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    assert maestroctl.main(["completion", "bash"]) == 0
    script = tmp_path / "maestroctl.bash"
    script.write_text(capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.yml").touch()
    assert complete(script, "maestroctl", "exp") == ["explain"]
    assert complete(script, "maestroctl", "submit", "--gpu") == ["--gpu", "--gpus", "--gpu-model"]
    assert complete(script, "maestroctl", "submit", "--file", "job") == ["jobs.yml"]


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert maestroctl.main(["completion", "bash"]) == 1
    assert "shtab" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Output(stdout=Terminal()).paint("done") == "\x1b[32mdone\x1b[0m"
    assert Output(stdout=io.StringIO()).paint("done") == "done"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Output(stdout=Terminal()).paint("done") == "done"


def test_tables_are_aligned_and_cannot_rewrite_the_terminal() -> None:
    lines = Output(stdout=io.StringIO()).table(("A", "LONGER"), [("x\x1b[2J", 1), ("yyyyyyyyyy", None)])
    assert lines == ["A           LONGER", "x?[2J       1", "yyyyyyyyyy  -"]
    assert clean("a\nb\tc\x00\u202e") == "a b c??"


def test_top_shows_unknown_as_unknown_and_simulated_as_such() -> None:
    gpus = [
        rpc_types.GpuInfo(id="gpu10", state="idle", backend="simulated", model="RX", temp_c=0.0, heartbeat_age=1.2),
        rpc_types.GpuInfo(id="gpu2", state="dead", vram_total_mb=8192),
    ]
    leader = rpc_types.ConductorInfo(name="a", epoch=3, since="2026-11-22T10:00:00.000Z", version="0.1.0")
    lines = top_lines(
        Output(stdout=io.StringIO()), rpc_types.TopReply(gpus=gpus, queue={"running": 1, "retry": 0}, conductor=leader)
    )
    assert lines[1] == "queue     running 1"
    first, second = lines[4].split(), lines[5].split()
    assert first[:2] == ["gpu2", "dead"]
    assert "?/8192" in first
    assert "never" in first
    assert second[:2] == ["gpu10", "idle"]
    assert "0°C" in second
    assert "(simulated)" in second


def test_a_failed_result_says_where_and_why() -> None:
    result = Result(
        task_id="t", ok=False, state="failed", error="exit", reason="it ran 3 times", gpu="gpu1", returncode=3,
        attempts=3, stdout="partial\n", stderr="boom\n",
    )  # fmt: skip
    assert result_lines(Output(stdout=io.StringIO()), result) == [
        "t  failed (exit) on gpu1 after 3 attempts returncode 3 - it ran 3 times",
        "partial",
        "-- stderr:",
        "boom",
    ]
