# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Having Proxmox VE call ``organism-hook``: the snippet, the storage that may hold snippets, and the option of each VM.

The option ``hookscript`` of a VM is set by ``qm`` as root, since only root@pam may (no API token can). What it was
before is kept twice: in the record of earlier state, to restore it, and in ``/etc/organism/hook.foreign``, where the
hook finds what to chain. On a host without ``qm`` only the settings are written.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _hook, _owned_files
from ._difference import Difference
from ._earlier import EarlierState, Kept
from ._host_files import FileWish
from ._root import Root
from ._systemd import Runner

CAPABILITY = "vm_hook"
NAME = "organism-hook"
QM = "/usr/sbin/qm"
CONFIGS = "/etc/pve/qemu-server"
STORAGES = "/etc/pve/storage.cfg"

SNIPPET_TEXT = """\
#!/bin/sh
# Managed by Ansible (organism.proxmox, vm_hook): changes made here are lost.
# Proxmox VE calls this as SNIPPET VMID PHASE; entries are in /etc/organism/hook.d/PHASE.
if [ -x /usr/local/sbin/organism-hook ]; then
    exec /usr/local/sbin/organism-hook "$@"
fi
echo "organism-hook is not installed on this node: run the role host_tools here, or qm set $1 --delete hookscript" >&2
# rules that cannot be asked are not kept: no start without them, everything else goes on
[ "$2" != pre-start ]
"""


class HookRefusedError(Exception):
    """The hook cannot be installed as wanted; the text names the object and the next step."""


@dataclass(frozen=True)
class Storage:
    """A storage with a folder on this node. ``content``: kinds that it may hold."""

    name: str
    path: str
    content: tuple[str, ...]

    @property
    def snippet(self) -> str:
        return f"{self.path}/snippets/{NAME}"

    @property
    def volume(self) -> str:
        return f"{self.name}:snippets/{NAME}"


@dataclass(frozen=True)
class Facts:
    """``hookscripts``: option of each VM of this node (None: not set), templates left out. ``storage`` None: no PVE."""

    hookscripts: Mapping[int, str | None]
    storage: Storage | None


def parse_storages(text: str) -> dict[str, Storage]:
    """Storages with a path in ``storage.cfg``: sections ``type: name``, indented ``key value`` lines."""
    found: dict[str, Storage] = {}
    name, values = "", dict[str, str]()
    for line in [*text.splitlines(), "end: "]:
        match = re.fullmatch(r"([a-z0-9]+):\s*(\S*)\s*", line)
        if match is None:
            key, _space, value = line.strip().partition(" ")
            values[key] = value.strip()
            continue
        if "path" in values:
            content = tuple(part.strip() for part in values.get("content", "").split(",") if part.strip())
            found[name] = Storage(name, values["path"].rstrip("/"), content)
        name, values = match[2], {}
    return found


def snippets(root: Root) -> list[str]:
    """Our snippets that lie on the storages of this node: each is started by Proxmox VE for VMs that name it."""
    storages = parse_storages(root.read_or_none(STORAGES) or "").values()
    return [storage.snippet for storage in storages if root.exists(storage.snippet)]


def hookscript_of(text: str) -> str | None:
    """The option in a VM's file, without its snapshots' sections."""
    match = re.search(r"^hookscript:\s*(\S+)\s*$", text.partition("\n[")[0], re.MULTILINE)
    return match[1] if match else None


def read(root: Root, storage: str) -> Facts:
    """What this host has. Raises HookRefusedError where Proxmox VE is there without that storage, OSError."""
    if not root.exists(QM):
        return Facts({}, None)
    text = root.read_or_none(STORAGES) or ""
    storages = parse_storages(text)
    if storage not in storages:
        known = ", ".join(sorted(storages)) or "none"
        raise HookRefusedError(f"{STORAGES} has no storage {storage} with a path; those with one: {known}")
    hookscripts = {}
    for name in root.listdir(CONFIGS):
        number, dot, _ending = name.partition(".conf")
        if number.isdigit() and dot:
            config = root.read(f"{CONFIGS}/{name}")
            if not re.search(r"^template:\s*1\s*$", config.partition("\n[")[0], re.MULTILINE):
                hookscripts[int(number)] = hookscript_of(config)
    return Facts(hookscripts, storages[storage])


@dataclass
class Plan:
    """``options``: VM to its hookscript (None: delete it). ``content``: what the storage shall hold, None: as it is.

    ``anew``: keys whose earlier value is another one now, since somebody has set the option again meanwhile.
    """

    difference: Difference = field(default_factory=Difference)
    files: _owned_files.FilePlan = field(default_factory=_owned_files.FilePlan)
    options: dict[int, str | None] = field(default_factory=dict)
    content: str | None = None
    storage: Storage | None = None
    remember: dict[str, Kept] = field(default_factory=dict)
    forget: list[str] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)
    chained: dict[int, str] = field(default_factory=dict)
    kept_by_others: list[dict[str, Any]] = field(default_factory=list)


def _vm_key(vmid: int) -> str:
    return f"vm:{vmid}:hookscript"


def _content_key(storage: Storage) -> str:
    return f"storage:{storage.name}:content"


def plan_present(
    root: Root, earlier: EarlierState, facts: Facts, vmids: Iterable[int], limits: _hook.Settings, run: Runner
) -> Plan:
    """From the present to: settings written, and just these VMs calling the hook.

    ``run`` is asked where a chained volume lies. Raises HookRefusedError, ValueError, CommandError, OSError.
    """
    wanted, storage = sorted(set(vmids)), facts.storage
    made = Plan(storage=storage)
    wishes = [FileWish(_hook.CONFIG, limits.text())]
    if storage is None and wanted:
        raise HookRefusedError(f"VM {wanted[0]}: this host has no {QM}, so no VM of Proxmox VE can be told of the hook")
    if storage is not None:
        if absent := [vmid for vmid in wanted if vmid not in facts.hookscripts]:
            raise HookRefusedError(f"VM {absent[0]} is not on this node, or is a template: {CONFIGS} does not have it")
        wishes.append(FileWish(storage.snippet, SNIPPET_TEXT, "0755"))
        if "snippets" not in storage.content:
            made.content = ",".join([*storage.content, "snippets"])
            before = ",".join(storage.content)
            made.difference.add(f"content of storage {storage.name}", before, made.content)
            made.remember[_content_key(storage)] = Kept(before, made.content)
        for vmid in wanted:
            wishes += _chain(root, earlier, facts, storage, vmid, made, run)
    _take_back(earlier, facts, made, keep=wanted)
    made.files = _owned_files.plan(root, earlier, wishes)
    _merge_files(made)
    return made


def _chain(
    root: Root, earlier: EarlierState, facts: Facts, storage: Storage, vmid: int, made: Plan, run: Runner
) -> list[FileWish]:
    """Set one VM's option; the record of its hookscript before."""
    key, now = _vm_key(vmid), facts.hookscripts[vmid]
    if now != storage.volume:
        made.options[vmid] = storage.volume
        made.difference.add(f"hookscript of VM {vmid}", now, storage.volume)
        made.remember[key] = Kept(now, storage.volume)
        if key in earlier.kept:
            made.anew.append(key)
        foreign = now
    else:
        foreign = earlier.kept[key].before if key in earlier.kept else None
    if foreign is None:
        return []
    made.chained[vmid] = foreign
    record = _hook.foreign_record(root, vmid)
    same = record is not None and record.get("volume") == foreign
    path = record["path"] if same and record is not None else run(["pvesm", "path", foreign]).strip()
    return [FileWish(_hook.foreign_path(vmid), _hook.foreign_text(foreign, path))]


def plan_absent(root: Root, earlier: EarlierState, facts: Facts) -> Plan:
    """Each VM has the hookscript of before, and no file is left. Raises OSError."""
    made = Plan(storage=facts.storage)
    _take_back(earlier, facts, made, keep=())
    if facts.storage is not None:
        key = _content_key(facts.storage)
        kept = earlier.kept.get(key)
        if kept is not None:
            now = ",".join(facts.storage.content)
            made.forget.append(key)
            if now == kept.set:
                made.content = str(kept.before)
                made.difference.add(f"content of storage {facts.storage.name}", now, kept.before)
            elif now != kept.before:
                _other(made, key, now)
    made.files = _owned_files.plan(root, earlier, [])
    _merge_files(made)
    return made


def _take_back(earlier: EarlierState, facts: Facts, made: Plan, keep: Iterable[int]) -> None:
    """Options of VMs that shall no longer call the hook."""
    staying = {_vm_key(vmid) for vmid in keep}
    for key, kept in earlier.kept.items():
        match = re.fullmatch(r"vm:(\d+):hookscript", key)
        if match is None or key in staying:
            continue
        vmid = int(match[1])
        made.forget.append(key)
        now = facts.hookscripts.get(vmid)
        if vmid in facts.hookscripts and now == kept.set:
            made.options[vmid] = kept.before
            made.difference.add(f"hookscript of VM {vmid}", now, kept.before)
        elif vmid in facts.hookscripts and now != kept.before:
            _other(made, f"hookscript of VM {vmid}", now)


def _merge_files(made: Plan) -> None:
    made.difference.merge(made.files.difference)
    for path, now in made.files.others.items():
        _other(made, path, now)


def _other(made: Plan, key: str, now: Any) -> None:
    made.kept_by_others.append({"key": key, "now": now, "reason": "somebody else has changed it since"})


def apply(root: Root, earlier: EarlierState, made: Plan, run: Runner) -> None:
    """Carry it out: what a VM calls is there before it is told to call it, and goes after.

    Raises CommandError, OSError.
    """
    ours = made.storage.volume if made.storage is not None else None
    back = {vmid: volume for vmid, volume in made.options.items() if volume != ours}
    if made.anew:
        earlier.forget(made.anew)
    earlier.remember(made.remember)
    _set_options(back, run)
    _owned_files.apply(root, earlier, made.files)
    _content(made, run)
    _set_options({vmid: volume for vmid, volume in made.options.items() if vmid not in back}, run)
    if made.forget:
        earlier.forget(made.forget)


def _set_options(options: Mapping[int, str | None], run: Runner) -> None:
    for vmid, volume in sorted(options.items()):
        run([QM, "set", str(vmid), *(["--hookscript", volume] if volume else ["--delete", "hookscript"])])


def _content(made: Plan, run: Runner) -> None:
    if made.content is not None and made.storage is not None:
        run(["pvesm", "set", made.storage.name, "--content", made.content])
