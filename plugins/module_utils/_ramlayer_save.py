# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One sync: what is in upper now, which of it is new, and the generation that is made of it.

What does not hold still while it is read stays as the last generation has it (or out, when it is new), is named in the
outcome, and is looked at again by the next sync.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ._overlay import Entry, LayerError, parent, scan, without_clean
from ._ramlayer_copy import Damaged, apply, clone_content, copy_content, digest, remove
from ._ramlayer_generations import Draft, Items, Saved, Store
from ._ramlayer_manifest import Generation, Item, item
from ._ramlayer_read import forgotten, settled
from ._ramlayer_seen import SLACK, Memory, Seen, clock, follow, same_clock, touched

_ROUNDS = 5
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Source:
    """What is saved, and where to. ``mapped`` tells the inodes of upper that a program may store into now; ``token``
    names this mount of the tmpfs, so that nothing is remembered from another one."""

    store: Store
    upper: Path
    base: Path
    memory: Memory
    token: str
    mapped: Callable[[], set[int]]


@dataclass
class _Look:
    """One look at upper. ``before`` are the current generation's items, ``suspects`` files to compare by content."""

    entries: dict[str, Entry]
    fresh: set[str]
    before: Items
    suspects: set[str]
    mapped: set[int]
    since: int
    promoted: dict[str, str]
    unsettled: set[str] = field(default_factory=set)
    moving: set[str] = field(default_factory=set)
    staged: dict[str, str] = field(default_factory=dict)
    read: dict[int, Item | None] = field(default_factory=dict)
    """By inode, of files with several names: what came of reading the first."""
    homes: dict[int, str] = field(default_factory=dict)
    """By inode: the name that a file had at the last sync."""


def save(source: Source, *, keep: int) -> Saved:
    """Make upper the current generation unless the current one equals it.

    Raises LayerError; then the generation that was current still is, and the unfinished one is gone.
    """
    store = source.store
    current = store.current_number()
    trust = True
    while True:
        draft = store.draft()
        try:
            return _attempt(source, draft, keep, trust)
        except (OSError, LayerError, Damaged) as error:
            left = _discard(draft.folder)
            full = isinstance(error, OSError) and error.errno in _FULL
            again = (trust and isinstance(error, Damaged)) or (full and (draft.recycled or store.spare.exists()))
            now = store.current_number()
            if now != current:  # what failed came after the commit: pruning
                text = f"generation {now} is saved and current, but the older ones could not be tidied up"
                raise LayerError(f"{store.name}: {text} in {store.persist}: {_why(error)}") from error
            if not again:
                kept = "nothing was saved before" if current is None else f"generation {current} stays current"
                raise LayerError(f"{store.name}: not saved to {store.persist}, {kept}: {_why(error)}{left}") from error
            # the spare generation is the first to go: for its room, or because what it was made of is damaged
            remove(str(store.spare))
            trust = trust and not isinstance(error, Damaged)
        finally:
            draft.close()


def _attempt(source: Source, draft: Draft, keep: int, trust: bool) -> Saved:
    store, number = source.store, source.store.current_number()
    record = None if number is None else store.read(number)
    since, ticks = time.time_ns() - SLACK, clock()
    mapped = source.mapped()
    seen = source.memory.head() if trust and record is not None else None
    if seen is not None and (
        (seen.token, seen.generation) != (source.token, number) or not same_clock(seen.clock, ticks)
    ):
        seen = None
    names = None if seen is None else touched(source.upper, seen.since)
    if seen is not None and record is not None and names is not None and not (names or mapped or seen.compare):
        return Saved(record, new=False)
    if seen is not None and (names is None or not source.memory.fill(seen)):
        seen = None
    look = _look(source, seen, names or set(), mapped, since)
    if seen is None:
        items = store.items(number) if trust and number is not None else None
        look.before, record = (items, record) if items is not None else ({}, None)
    wanted = _wanted(source, look, draft)
    outcome = Saved(
        record or Generation(0, 0, 0, 0, 0), False,
        unsettled=tuple(sorted(look.unsettled)), not_quiescent=tuple(sorted(_mapped_names(look) & wanted.keys())),
    )  # fmt: skip
    if record is None or wanted != look.before:
        outcome = _finish(source, draft, look, wanted, record, outcome, keep)
    else:
        _discard(draft.folder)
    compare = look.unsettled | _mapped_names(look)
    look.promoted = {
        path: known for path, known in look.promoted.items() if path in look.entries and path not in wanted
    }
    remembered = Seen(
        source.token, outcome.generation.number, since, ticks, compare, look.entries, wanted, look.promoted
    )
    try:
        source.memory.keep(remembered)
    except OSError:
        # the generation is there; without a memory the next sync looks at everything
        source.memory.forget()
    return outcome


def _finish(
    source: Source, draft: Draft, look: _Look, wanted: Items, record: Generation | None, outcome: Saved, keep: int
) -> Saved:
    made = Generation(draft.number, time.time(), 0, 0, 0, len(outcome.unsettled), len(outcome.not_quiescent))
    made = draft.finish(wanted, look.staged, record, look.before, made)
    source.store.point_to(made.number)
    source.store.prune(keep)
    return Saved(made, True, draft.written, outcome.unsettled, outcome.not_quiescent)


def _look(source: Source, seen: Seen | None, names: set[str], mapped: set[int], since: int) -> _Look:
    """All of upper, in one piece: a name that was moved while directories were read one after the other is not lost."""
    if seen is None:
        entries = scan(source.upper)
        look = _Look(entries, set(entries), {}, set(), mapped, since, {})
    else:
        entries, fresh = follow(source.upper, seen.entries, names)
        look = _Look(entries, fresh, seen.items, set(), mapped, since, seen.promoted)
        look.homes = {
            old.inode: path for path, old in seen.entries.items() if path in seen.items and old.kind == "file"
        }
    began = since
    for last in range(_ROUNDS):
        began, before = time.time_ns() - SLACK, began
        changed = touched(source.upper, before, directories=True)
        if not changed:
            break
        entries, fresh = follow(source.upper, look.entries, changed)
        look.fresh = {path for path in look.fresh | fresh if path in entries}
        if entries.keys() == look.entries.keys() and not any(entries[p].inode != look.entries[p].inode for p in fresh):
            look.entries = entries
            break
        look.entries = entries
        if last == _ROUNDS - 1:
            look.moving = changed
    look.suspects = {path for path in (seen.compare if seen else ()) if path in look.entries} | _mapped_names(look)
    return look


def _mapped_names(look: _Look) -> set[str]:
    if not look.mapped:
        return set()
    return {path for path, entry in look.entries.items() if entry.kind == "file" and entry.inode in look.mapped}


def _wanted(source: Source, look: _Look, draft: Draft) -> Items:
    """The content of the generation to be made. Copies what is new into the draft."""
    dirty = look.before.keys() & look.entries.keys()
    kept = without_clean(look.entries, source.base, fresh=look.fresh | look.suspects, dirty=dirty)
    changed = {path for path in _promoted(look, kept) if _differs_from_base(source, look, path)}
    if changed:
        kept = without_clean(look.entries, source.base, fresh=look.fresh, dirty=dirty | changed | kept.keys())
    wanted: Items = {}
    for path in sorted(kept):
        entry, old = kept[path], look.before.get(path)
        if old is not None and path not in look.fresh and path not in look.suspects:
            wanted[path] = old
        elif entry.kind != "file":
            found = item(entry, born=draft.number)
            wanted[path] = old if old is not None and found._replace(born=old.born).same_inode(old) else found
        else:
            read = _file(source, look, draft, path, entry)
            if read is not None:
                wanted[path] = read
    for path, old in look.before.items():
        # gone while names were moved about: it may have been moved to where the look had been already
        if path not in wanted and old.kind == "file" and parent(path) in look.moving and parent(path) in wanted:
            wanted[path] = old
            look.unsettled.add(path)
    return _linked(look, {path: found for path, found in wanted.items() if path == "." or parent(path) in wanted})


def _promoted(look: _Look, kept: dict[str, Entry]) -> list[str]:
    """Files that look as they do in base; their content may differ, and is compared when they appear or are touched."""
    return [path for path in look.fresh | look.suspects if path not in kept and look.entries[path].kind == "file"]


def _differs_from_base(source: Source, look: _Look, path: str) -> bool:
    name = f"{source.upper}/{path}"
    found = settled(name, lambda: digest(name), mapped=look.mapped, looked=look.since, known=look.entries[path])
    if found is None:
        return True
    if path not in look.promoted:
        look.promoted[path] = digest(source.base / path)
    return found[1] != look.promoted[path]


def _file(source: Source, look: _Look, draft: Draft, path: str, entry: Entry) -> Item | None:
    """A file's item, its content staged when it is new here; None when it must be left out."""
    if entry.links == 1:
        return _read(source, look, draft, path, entry)
    if entry.inode not in look.read:
        look.read[entry.inode] = _read(source, look, draft, path, entry)
    return look.read[entry.inode]


def _read(source: Source, look: _Look, draft: Draft, path: str, entry: Entry) -> Item | None:
    name = f"{source.upper}/{path}"
    home = path if path in look.before else look.homes.get(entry.inode, path)
    old = look.before.get(home)
    old = old if old is not None and old.kind == "file" else None
    if old is not None and (old.size, old.mtime_ns) == (entry.size, entry.mtime_ns):
        found = settled(name, lambda: digest(name), mapped=look.mapped, looked=look.since, known=entry)
        if found is not None and found[1] == old.digest:
            made = item(found[0], digest=old.digest, born=draft.number)
            if made._replace(born=old.born).same_inode(old):
                return _reused(source, look, draft, path, home)
            # only its metadata is new: where blocks can be shared, its content is not written again
            target = draft.stage()
            if clone_content(source.store.current_tree() / home, target):
                apply(target, made)
                return _staged(look, path, found[0], made, target)
    target = draft.stage()
    copies = 0

    def copy() -> str:
        nonlocal copies
        copies += 1
        if copies > 1:
            forgotten(target)
        return copy_content(name, target, entry if copies == 1 else None)

    found = settled(name, copy, mapped=look.mapped, looked=look.since, known=entry)
    if found is not None:
        draft.written += found[0].size
        made = item(found[0], digest=found[1], born=draft.number)
        if copies > 1:  # the entry that the first copy was made like has not held
            apply(target, made)
        return _staged(look, path, found[0], made, target)
    forgotten(target)
    look.unsettled.add(path)
    return None if old is None else _reused(source, look, draft, path, home)


def _staged(look: _Look, path: str, entry: Entry, made: Item, target: str) -> Item:
    look.staged[path] = target
    look.entries[path] = entry
    return made


def _reused(source: Source, look: _Look, draft: Draft, path: str, home: str) -> Item:
    """What the current generation has under ``home``, under a name that may be another."""
    old = look.before[home]
    if path != home:
        target = draft.stage()
        try:
            os.link(source.store.current_tree() / home, target, follow_symlinks=False)
        except FileNotFoundError as error:
            raise Damaged(f"{home} is missing in the current generation") from error
        look.staged[path] = target
    return old


def _linked(look: _Look, wanted: Items) -> Items:
    """The items with the user's hard links named: by the inode in upper, and only where both are one file here."""
    first: dict[int, str] = {}
    several: set[int] = set()
    for path, found in wanted.items():
        entry = look.entries.get(path)
        if found.kind == "file" and entry is not None and entry.links > 1:
            leader = first.setdefault(entry.inode, path)
            if leader != path and found.same_inode(wanted[leader]):
                several.add(entry.inode)
    made: Items = {}
    for path, found in wanted.items():
        entry = look.entries.get(path)
        link = ""
        if found.kind == "file" and entry is not None and entry.inode in several:
            leader = first[entry.inode]
            link = leader if found.same_inode(wanted[leader]) else ""
        made[path] = found if found.link == link else found._replace(link=link)
    return made


def _discard(folder: Path) -> str:
    """Remove an unfinished generation; what cannot be removed is told, and the next save tries again."""
    try:
        remove(str(folder))
    except OSError as error:
        return f"; {folder} is left behind ({error.strerror})"
    return ""


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"no space left on the disk; free some, or lower KEEP_GENERATIONS ({error})"
    return str(error)
