# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Brings a VM to what is wished for: read, plan, send under the digest, and read back what waits for a cold start.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _pve_find, _pve_gpus, _pve_vm_check, _pve_vm_live, _pve_vm_plan, _pve_vm_root
from ._difference import Difference
from ._pve_client import Pve, PveError, PveRefused, PveStaleDigest, PveTaskFailed
from ._pve_find import Vm
from ._pve_tasks import is_upid
from ._pve_vm_check import PciMapping
from ._pve_vm_plan import ConfigPlan, Wish, WishRefused

STALE_TRIES = 4
"""How often a change is planned anew when somebody else was faster."""


@dataclass(frozen=True)
class Clone:
    """The VM or template that a new VM is made from."""

    vmid: int | None = None
    name: str | None = None
    full: bool = True
    storage: str | None = None
    snapshot: str | None = None


@dataclass(frozen=True)
class Gpus:
    """PCI mappings that the VM has; see `_pve_gpus.plan`."""

    mappings: tuple[str, ...] = ()
    options: Mapping[str, str | None] = field(default_factory=dict)
    owned_prefix: str = ""
    pending: Mapping[str, PciMapping] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """``wishes``: what holds always; ``create``: for a new VM besides; ``secrets``: the same, never shown."""

    vmid: int | None = None
    name: str | None = None
    node: str | None = None
    wishes: Mapping[str, Wish] = field(default_factory=dict)
    create: Mapping[str, Wish] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    owned: Mapping[str, Wish] = field(default_factory=dict)
    """What holds for a VM that was made here, which ``owned_tag`` tells."""
    owned_tag: str = ""
    only_existing: bool = False
    expect_name: str = ""
    """A VM of another name that is not ours is somebody else's, whatever its id."""
    clone: Clone | None = None
    gpus: Gpus | None = None
    pool: str | None = None
    task_timeout: float = 600.0
    root: Pve | None = None
    """Who sets what only root@pam may, where the connection is not root@pam's. Nobody: such a change is refused."""


@dataclass
class Outcome:
    """``live`` and ``waiting``: options of this change; ``cold_start``: options that wait, whoever changed them."""

    vm: Vm
    difference: Difference
    created: bool = False
    live: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    cold_start: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


def converge(pve: Pve, request: Request, *, check: bool) -> Outcome:
    """Create or change the VM. Raises PveError and WishRefused; before anything was changed unless the text says so."""
    found = _pve_find.vm(pve, request.vmid, request.name, request.node)
    if found.exists:
        return _update(pve, request, found, request.wishes, check=check)
    if request.only_existing:
        return Outcome(found, Difference())
    if found.vmid == 0:
        found = Vm(int(pve.get("/cluster/nextid")), found.node, name=found.name)
    return _create(pve, request, found, check=check)


def _update(pve: Pve, request: Request, vm: Vm, wishes: Mapping[str, Wish], *, check: bool) -> Outcome:
    attempt = 0
    whole: ConfigPlan | None = None  # of which the ordinary part is sent and root's is not
    while True:
        attempt += 1
        config = dict(pve.get(f"{vm.path}/config"))
        digest = config.pop("digest", None)
        _refuse_stranger(request, vm, config)
        made, warnings = _planned(pve, request, vm, config, _named(request, config, wishes), digest)
        shown = whole or made
        outcome = Outcome(vm, shown.difference, warnings=warnings, kept=shown.kept)
        if check or not made:
            return _predicted(pve, outcome, made, config) if check else _read_back(pve, outcome, shown)
        sender, now = _pve_vm_root.way(pve, request.root, config, made)
        try:
            _send(sender, request, vm, now, digest)
        except (PveStaleDigest, PveTaskFailed) as error:
            if not _stale(error):
                raise
            if attempt == STALE_TRIES:
                raise PveStaleDigest(
                    f"{vm}: somebody else changed its configuration {STALE_TRIES} times while this change was planned; "
                    "nothing of it was applied. Find out who does (pvesh get /cluster/tasks) and repeat",
                    path=f"{vm.path}/config",
                ) from error
        else:
            if now is made:
                return _read_back(pve, outcome, shown)
            whole, attempt = shown, 0


def _named(request: Request, config: Mapping[str, Any], wishes: Mapping[str, Wish]) -> dict[str, Wish]:
    """All that holds for an existing VM: found by its id it gets the name, and one of ours what holds for ours."""
    if request.name and request.vmid is not None:
        wishes = {"name": request.name, **wishes}
    if request.owned_tag and request.owned_tag in _tags(config.get("tags")):
        wishes = _joined(request.owned, wishes)
        tags = wishes.get("tags")
        if isinstance(tags, str) and request.owned_tag not in _tags(tags):
            wishes["tags"] = f"{tags};{request.owned_tag}"
    return dict(wishes)


def _refuse_stranger(request: Request, vm: Vm, config: Mapping[str, Any]) -> None:
    ours = request.owned_tag and request.owned_tag in _tags(config.get("tags"))
    if request.expect_name and not ours and str(config.get("name") or "") != request.expect_name:
        raise PveRefused(
            f"{vm} is there already, under another name than {request.expect_name}: take another vmid, or adopt it "
            "by its name. Nothing was changed"
        )


def _tags(text: Any) -> list[str]:
    return [tag for tag in str(text or "").replace(",", ";").split(";") if tag]


def _planned(
    pve: Pve, request: Request, vm: Vm, config: Mapping[str, Any], wishes: Mapping[str, Wish], digest: Any = None
) -> tuple[ConfigPlan, list[str]]:
    """The change, and what is said about the VM besides. Raises for what must not be sent."""
    known: Mapping[str, PciMapping] | None = None
    if request.gpus is not None:
        known = {**_pve_find.mappings(pve, vm.node), **request.gpus.pending}
        gpus = _pve_gpus.plan(config, request.gpus.mappings, request.gpus.options, request.gpus.owned_prefix, known)
        wishes = {**wishes, **gpus}
    made = _pve_vm_plan.plan(config, wishes)
    after = {option: value for option, value in config.items() if option not in made.deletes} | made.sets
    _pve_vm_root.refuse(pve, request.root, vm, config, made, digest)
    warnings = _refuse_start_mistakes(pve, vm, after, set(wishes), known)
    return made, warnings


def _refuse_start_mistakes(
    pve: Pve, vm: Vm, config: Mapping[str, Any], named: set[str], known: Mapping[str, PciMapping] | None
) -> list[str]:
    """Refuses what would keep the VM from starting and was asked for; the rest is a warning, as it was there before."""
    problems = _pve_vm_check.problems(config, _pve_find.facts(pve, vm.node, config, known))
    ours = [each for each in problems if set(each.options) & named]
    if fatal := [each.text for each in ours if each.fatal]:
        raise WishRefused(f"{vm} would not start: {'; '.join(fatal)}. Nothing was changed")
    if useless := [each.text for each in ours]:
        raise WishRefused(f"{vm}: {'; '.join(useless)}. Nothing was changed")
    return [f"{vm} will not start: {each.text}" if each.fatal else f"{vm}: {each.text}" for each in problems]


def _send(pve: Pve, request: Request, vm: Vm, made: ConfigPlan, digest: Any) -> None:
    """One request for all options, so that they hold together or not at all; then volumes grow."""
    if made.sets or made.deletes:
        params: dict[str, Any] = {**made.sets, "digest": digest}
        if made.deletes:
            params["delete"] = ",".join(made.deletes)
        # a volume that is made takes minutes, and PUT answers within the proxy's 30 s or not at all
        send: Callable[..., Any] = pve.post if made.allocates else pve.put
        _wait(pve, send(f"{vm.path}/config", **params), request.task_timeout)
    _grow(pve, request, vm, made.grows)


def _grow(pve: Pve, request: Request, vm: Vm, grows: Mapping[str, str]) -> None:
    for drive, size in grows.items():
        _wait(pve, pve.put(f"{vm.path}/resize", disk=drive, size=size), request.task_timeout)


def _wait(pve: Pve, answer: Any, timeout: float) -> None:
    if is_upid(answer):
        pve.wait(answer, timeout)


def _stale(error: PveError) -> bool:
    return isinstance(error, PveStaleDigest) or (
        isinstance(error, PveTaskFailed) and "checksum m" in f"{error.exitstatus} {' '.join(error.log)}"
    )


def _read_back(pve: Pve, outcome: Outcome, made: ConfigPlan) -> Outcome:
    """What Proxmox VE itself says is live and what waits."""
    config = dict(pve.get(f"{outcome.vm.path}/config"))
    config.pop("digest", None)
    outcome.config = config
    outcome.cold_start = _pve_vm_live.waiting(pve.get(f"{outcome.vm.path}/pending"))
    outcome.waiting = [option for option in made.options() if option in outcome.cold_start]
    outcome.live = [option for option in made.options() if option not in outcome.cold_start]
    return outcome


def _predicted(pve: Pve, outcome: Outcome, made: ConfigPlan, config: Mapping[str, Any]) -> Outcome:
    outcome.config = {option: value for option, value in config.items() if option not in made.deletes} | made.sets
    waits = set(_pve_vm_live.waiting(pve.get(f"{outcome.vm.path}/pending")))
    if outcome.vm.running:
        outcome.waiting = [o for o in made.options() if _pve_vm_live.needs_cold_start(o, config, made)]
    outcome.live = [option for option in made.options() if option not in outcome.waiting]
    outcome.cold_start = sorted(waits | set(outcome.waiting))
    return outcome


def _create(pve: Pve, request: Request, vm: Vm, *, check: bool) -> Outcome:
    wishes = _joined(_joined(request.create, request.owned), request.wishes)
    if request.owned_tag:
        wishes["tags"] = ";".join(dict.fromkeys([*_tags(wishes.get("tags")), request.owned_tag]))
    if request.name:
        wishes = {"name": request.name, **wishes}
    if request.clone is not None:
        return _clone(pve, request, request.clone, vm, wishes, check=check)
    made, warnings = _planned(pve, request, vm, {}, wishes)
    outcome = Outcome(vm, Difference(), created=True, warnings=warnings, config=dict(made.sets))
    outcome.difference.add(
        f"VM {vm.vmid} on {vm.node}", None, {**made.sets, **{f"{d} size": s for d, s in made.grows.items()}}
    )
    if check:
        return outcome
    of_root = [] if pve.is_root else _pve_vm_root.options({}, made)
    sets = made.part(lambda option: option not in of_root).sets
    params: dict[str, Any] = {"vmid": vm.vmid, **sets, **request.secrets}
    if request.pool:
        params["pool"] = request.pool
    _wait(pve, pve.post(f"/nodes/{vm.node}/qemu", **params), request.task_timeout)
    with_vm = Vm(vm.vmid, vm.node, True, request.name or vm.name)
    try:
        _grow(pve, request, with_vm, made.grows)
        if of_root:
            rest = {option: wishes[option] for option in of_root if option in wishes}
            _update(pve, request, with_vm, rest, check=False)
    except (PveError, WishRefused) as error:
        _undo(pve, request, with_vm, error)
    outcome.vm = with_vm
    return _read_back(pve, outcome, ConfigPlan())


def _clone(pve: Pve, request: Request, clone: Clone, vm: Vm, wishes: dict[str, Wish], *, check: bool) -> Outcome:
    source = _pve_find.existing_vm(pve, clone.vmid, clone.name, None)
    config = dict(pve.get(f"{source.path}/config"))
    for gone in ("digest", "meta", "vmgenid", "template", "name"):
        config.pop(gone, None)
    made, warnings = _planned(pve, request, vm, config, wishes)
    outcome = Outcome(vm, Difference(), created=True, warnings=warnings, kept=made.kept)
    outcome.config = {option: value for option, value in config.items() if option not in made.deletes} | made.sets
    outcome.difference.add(f"VM {vm.vmid} on {vm.node}", None, {"clone of": str(source), **outcome.config})
    if check:
        return outcome
    params: dict[str, Any] = {"newid": vm.vmid, "full": clone.full, "name": request.name or None, "pool": request.pool}
    params |= {"storage": clone.storage if clone.full else None, "snapname": clone.snapshot}
    if source.node != vm.node:
        params["target"] = vm.node
    _wait(pve, pve.post(f"{source.path}/clone", **params), request.task_timeout)
    cloned = Vm(vm.vmid, vm.node, True, request.name or vm.name)
    try:
        after = _update(pve, request, cloned, wishes, check=False)
        if request.secrets:
            pve.put(f"{cloned.path}/config", **request.secrets)
    except (PveError, WishRefused) as error:
        _undo(pve, request, cloned, error)
    after.created, after.difference = True, outcome.difference
    return after


def _undo(pve: Pve, request: Request, vm: Vm, error: Exception) -> None:
    """Takes away the half-made VM of this very call, so that a repetition starts clean. Raises always."""
    try:
        _wait(pve, pve.delete(vm.path, purge=True), request.task_timeout)
    except PveError as second:
        raise PveError(
            f"{error}. {vm} was half made and could not be removed: {second}; "
            f"remove it with: qm destroy {vm.vmid} --purge"
        ) from error
    raise PveError(f"{error}. {vm}, which was half made, is removed again") from error


def _joined(below: Mapping[str, Wish], above: Mapping[str, Wish]) -> dict[str, Wish]:
    """Wishes for a new VM: what holds always wins, sub-option by sub-option."""
    joined: dict[str, Wish] = dict(below)
    for option, wish in above.items():
        under = joined.get(option)
        joined[option] = {**under, **wish} if isinstance(under, dict) and isinstance(wish, dict) else wish
    return joined


def remove(
    pve: Pve, vmid: int | None, name: str | None, node: str | None, *, guard_tag: str, timeout: float, check: bool
) -> Outcome:
    """Destroys a VM that is stopped, with its volumes. ``guard_tag``: only one that has this tag; empty for any.

    Raises PveRefused for one that runs, is protected or lacks the tag.
    """
    found = _pve_find.vm(pve, vmid, name, node)
    difference = Difference()
    if not found.exists:
        return Outcome(found, difference)
    config = pve.get(f"{found.path}/config")
    if guard_tag and guard_tag not in _tags(config.get("tags")):
        raise PveRefused(f"{found} lacks the tag {guard_tag}, so it is not ours to destroy; nothing was changed")
    if found.running:
        raise PveRefused(f"{found} runs: stop it first with pve_vm_power; nothing was changed")
    if str(config.get("protection") or "0") == "1":
        raise PveRefused(f"{found} is protected: set protection: 0 first if it is to be destroyed; nothing was changed")
    difference.add(str(found), {key: value for key, value in config.items() if key != "digest"}, None)
    if not check:
        _wait(pve, pve.delete(found.path, purge=True), timeout)
    return Outcome(found, difference)
