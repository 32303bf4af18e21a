# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Generations: whole copies of a RAM layer's upper directory on disk, of which one is current.

    persist/generations/<n>/upper/            the tree; what did not change shares its inode with the one before
    persist/generations/<n>/manifest/         every name with its metadata and its content's digest (_ramlayer_manifest)
    persist/generations/<n>/generation.json   the manifest's parts and their digests, and what the tree amounts to
    persist/generations/.spare/               the generation that was pruned last: the next one is made of it
    persist/current -> generations/<n>        the commit point: one rename(2)

A generation is built under a hidden name (``.new-<n>``), written through (syncfs), named, and only then made current,
with each directory synced before the next step. A cut at any instant leaves ``current`` at a whole generation.

Making a tree of hard links costs a directory entry a name, however little changed. So the spare tree is brought up to
date instead: only the names that changed since are replaced in it. No inode that a generation holds is ever written to.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ._atomic import fsync_directory, write_atomic
from ._overlay import LayerError, entry_or_none, read_entry
from ._ramlayer_copy import Damaged, copy_content, digest, make, mend_directories, remove, sync_filesystem
from ._ramlayer_copy import apply as give_metadata
from ._ramlayer_manifest import FORMAT, Generation, Item, append, content, decode, encode, memory_needed, touched

Items = dict[str, Item]


@dataclass(frozen=True)
class Saved:
    """A sync's outcome: the current generation, whether it is a new one, and the bytes of files written for it.

    ``unsettled`` names what changed whenever it was read and was left as it was in the last generation (or out, when it
    is new), ``not_quiescent`` what a program has mapped for writing; both are looked at again by the next sync.
    """

    generation: Generation
    new: bool
    written: int = 0
    unsettled: tuple[str, ...] = ()
    not_quiescent: tuple[str, ...] = ()


class Draft:
    """A generation that is being made: files are staged, then the tree is put together."""

    def __init__(self, store: Store, number: int) -> None:
        self.store = store
        self.number = number
        self.folder = store.folder / f".new-{number}"
        self.recycled = False
        self.written = 0
        self._begun = False
        self._files = 0
        self._descriptor = -1

    def begin(self) -> None:
        """Make the folder, of the spare generation where there is one."""
        if self._begun:
            return
        make_durable(self.store.folder)
        # open before anything is written, so that syncfs reports each error of writing back since
        self._descriptor = os.open(self.store.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._begun = True
        self.store.clear_unfinished()
        spare = self.store.spare
        if self.store.record_in(spare) is not None:
            spare.rename(self.folder)
            self.recycled = True
        else:
            remove(str(spare))
            (self.folder / "upper").mkdir(mode=0o700, parents=True)
        (self.folder / "stage").mkdir(mode=0o700)

    def stage(self) -> str:
        """A name for a file's content."""
        self.begin()
        self._files += 1
        return f"{self.folder}/stage/{self._files}"

    def close(self) -> None:
        """Let go; raises nothing, what is left behind is cleared by the next sync."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def finish(
        self, wanted: Items, staged: Mapping[str, str], current: Generation | None, before: Items, record: Generation
    ) -> Generation:
        """Put the tree together, write all of it through, give it its name. Raises OSError, LayerError."""
        self.begin()
        changed = {path for path, item in wanted.items() if before.get(path) != item}
        removed = before.keys() - wanted.keys()
        self._arrange(wanted, staged, current, before, changed | removed)
        shutil.rmtree(self.folder / "stage")
        record = self._describe(wanted, current, changed, removed, record)
        sync_filesystem(self._descriptor)
        self.folder.rename(self.store.folder / str(self.number))
        os.fsync(self._descriptor)
        return record

    def _arrange(
        self, wanted: Items, staged: Mapping[str, str], current: Generation | None, before: Items, differs: set[str]
    ) -> None:
        top = f"{self.folder}/upper"
        last = None if current is None else f"{self.store.tree(current.number)}"
        names = {*self._behind(current, before), *differs} - {"."} if self.recycled else {*wanted} - {"."}
        for path in sorted(names, reverse=True):
            there = entry_or_none(f"{top}/{path}") if self.recycled else None
            if there is not None and not (there.kind == "dir" and path in wanted and wanted[path].kind == "dir"):
                remove(f"{top}/{path}")
        for path in sorted(names):
            item = wanted.get(path)
            if item is None:
                continue
            name = f"{top}/{path}"
            if item.kind != "file":
                if not (item.kind == "dir" and self.recycled and os.path.lexists(name)):
                    make(name, item)
            elif path in staged:
                os.rename(staged[path], name)  # noqa: PTH104 - as text
            elif item.link and item.link != path:
                self._link(f"{top}/{item.link}", name, item)
            else:
                self._link(f"{last}/{path}", name, item)
            made = read_entry(name)
            # the first nine are what both have; equal ones are the same state, the reverse does not hold
            if made[:9] != item[:9] and made.state != item.state and item.kind != "dir":
                raise LayerError(f"the copy of {path} differs: does {top} keep owners, device nodes and trusted.*?")
        folders = {path for path in names if path in wanted and wanted[path].kind == "dir"}
        folders |= {path.rpartition("/")[0] or "." for path in names} & wanted.keys() | {"."}
        mend_directories(Path(top), wanted, folders)

    def _behind(self, current: Generation | None, before: Items) -> set[str]:
        """Names in which the spare generation, of which this one is made, differs from the current one."""
        spare = self.store.record_in(self.folder)
        if spare is None:
            raise LayerError(f"{self.folder} lost its record while it was used")
        if current is not None and spare.chain == current.chain[: len(spare.chain)]:
            parts = self.store.parts(self.store.folder / str(current.number), current.chain[len(spare.chain) :])
            return {path for part in parts for path in touched(part)}
        try:
            items = decode(
                zip(self.store.parts(self.folder, spare.chain), (sha for _part, sha in spare.chain), strict=True)
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"the manifest of the spare generation is not whole: {error}") from error
        return {path for path in items.keys() | before.keys() if items.get(path) != before.get(path)}

    def _link(self, source: str, target: str, item: Item) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except FileNotFoundError as error:
            raise Damaged(f"{source} is missing") from error
        except OSError as error:
            if error.errno != errno.EMLINK:  # 65,000 on ext4
                raise
            copy_content(source, target)
            give_metadata(target, item)

    def _describe(
        self, wanted: Items, current: Generation | None, changed: set[str], removed: set[str], record: Generation
    ) -> Generation:
        """Write the manifest and the record; returns the record."""
        remove(str(self.folder / "manifest"))
        (self.folder / "manifest").mkdir(mode=0o700)
        chain = current.chain if current is not None else ()
        spent = current.appended if current is not None else 0
        more = len(changed) + len(removed)
        full = current is None or not append(len(chain), more, len(wanted), spent)
        if full:
            chain, spent, more = (), 0, 0
            part = encode(wanted, full=True)
        else:
            old = self.store.folder / str(current.number if current else 0) / "manifest"
            for name, _sha in chain:
                (self.folder / "manifest" / name).hardlink_to(old / name)
            part = encode({path: wanted[path] for path in changed}, removed, full=False)
        name = f"{self.number}.json"
        (self.folder / "manifest" / name).write_bytes(part)
        self.written += len(part)
        record = Generation(**{
            **asdict(record), "number": self.number, "entries": len(wanted), "content": content(wanted),
            "size": memory_needed(wanted), "appended": spent + more,
            "chain": (*chain, (name, hashlib.sha256(part).hexdigest())),
        })  # fmt: skip
        text = json.dumps({"version": FORMAT, **asdict(record)}, indent=2)
        write_atomic(self.folder / "generation.json", text + "\n", durable=False)
        return record


class Store:
    """The generations of one layer. ``name`` is the layer's, for messages."""

    def __init__(self, name: str, persist: Path) -> None:
        self.name = name
        self.persist = persist
        self.folder = persist / "generations"
        self.pointer = persist / "current"
        self.spare = self.folder / ".spare"

    def tree(self, number: int) -> Path:
        return self.folder / str(number) / "upper"

    def current_tree(self) -> Path:
        """The current generation's tree. Only while there is one."""
        return self.pointer / "upper"

    def numbers(self) -> list[int]:
        """Generations that have their name, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def read(self, number: int) -> Generation | None:
        """The record of a generation, or None when it is missing or damaged."""
        record = self.record_in(self.folder / str(number))
        return record if record is not None and record.number == number else None

    def record_in(self, folder: Path) -> Generation | None:
        """The record in a generation's folder, whatever the folder is called; None when missing or damaged."""
        try:
            record = json.loads((folder / "generation.json").read_text(encoding="utf-8"))
            if record.pop("version") != FORMAT:
                return None
            record["chain"] = tuple((str(name), str(sha)) for name, sha in record["chain"])
            return Generation(**{field.name: record[field.name] for field in fields(Generation)})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def parts(self, folder: Path, chain: tuple[tuple[str, str], ...]) -> Iterator[bytes]:
        """The parts of a manifest as they lie there. Raises OSError."""
        return ((folder / "manifest" / name).read_bytes() for name, _sha in chain)

    def items(self, number: int) -> Items | None:
        """A generation's content as its manifest says, or None when that is missing or damaged."""
        record = self.read(number)
        if record is None:
            return None
        try:
            parts = self.parts(self.folder / str(number), record.chain)
            return decode(zip(parts, (sha for _name, sha in record.chain), strict=True))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def current_number(self) -> int | None:
        """The number that ``current`` points to, whole or not; None when nothing was ever saved."""
        try:
            name = self.pointer.readlink().name
        except OSError:
            return None
        return int(name) if name.isdigit() else None

    def whole(self, number: int, *, deep: bool = False) -> Generation | None:
        """The record when the tree is what it promises, else None."""
        return None if self.damage(number, deep=deep) else self.read(number)

    def damage(self, number: int, *, deep: bool = False) -> str:
        """What is wrong with a generation, or an empty text. ``deep`` reads every file and compares its digest."""
        items = self.items(number)
        if items is None:
            return "its record or manifest is missing or damaged"
        tree = self.tree(number)
        for path, item in items.items():
            try:
                found = read_entry(tree / path)
                if found.state != item.state:
                    return f"{path} is not what was saved"
                if deep and item.kind == "file" and digest(tree / path) != item.digest:
                    return f"{path} has another content than was saved"
            except OSError as error:
                return f"{path}: {error.strerror}"
        return ""

    def candidates(self) -> list[int]:
        """What can be restored: the current generation, then the others of the present base, the newest first."""
        current = self.current_number()
        first = [] if current is None else [current]
        return [*first, *(number for number in reversed(self.restorable()) if number != current)]

    def newest_whole(self) -> Generation | None:
        """The current generation, or the newest whole one behind it; None when there is none. Looks at each name."""
        return next((found for found in map(self.whole, self.candidates()) if found is not None), None)

    def restorable(self) -> list[int]:
        """Numbers of generations that belong to the present base: the last merged one and those after it."""
        numbers = self.numbers()
        merged = [number for number in numbers if (record := self.read(number)) is not None and record.merged]
        return [number for number in numbers if not merged or number >= merged[-1]]

    def draft(self) -> Draft:
        """The generation after all that are there."""
        return Draft(self, max([*self.numbers(), self.current_number() or 0]) + 1)

    def begin_empty(self, root: Item, *, keep: int) -> Generation:
        """After a commit: a generation that holds only the root directory becomes current, all others go."""
        draft = self.draft()
        try:
            remove(str(self.spare))
            record = Generation(draft.number, time.time(), 0, 0, 0, merged=True)
            made = draft.finish({".": root._replace(born=draft.number)}, {}, None, {}, record)
            self.point_to(made.number)
        finally:
            draft.close()
        self.prune(keep)
        return made

    def point_to(self, number: int) -> None:
        """Switch ``current`` in one step that survives a cut."""
        temporary = self.persist / ".current"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"generations/{number}")
        temporary.rename(self.pointer)
        fsync_directory(self.persist)

    def prune(self, keep: int) -> None:
        """Remove all but the current generation and the newest ``keep - 1`` others that belong to the present base.

        The newest of those removed is kept as the spare. A generation that is half removed has no name any more.
        """
        current = self.current_number()
        restorable = self.restorable()
        others = [number for number in restorable if number != current]
        kept = {current, *others[len(others) - max(keep - 1, 0) :]}
        gone = [number for number in self.numbers() if number not in kept]
        if not gone:
            return
        remove(str(self.spare))
        for number in gone:
            last = number == gone[-1] and number in restorable
            (self.folder / str(number)).rename(self.spare if last else self.folder / f".old-{number}")
        self.clear_unfinished()

    def clear_unfinished(self) -> None:
        """Remove what a sync that was cut has left. Raises OSError."""
        for path in self.folder.iterdir():
            if path.name.startswith((".new-", ".old-")):
                shutil.rmtree(path)


def make_durable(folder: Path) -> None:
    """Make a directory and those above it, each name on the disk. Raises OSError."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)
