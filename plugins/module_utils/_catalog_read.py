# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values with the line that they stand on, and the checks that name this line; pure.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Lined:
    """A value of a YAML file. ``value``: a scalar, a dict of Lined by name, or a list of Lined. ``line``: from 1."""

    value: object
    line: int


@dataclass(frozen=True)
class Problem:
    """``where``: the path in the file, as ``vms.llm.memory_gb``."""

    line: int
    where: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.where}: {self.text}" if self.where else f"line {self.line}: {self.text}"


@dataclass
class Notes:
    """What was found wrong (``problems``), and what is worth knowing (``remarks``)."""

    problems: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)

    def wrong(self, line: int, where: str, text: str) -> None:
        if (found := Problem(line, where, text)) not in self.problems:  # a default is looked at for each VM
            self.problems.append(found)

    def remark(self, line: int, where: str, text: str) -> None:
        self.remarks.append(Problem(line, where, text))


@dataclass(frozen=True)
class Section:
    """A mapping of the file, whose keys are taken one by one. What does not fit is noted, and the default is given."""

    items: dict[str, Lined]
    line: int
    where: str
    notes: Notes

    @classmethod
    def of(cls, lined: Lined | None, where: str, notes: Notes, keys: Collection[str] | None = None) -> Section:
        """``keys``: the names that may be there; None for any."""
        if lined is None or lined.value is None:
            return cls({}, lined.line if lined else 1, where, notes)
        if not isinstance(lined.value, dict):
            notes.wrong(lined.line, where, f"it takes names and values, not {_kind(lined.value)}")
            return cls({}, lined.line, where, notes)
        found = cls(lined.value, lined.line, where, notes)
        for name, each in found.items.items():
            if keys is not None and name not in keys:
                close = difflib.get_close_matches(name, keys, 1)
                meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(keys))}"
                notes.wrong(each.line, found.path(name), f"there is no such key; {meant}")
        return found

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where and name else self.where or name

    def line_of(self, name: str) -> int:
        return self.items[name].line if name in self.items else self.line

    def has(self, name: str) -> bool:
        return name in self.items and self.items[name].value is not None

    def wrong(self, name: str, text: str) -> None:
        self.notes.wrong(self.line_of(name), self.path(name), text)

    def section(self, name: str, keys: Collection[str] | None = None) -> Section:
        return (
            Section.of(self.items.get(name), self.path(name), self.notes, keys)
            if name in self.items
            else Section({}, self.line, self.path(name), self.notes)
        )

    def sections(self, name: str, keys: Collection[str]) -> Iterator[Section]:
        """Each entry of a list of mappings."""
        for place, each in enumerate(self._list(name)):
            yield Section.of(each, f"{self.path(name)}[{place}]", self.notes, keys)

    def named(self, name: str, keys: Collection[str]) -> Iterator[tuple[str, Section]]:
        """Each entry of a mapping of mappings."""
        for entry, each in self.section(name).items.items():
            yield entry, Section.of(each, f"{self.path(name)}.{entry}", self.notes, keys)

    def _list(self, name: str) -> list[Lined]:
        lined = self.items.get(name)
        if lined is None or lined.value is None:
            return []
        if isinstance(lined.value, list):
            return lined.value
        self.wrong(name, f"it takes a list, not {_kind(lined.value)}")
        return []

    def words(self, name: str) -> list[Lined]:
        """A list of words, each with its line."""
        found = []
        for each in self._list(name):
            if isinstance(each.value, str):
                found.append(each)
            else:
                self.notes.wrong(each.line, self.path(name), f"it takes words, not {_kind(each.value)}; use quotes")
        return found

    def text(self, name: str, default: str = "", pattern: str = "", example: str = "") -> str:
        """A word; with ``pattern`` it must match as a whole."""
        if not self.has(name):
            return default
        value = self.items[name].value
        if isinstance(value, (dict, list, bool)):
            self.wrong(name, f"it takes a word, not {_kind(value)}")
            return default
        if pattern and not re.fullmatch(pattern, str(value)):
            self.wrong(name, f"{str(value)!r} does not fit" + (f"; write it like {example}" if example else ""))
            return default
        return str(value)

    def number(self, name: str, default: int, low: int = 0, high: int = 2**31) -> int:
        if not self.has(name):
            return default
        value = self.items[name].value
        if isinstance(value, bool) or not isinstance(value, int):
            self.wrong(name, f"it takes a whole number, not {value!r}")
            return default
        if not low <= value <= high:
            self.wrong(name, f"{value} is not between {low} and {high}")
            return default
        return value

    def switch(self, name: str, default: bool) -> bool:
        if not self.has(name):
            return default
        value = self.items[name].value
        if isinstance(value, bool):
            return value
        self.wrong(name, f"it takes true or false, not {value!r}")
        return default


def plain(lined: Lined) -> object:
    """The value without lines."""
    if isinstance(lined.value, dict):
        return {name: plain(each) for name, each in lined.value.items()}
    if isinstance(lined.value, list):
        return [plain(each) for each in lined.value]
    return lined.value


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "names and values"
    if isinstance(value, list):
        return "a list"
    return repr(value)
