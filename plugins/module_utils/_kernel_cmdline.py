# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A kernel command line: its parameters by key, what of it the kernel will heed, and the same line with some replaced.

The rules are those of ``next_arg()`` in the kernel's lib/cmdline.c and ``parse_args()`` in kernel/params.c: blanks
separate, double quotes protect blanks, the first ``=`` ends the key, ``-`` and ``_`` are one letter in keys, and what
follows a lone ``--`` belongs to init.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLANKS = " \t\n\v\f\r"

HUGEPAGES = "hugepages"
_HUGEPAGE_KEYS = ("hugepagesz", "hugepages")

FIRST_WINS = frozenset({"isolcpus", "nohz_full"})
"""housekeeping_setup() (kernel/sched/isolation.c) refuses a second list that differs; elsewhere the last one wins."""

ALL_COUNT = frozenset({"console", "earlycon", "memmap", "mem", "ip", "blacklist", "module_blacklist", HUGEPAGES})
"""Parameters of which each occurrence has an effect of its own."""

NEVER_OURS = frozenset({"root", "initrd", "boot_image", "init", "ro", "rw"})
"""What finds the system that boots: no tuning replaces it."""

FOREIGN = {
    "kthread_cpus": "neither mainline nor Proxmox kernels know it, and nohz_full already keeps kernel threads off"
}
"""Parameters that how-tos set and ordinary kernels do not have."""

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VALUE = re.compile(r"[A-Za-z0-9_.,:=/@%+!~^-]*")


class CmdlineError(ValueError):
    """A token that cannot be put on a command line; the text names it and says why."""


@dataclass(frozen=True)
class Token:
    """One parameter: ``text`` as it is written, ``key`` and ``value`` as the kernel sees them (None: a bare word)."""

    text: str
    key: str
    value: str | None

    @property
    def group(self) -> str:
        return group_of(self.key)


@dataclass(frozen=True)
class Cmdline:
    """``init``: the raw text from a lone ``--`` on, empty without one."""

    tokens: tuple[Token, ...]
    init: str = ""

    def render(self) -> str:
        return " ".join([*(token.text for token in self.tokens), *([self.init] if self.init else [])])

    def of(self, group: str) -> tuple[Token, ...]:
        return tuple(token for token in self.tokens if token.group == group)

    def has_root(self) -> bool:
        """Does it name the root file system? Without that a boot ends in an emergency shell."""
        return any(token.key == "root" and token.value for token in self.tokens)


def fold(key: str) -> str:
    """A key as the kernel compares it (parameq(): ``-`` is ``_``)."""
    return key.replace("-", "_")


def group_of(key: str) -> str:
    """The name under which a key is replaced: itself, but page sizes and counts only make sense together."""
    folded = fold(key)
    return HUGEPAGES if folded in _HUGEPAGE_KEYS else folded


def members(group: str) -> tuple[str, ...]:
    """The folded keys of a group."""
    return _HUGEPAGE_KEYS if group == HUGEPAGES else (group,)


def _words(line: str) -> list[str]:
    words: list[str] = []
    current, quoted = "", False
    for char in line:
        if char in BLANKS and not quoted:
            if current:
                words.append(current)
            current = ""
            continue
        quoted ^= char == '"'
        current += char
    return [*words, current] if current else words


def token(word: str) -> Token:
    """What the kernel makes of one word of the line (next_arg())."""
    whole = word.startswith('"')
    inner = word[1:] if whole else word
    split = inner.find("=", 1)  # a word that begins with "=" has no key that ends there
    if split < 0:
        return Token(word, inner[:-1] if whole and inner.endswith('"') else inner, None)
    key, value = inner[:split], inner[split + 1 :]
    opened = value.startswith('"')
    if opened:
        value = value[1:]
    if (opened or whole) and value.endswith('"'):
        value = value[:-1]
    return Token(word, key, value)


def parse(line: str) -> Cmdline:
    """The parameters of a command line, in order."""
    words = _words(line)
    found: list[Token] = []
    for number, word in enumerate(words):
        seen = token(word)
        if seen.key == "--" and seen.value is None:
            return Cmdline(tuple(found), " ".join(words[number:]))
        found.append(seen)
    return Cmdline(tuple(found))


def effective(tokens: Sequence[Token], group: str) -> tuple[str, ...]:
    """What counts of a group, in a form to compare: ``key=value`` without quotes, or the bare key."""
    found = [f"{fold(t.key)}={t.value}" if t.value is not None else fold(t.key) for t in tokens if t.group == group]
    if group in ALL_COUNT or not found:
        return tuple(found)
    return (found[0],) if group in FIRST_WINS else (found[-1],)


def replace(line: Cmdline, wanted: Mapping[str, Sequence[str]]) -> Cmdline:
    """The line with the parameters of each group replaced by words (none: removed).

    They take the place of the first one of the group that was there, else the end, before what belongs to init.
    """
    out: list[Token] = []
    placed: set[str] = set()
    for seen in line.tokens:
        if seen.group not in wanted:
            out.append(seen)
        elif seen.group not in placed:
            placed.add(seen.group)
            out.extend(token(word) for word in wanted[seen.group])
    for group, words in wanted.items():
        if group not in placed:
            out.extend(token(word) for word in words)
    return Cmdline(tuple(out), line.init)


def same_tokens(one: str, other: str) -> bool:
    """Do two lines have the same words, in whatever order?"""
    return sorted(_words(one)) == sorted(_words(other))


def _word(key: str, value: Any) -> str:
    if isinstance(value, bool):
        raise CmdlineError(f"{key}: write the value as text ('on', '1'), the kernel knows no booleans")
    text = str(value)
    if not _VALUE.fullmatch(text):
        bad = sorted(set(re.sub(_VALUE, "", text)))
        raise CmdlineError(f"{key}={text}: {' '.join(map(repr, bad))} would be read by the boot loader, not the kernel")
    return f"{key}={text}"


def _check_key(key: str, accept: Iterable[str]) -> None:
    if not _KEY.fullmatch(key):
        raise CmdlineError(f"{key!r} is not the name of a kernel parameter")
    if fold(key).lower() in NEVER_OURS:
        raise CmdlineError(f"{key} finds the system that boots and is not for tuning; set it where the host was set up")
    if fold(key) in FOREIGN and fold(key) not in {fold(known) for known in accept}:
        raise CmdlineError(f"{key}: {FOREIGN[fold(key)]}; leave it out, or name it in accept_unknown")


def wanted_words(
    tokens: Mapping[str, Any], flags: Iterable[str] = (), accept: Iterable[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Words by group from a declaration, checked. Raises CmdlineError.

    A value is text or a number; None removes the parameter; a list repeats it; ``hugepages`` also takes a mapping of
    page size to count (``{"1G": 8, "2M": 512}``), which becomes pairs in that order.
    """
    accept = tuple(accept)
    found: dict[str, list[str]] = {}
    for key, value in [*tokens.items(), *((flag, ...) for flag in flags)]:
        _check_key(key, accept)
        words = found.setdefault(group_of(key), [])
        if value is None:
            continue
        if value is ...:
            words.append(key)
        elif isinstance(value, Mapping):
            if fold(key) != HUGEPAGES:
                raise CmdlineError(f"{key}: only hugepages takes a mapping (page size to count)")
            for size, count in value.items():
                words += [_word("hugepagesz", size), _word("hugepages", count)]
        else:
            words += [_word(key, each) for each in (value if isinstance(value, list | tuple) else [value])]
    for group, words in found.items():
        if len(words) > 1 and group not in ALL_COUNT:
            raise CmdlineError(f"{' '.join(words)}: the kernel heeds one of them only")
    return {group: tuple(words) for group, words in found.items()}


def pending(groups: Iterable[str], live: Cmdline, coming: Cmdline) -> list[dict[str, str | None]]:
    """Parameters that the running kernel has otherwise than the next boot will: ``live`` and ``coming`` as text."""
    waiting = []
    for group in dict.fromkeys(groups):
        now, then = effective(live.tokens, group), effective(coming.tokens, group)
        if now != then:
            waiting.append({"key": group, "live": " ".join(now) or None, "coming": " ".join(then) or None})
    return waiting


def boot_file_line(proc_cmdline: str) -> str:
    """A first /etc/kernel/cmdline made of /proc/cmdline, as proxmox-boot-tool does: without what the loader adds."""
    line = parse(proc_cmdline)
    return replace(line, {"initrd": (), "BOOT_IMAGE": ()}).render()
