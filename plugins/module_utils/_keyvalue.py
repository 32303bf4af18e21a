# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings files of the form ``KEY=VALUE``: one schema says each key's type, default, limits and help.

The dialect is the part that a shell's ``.`` and systemd's ``EnvironmentFile=`` read alike: one assignment a line,
comments and blank lines between them, a value bare or in one pair of quotes, nothing expanded. What they would read
differently (``export``, a comment behind a value, an open quote, a dollar) is refused: a file means one thing to all.

    SCHEMA = Schema("gpucache", [Key("CACHE_MB", "integer", 500, "Size of a GPU's cache in MiB.", minimum=16), ...])
    settings = SCHEMA.load(Root(), "/etc/gpucache/gpucache.conf")   # SettingsError: every bad line, with its number
    settings.integer("CACHE_MB")
    text = SCHEMA.render(SCHEMA.coerce({"CACHE_MB": 256}))          # the file, with help and defaults as comments

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ._root import Root

Value: TypeAlias = "str | int | float | bool | list[str]"

KINDS = ("text", "integer", "number", "boolean", "list", "path", "choice")
_TRUE = frozenset({"yes", "true", "on", "1"})
_FALSE = frozenset({"no", "false", "off", "0"})
_NAME = re.compile(r"[A-Z][A-Z0-9_]*\Z")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)=(.*)\Z", re.DOTALL)
# what can stand bare and mean itself to a shell and to systemd
_BARE = re.compile(r"[A-Za-z0-9_@%+=:,./-]*\Z")


class SettingsError(ValueError):
    """One or more settings that must not be used; ``problems`` has a line each, fit to be printed as it is."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True)
class Key:
    """One setting.

    ``kind``: ``text``, ``integer``, ``number``, ``boolean`` (written yes/no), ``list`` (comma-separated), ``path``
    (absolute, or empty when ``optional``), ``choice`` (one of ``choices``). ``words`` are texts allowed in place of a
    number (``auto``). ``pattern`` must match a whole text, or each item of a list. ``help`` says what it does and in
    which unit.
    """

    name: str
    kind: str
    default: Value
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    pattern: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ValueError(f"a key is written in capitals, digits and underscores, not {self.name!r}")
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: unknown kind {self.kind!r}, use one of {', '.join(KINDS)}")
        if (self.kind == "choice") != bool(self.choices):
            raise ValueError(f"{self.name}: choices belong to the kind 'choice', and only to it")
        self.check(self.default)

    def read(self, text: str) -> Value:
        """The typed value of a text. Raises ValueError that says what is expected."""
        if self.kind == "boolean":
            lowered = text.lower()
            if lowered not in _TRUE | _FALSE:
                raise ValueError(f"expects yes or no, not {text!r}")
            return lowered in _TRUE
        if self.kind == "list":
            return self.check([item.strip() for item in text.split(",") if item.strip()])
        if self.kind in ("integer", "number") and text not in self.words:
            return self.check(self._number(text))
        return self.check(text)

    def _number(self, text: str) -> int | float:
        try:
            return int(text, 10) if self.kind == "integer" else float(text)
        except ValueError:
            raise ValueError(f"expects {self._expected()}, not {text!r}") from None

    def _expected(self) -> str:
        return " or ".join(["a whole number" if self.kind == "integer" else "a number", *self.words])

    def check(self, value: object) -> Value:
        """The value if it is of the key's type and within its limits. Raises ValueError that says what is expected."""
        if self.kind == "boolean":
            if not isinstance(value, bool):
                raise ValueError(f"expects yes or no, not {value!r}")
            return value
        if self.kind in ("integer", "number"):
            return self._check_number(value)
        if self.kind == "list":
            if not isinstance(value, list | tuple):
                raise ValueError(f"expects a list, not {value!r}")
            items = [self._check_text(item) for item in value]
            for item in items:
                if "," in item or item != item.strip() or not item:
                    raise ValueError(f"item {item!r} of the list must be one word without a comma")
            return items
        return self._check_text(value)

    def _check_number(self, value: object) -> Value:
        if isinstance(value, str) and value in self.words:
            return value
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "integer" else int | float):
            raise ValueError(f"expects {self._expected()}, not {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"expects a finite number, not {value!r}")
        if self.minimum is not None and value < self.minimum:
            raise ValueError(f"is {value}, the least is {self.minimum:g}")
        if self.maximum is not None and value > self.maximum:
            raise ValueError(f"is {value}, the most is {self.maximum:g}")
        return value

    def _check_text(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"expects text, not {value!r}")
        if any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise ValueError("must be one line without control characters")
        if self.choices and value not in self.choices:
            raise ValueError(f"expects one of {', '.join(self.choices)}, not {value!r}")
        if self.kind == "path" and not value.startswith("/") and not (self.optional and value == ""):
            raise ValueError(f"expects an absolute path, not {value!r}")
        if self.pattern is not None and not (self.optional and value == "") and not re.fullmatch(self.pattern, value):
            raise ValueError(f"{value!r} does not match {self.pattern}")
        return value

    def write(self, value: Value) -> str:
        """The text after the equals sign, quoted where it has to be."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        text = ",".join(value) if isinstance(value, list) else str(value)
        if _BARE.match(text):
            return text
        if "'" not in text:
            return f"'{text}'"
        if not set(text) & set('"\\$`'):
            return f'"{text}"'
        raise ValueError(f"{self.name}: {text!r} mixes quotes that a KEY=VALUE file cannot carry")


class Settings(Mapping[str, Value]):
    """Checked settings of one schema; compare, iterate and index them like a dictionary."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Settings({self._values!r})"

    def text(self, name: str) -> str:
        return str(self._values[name])

    def integer(self, name: str) -> int:
        """A whole number. Raises TypeError when a word such as ``auto`` stands there: ask for ``self[name]`` first."""
        value = self._values[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, not a whole number")
        return value

    def number(self, name: str) -> float:
        value = self._values[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r}, not a number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._values[name]
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, not yes or no")
        return value

    def words(self, name: str) -> list[str]:
        """The items of a list."""
        value = self._values[name]
        if not isinstance(value, list):
            raise TypeError(f"{name} is {value!r}, not a list")
        return list(value)


class Schema:
    """All keys of one settings file, in the order in which it shows them.

    ``checks`` look at the whole and yield a text for each contradiction between keys (``"A is above B"``).
    """

    def __init__(
        self, title: str, keys: Iterable[Key], checks: Iterable[Callable[[Settings], Iterable[str]]] = ()
    ) -> None:
        self.title = title
        self.keys = {key.name: key for key in keys}
        self.checks = tuple(checks)

    def defaults(self) -> Settings:
        return Settings({name: key.default for name, key in self.keys.items()})

    def parse(self, text: str, where: str = "settings") -> Settings:
        """Settings of a file's text, defaults for what it does not name. Raises SettingsError with ``where:line``."""
        values: dict[str, Value] = {}
        seen: dict[str, int] = {}
        problems: list[str] = []
        for number, line in enumerate(text.split("\n"), start=1):
            stripped = line.strip()
            if not stripped or stripped.startswith(("#", ";")):
                continue
            try:
                name, raw = _split(line.rstrip("\r"))
                key = self._known(name)
                if name in seen:
                    raise ValueError(f"{name} is already set in line {seen[name]}; keep one of the two")
                seen[name] = number
                values[name] = _named(name, key.read, _unquote(raw))
            except ValueError as error:
                problems.append(f"{where}:{number}: {error}")
        return self._whole(values, problems, where)

    def load(self, root: Root, path: str) -> Settings:
        """Settings of a file. Raises SettingsError, or OSError when it cannot be read."""
        return self.parse(root.read(path), path)

    def coerce(self, given: Mapping[str, object], where: str = "settings") -> Settings:
        """Settings from typed values or texts (a module's arguments), defaults for the rest. Raises SettingsError."""
        values: dict[str, Value] = {}
        problems: list[str] = []
        for name, value in given.items():
            try:
                key = self._known(name)
                textual = isinstance(value, str) and key.kind in ("boolean", "integer", "number", "list")
                values[name] = _named(name, key.read, str(value)) if textual else _named(name, key.check, value)
            except ValueError as error:
                problems.append(f"{where}: {error}")
        return self._whole(values, problems, where)

    def render(self, settings: Mapping[str, Value], header: Iterable[str] = ()) -> str:
        """The file: every key with its help and default as a comment. ``parse`` of it gives the same settings."""
        lines = [f"# {line}" for line in header]
        for name, key in self.keys.items():
            about = "".join(f", {word}" for word in (*key.words, *key.choices))
            shown = key.write(key.default) or "(empty)"
            lines += ["", *(f"# {line}" for line in key.help.splitlines()), f"# {key.kind}{about}; default {shown}"]
            lines.append(f"{name}={key.write(settings.get(name, key.default))}")
        return "\n".join(lines).lstrip("\n") + "\n"

    def _known(self, name: str) -> Key:
        key = self.keys.get(name)
        if key is None:
            near = difflib.get_close_matches(name.upper(), self.keys, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(self.keys)}"
            raise ValueError(f"{self.title} has no setting {name}{hint}")
        return key

    def _whole(self, values: dict[str, Value], problems: list[str], where: str) -> Settings:
        settings = Settings({name: values.get(name, key.default) for name, key in self.keys.items()})
        if not problems:
            problems = [f"{where}: {problem}" for check in self.checks for problem in check(settings)]
        if problems:
            raise SettingsError(problems)
        return settings


def _named(name: str, convert: Callable[..., Value], value: object) -> Value:
    try:
        return convert(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _split(line: str) -> tuple[str, str]:
    match = _ASSIGNMENT.match(line)
    if match is None:
        raise ValueError(f"expected KEY=VALUE (no blanks around the equals sign, no 'export'), found {line.strip()!r}")
    return match.group(1), match.group(2).strip()


def _unquote(raw: str) -> str:
    if raw[:1] in ("'", '"'):
        quote, body = raw[0], raw[1:]
        end = body.find(quote)
        if end == -1:
            raise ValueError(f"the quote opened in {raw!r} is not closed")
        if body[end + 1 :].strip():
            raise ValueError(f"nothing may follow the closing quote in {raw!r}; put comments on lines of their own")
        body = body[:end]
        if quote == '"' and set(body) & set("\\$`"):
            raise ValueError(f"\\, $ and ` are read differently by shells and systemd in {raw!r}; use single quotes")
        return body
    if re.search(r"\s#", raw):
        raise ValueError(f"a comment behind a value is not read by systemd; put it on a line of its own: {raw!r}")
    if set(raw) & set("'\"\\$`"):
        raise ValueError(f"quote the whole value: {raw!r}")
    return raw
