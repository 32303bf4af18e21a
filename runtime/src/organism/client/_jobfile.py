# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Job files: YAML with the fields of a job, checked as a whole, each mistake told with its line.

    defaults: {queue: night, max_retries: 1}
    jobs:
      - name: prepare                 # a name within this file
        cmd: [python3, prepare.py]
      - name: train
        array: 4                      # four jobs, each with its ORGANISM_ARRAY_INDEX
        after: [prepare]              # a name of this file, or an id; `name:failed`, `name:any`
        python_file: train.py         # a program beside this file, or its text in `python: |`

A list of jobs alone is a job file, too, and so are several documents. JSON is YAML.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from organism.bus import messages
from organism.client._errors import InvalidJobError
from organism.client._ids import new_task_id
from organism.client._scripts import read_script
from organism.client._submitting import array, build, needs

LIMIT = 16 * 1024 * 1024
"""Bytes of a job file."""
OWN = ("name", "array", "python_file")
"""Fields of a job in a file beside those of :class:`organism.bus.messages.JobSpec`."""
FIELDS = tuple(name for name in messages.JobSpec.__struct_fields__ if name not in ("v", "replay_of"))

_PATH = re.compile(r" - at `\$\.?(?P<path>.*)`\Z")


class JobFileError(InvalidJobError):
    """What is wrong with a job file; ``problems`` has a line each, ``FILE:LINE: what``. Nothing was sent."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class _Text:
    """A place in the file and what stands there; ``lines`` are those of the fields."""

    line: int
    value: Any
    lines: dict[str, int] = field(default_factory=dict)


@dataclass
class _Entry:
    """A job of the file."""

    line: int
    name: str
    after: list[Any]
    lines: dict[str, int]
    fields: dict[str, Any]
    count: int | None
    ids: list[str] = field(default_factory=list)


def load(path: str | Path, text: str | None = None) -> list[messages.JobSpec]:
    """The jobs of a file in an order in which they can be submitted: those that others wait for first.

    ``text``: its content, when the caller has read it (``path`` is then a name for messages). Raises JobFileError with
    every mistake in it.
    """
    where = str(path)
    if text is None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise JobFileError([f"{where}: cannot be read: {error}"]) from error
    if len(text) > LIMIT:
        raise JobFileError([f"{where}: is larger than {LIMIT // 1024**2} MiB"])
    return _File(where, text).jobs()


class _File:
    def __init__(self, where: str, text: str) -> None:
        self.where = where
        self.problems: list[tuple[int, str]] = []
        self.text = text

    def blame(self, line: int, what: str) -> None:
        self.problems.append((line, f"{self.where}:{line}: {what}"))

    def check(self) -> None:
        if self.problems:
            raise JobFileError([text for _, text in sorted(self.problems, key=lambda problem: problem[0])])

    def jobs(self) -> list[messages.JobSpec]:
        entries = [entry for found in self._documents() for entry in self._entries(found)]
        self.check()
        if not entries:
            raise JobFileError([f"{self.where}:1: no job is in it"])
        names = self._names(entries)
        for entry in entries:
            self._resolve(entry, names)
        ordered = self._sorted(entries, names)
        specs = [spec for entry in ordered for spec in self._specs(entry)]
        self.check()
        return specs

    # ---- YAML --------------------------------------------------------------------------------------------------------

    def _documents(self) -> Iterator[_Text]:
        # some milliseconds to import, which only who submits a file pays
        import yaml

        try:
            for node in yaml.compose_all(self.text, Loader=yaml.SafeLoader):
                yield self._plain(node)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.blame(mark.line + 1 if mark else 1, f"is no YAML: {error.problem or error.context}")
        except yaml.YAMLError as error:  # a character that cannot be there
            self.blame(1, f"is no YAML: {error}")
        except RecursionError:
            self.blame(1, "is nested too deeply")

    def _plain(self, node: Any, depth: int = 0) -> _Text:
        """Data with the lines of its fields. Types are YAML's safe ones; a time is a text here, not a date."""
        import yaml

        line = node.start_mark.line + 1
        if depth > 50:
            raise RecursionError
        if isinstance(node, yaml.SequenceNode):
            return _Text(line, [self._plain(item, depth + 1) for item in node.value])
        if isinstance(node, yaml.MappingNode):
            found: dict[str, _Text] = {}
            lines: dict[str, int] = {}
            for key, value in node.value:
                place = key.start_mark.line + 1
                name = key.value if isinstance(key, yaml.ScalarNode) else None
                if name is None or name == "<<":
                    self.blame(place, "a field's name must be a plain word")
                    continue
                if name in found:
                    self.blame(place, f"{name} is given twice, first in line {lines[name]}")
                found[name], lines[name] = self._plain(value, depth + 1), place
            return _Text(line, found, lines)
        if node.tag in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:str"):
            return _Text(line, node.value)
        loader = yaml.SafeLoader("")
        try:
            return _Text(line, loader.construct_object(node))
        except (yaml.YAMLError, ValueError) as error:
            self.blame(line, f"{node.value!r} cannot be read: {error}")
            return _Text(line, None)
        finally:
            loader.dispose()

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def _entries(self, document: _Text) -> Iterator[_Entry]:
        listed, defaults = document, _Text(document.line, {})
        if isinstance(document.value, dict):
            unknown = [name for name in document.value if name not in ("jobs", "defaults", "version")]
            for name in unknown:
                self.blame(document.lines[name], f"unknown part {name}; a job file has `jobs` and may have `defaults`")
            if "jobs" not in document.value:
                self.blame(document.line, "has no `jobs`")
                return
            version = document.value.get("version")
            if version is not None and version.value != 1:
                self.blame(version.line, f"is of version {version.value}, this program reads version 1")
            listed, defaults = document.value["jobs"], document.value.get("defaults", defaults)
        elif document.value is None:
            return
        if not isinstance(listed.value, list):
            self.blame(listed.line, "expects a list of jobs, each with a dash before it")
            return
        if not isinstance(defaults.value, dict):
            self.blame(defaults.line, "defaults expects fields of a job")
            return
        for name in set(defaults.value) & {"name", "python_file", "task_id", "array", "after"}:
            self.blame(defaults.lines[name], f"{name} cannot be a default: it belongs to one job")
        for item in listed.value:
            if isinstance(item.value, dict):
                yield self._entry(item, defaults)
            else:
                self.blame(item.line, f"expects a job with its fields, not {_bare(item)!r}")

    def _entry(self, item: _Text, defaults: _Text) -> _Entry:
        lines = {**defaults.lines, **item.lines}
        fields = {key: _bare(value) for key, value in {**defaults.value, **item.value}.items()}
        for both in ("env", "labels"):
            if isinstance(_bare(defaults.value.get(both)), dict) and isinstance(fields.get(both), dict):
                fields[both] = {**_bare(defaults.value[both]), **fields[both]}
        for name in [name for name in fields if name not in FIELDS and name not in OWN]:
            near = difflib.get_close_matches(name, [*FIELDS, *OWN], 1)
            self.blame(lines[name], f"unknown field {name}" + (f"; is {near[0]} meant?" if near else ""))
            del fields[name]
        name, count = fields.pop("name", None), fields.pop("array", None)
        if name is not None and not isinstance(name, str):
            self.blame(lines["name"], f"name must be a word, not {name!r}")
            name = None
        if count is not None and (not isinstance(count, int) or isinstance(count, bool)):
            self.blame(lines["array"], f"array must be a number of jobs, not {count!r}")
            count = None
        for key in ("env", "labels"):
            if isinstance(fields.get(key), dict):
                # YAML reads `SEED: 7` as a number; here everything is text
                fields[key] = {inner: _word(value) for inner, value in fields[key].items()}
        for key in ("cmd", "argv"):
            if isinstance(fields.get(key), list):
                fields[key] = [_word(word) for word in fields[key]]
        if "python_file" in fields:
            self._program(fields, lines)
        fields = {key: value for key, value in fields.items() if value is not None}
        after = fields.pop("after", [])
        try:
            wanted = needs(after)
        except TypeError:
            self.blame(lines["after"], "after expects names or ids")
            wanted = []
        fields.setdefault("task_id", new_task_id())
        return _Entry(item.line, str(name or fields["task_id"]), wanted, lines, fields, count)

    def _program(self, fields: dict[str, Any], lines: dict[str, int]) -> None:
        """``python_file`` becomes the program's text; its path is that beside the job file."""
        name = fields.pop("python_file")
        if not isinstance(name, str) or not name:
            self.blame(lines["python_file"], f"python_file must be the path of a Python program, not {name!r}")
        elif fields.get("python") is not None:
            self.blame(lines["python_file"], "python and python_file say the same thing: give one of them")
        else:
            try:
                fields["python"] = read_script(Path(self.where).parent / name)
            except InvalidJobError as error:
                self.blame(lines["python_file"], str(error))
        # one mistake is told once
        fields.setdefault("python", "pass")

    def _names(self, entries: list[_Entry]) -> dict[str, _Entry]:
        names: dict[str, _Entry] = {}
        for entry in entries:
            if entry.name in names:
                place = entry.lines.get("name", entry.lines.get("task_id", entry.line))
                self.blame(place, f"{entry.name} is the name of a job in line {names[entry.name].line} already")
            names.setdefault(entry.name, entry)
            identity = str(entry.fields["task_id"])
            entry.ids = [identity] if entry.count is None else [f"{identity}-{n}" for n in range(max(0, entry.count))]
        return names

    def _resolve(self, entry: _Entry, names: Mapping[str, _Entry]) -> None:
        """Names of this file become ids; an array's name stands for all its jobs."""
        wanted = []
        for need in entry.after:
            other = names.get(str(need.get("task_id"))) if isinstance(need, dict) else None
            wanted += [need] if other is None else [{**need, "task_id": task_id} for task_id in other.ids]
        if wanted:
            entry.fields["after"] = wanted

    def _sorted(self, entries: list[_Entry], names: Mapping[str, _Entry]) -> list[_Entry]:
        """Those that others wait for first, otherwise as written."""
        done: list[_Entry] = []
        state: dict[str, str] = {}

        def visit(entry: _Entry, way: list[str]) -> None:
            if state.get(entry.name) == "done":
                return
            if state.get(entry.name) == "open":
                self.blame(entry.line, f"jobs wait for each other: {' after '.join([*way, entry.name])}")
                return
            state[entry.name] = "open"
            for need in entry.after:
                other = names.get(str(need.get("task_id"))) if isinstance(need, dict) else None
                if other is not None:
                    visit(other, [*way, entry.name])
            state[entry.name] = "done"
            done.append(entry)

        try:
            for entry in entries:
                visit(entry, [])
        except RecursionError:
            self.blame(1, "too many jobs wait for one another in a row; submit them in several files")
        return done

    def _specs(self, entry: _Entry) -> list[messages.JobSpec]:
        try:
            if entry.count is None:
                return [build(entry.fields)]
            return [build(fields) for fields in array(entry.count, entry.fields)]
        except InvalidJobError as error:
            text = str(error).removeprefix("the job cannot be submitted: ")
            line, text = _place(entry, text)
            self.blame(line, text)
            return []


def _bare(text: Any) -> Any:
    """Without the lines."""
    value = text.value if isinstance(text, _Text) else text
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items()}
    return [_bare(item) for item in value] if isinstance(value, list) else value


def _word(value: Any) -> Any:
    """YAML reads some words of a command as numbers or truths: they are meant as they were written, as far as known."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _place(entry: _Entry, text: str) -> tuple[int, str]:
    """The line of the field that a message is about, and the message with its name in front."""
    match = _PATH.search(text)
    if match is None:
        words = re.findall(r"`(\w+)`", text)
        known = next((word for word in words if word in entry.lines), None)
        return (entry.lines[known] if known else entry.line), text
    name = re.split(r"[.\[]", match["path"], maxsplit=1)[0]
    return entry.lines.get(name, entry.line), f"{match['path']}: {text[: match.start()]}"
