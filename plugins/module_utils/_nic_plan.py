# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each physical port should be like: channels, packet steering (RPS, RFS, XPS), coalescing, offloads, discipline.

Pure: ports and wishes in, a plan out. Every setting has one key below ``nic:<port>/`` and one value:

=====================  ==========================================================
``channels/combined``  number (``channels/rx`` and ``channels/tx`` where the driver has no combined ones)
``rps/rx-0``           CPU list (empty: off)
``rfs/rx-0``           entries of the queue's flow table
``xps/tx-0``           CPU list
``coalesce/rx_usecs``  number; 0 or 1 for ``adaptive_rx`` and ``adaptive_tx``
``offload/gro``        true or false
``qdisc``              ``fq``, or ``mq:fq`` for one of its own at each transmit queue
=====================  ==========================================================

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from . import _cpu_list
from ._ethtool import COALESCE, OFFLOADS, Channels

FLOW_ENTRIES = 4096
# what the kernel attaches by itself, or what is as harmless to replace; anything else somebody has set up on purpose
_PLAIN = {"", "mq", "fq", "fq_codel", "pfifo_fast", "pfifo", "bfifo"}

Key = str
Value: TypeAlias = "str | int | bool"


class NicPlanError(ValueError):
    """A wish that cannot be met; the text names it and the way out."""


@dataclass(frozen=True)
class NicWish:
    """``interfaces``: names, or ``auto``. ``cpus``: the I/O zone. ``channels``: 0 leaves them, -1 is one a CPU."""

    interfaces: tuple[str, ...]
    cpus: tuple[int, ...]
    channels: int = 0
    rps: bool = False
    xps: bool = False
    flow_entries: int = 0
    coalesce: Mapping[str, int] = field(default_factory=dict)
    offloads: Mapping[str, bool] = field(default_factory=dict)
    qdisc: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "interfaces": list(self.interfaces),
            "cpus": _cpu_list.render(self.cpus),
            "channels": self.channels,
            "rps": self.rps,
            "xps": self.xps,
            "flow_entries": self.flow_entries,
            "coalesce": dict(self.coalesce),
            "offloads": dict(self.offloads),
            "qdisc": self.qdisc,
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> NicWish:
        """Raises KeyError, TypeError, ValueError or AttributeError when it is none."""
        return NicWish(
            interfaces=tuple(str(name) for name in raw["interfaces"]),
            cpus=_cpu_list.parse(raw["cpus"]),
            channels=int(raw["channels"]),
            rps=bool(raw["rps"]),
            xps=bool(raw["xps"]),
            flow_entries=int(raw["flow_entries"]),
            coalesce={str(key): int(value) for key, value in raw["coalesce"].items()},
            offloads={str(key): bool(value) for key, value in raw["offloads"].items()},
            qdisc=str(raw["qdisc"]),
        )


@dataclass(frozen=True)
class Port:
    """A physical port as it is. ``values``: what it has, by key without ``nic:<port>/``; what it lacks is missing."""

    name: str
    driver: str
    address: str
    rx: int
    tx: int
    values: Mapping[Key, Value]
    channels: Channels | None = None


@dataclass(frozen=True)
class Unsupported:
    """A part of a wish that this port or kernel cannot have."""

    port: str
    what: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        return {"port": self.port, "what": self.what, "reason": self.reason}


@dataclass
class NicPlan:
    """``wanted``: value by whole key; ``owner``: the wish's name by whole key."""

    wanted: dict[Key, Value] = field(default_factory=dict)
    owner: dict[Key, str] = field(default_factory=dict)
    unsupported: list[Unsupported] = field(default_factory=list)


def full_key(port: str, key: str) -> Key:
    return f"nic:{port}/{key}"


def split_key(key: Key) -> tuple[str, str]:
    """(port, key without the port)."""
    port, _slash, rest = key.removeprefix("nic:").partition("/")
    return port, rest


def check_wish(wish: NicWish, online: Iterable[int]) -> None:
    """Raises NicPlanError."""
    offline = sorted(set(wish.cpus) - set(online))
    if not wish.cpus:
        raise NicPlanError("the I/O zone has no CPUs; run level 1 (cpu_plan) or give cpus")
    if offline:
        raise NicPlanError(f"CPU {_cpu_list.render(offline)} is not online (online: {_cpu_list.render(online)})")
    if wish.flow_entries < 0 or wish.flow_entries & (wish.flow_entries - 1):
        raise NicPlanError(f"flow_entries must be 0 or a power of two, which {wish.flow_entries} is not")
    for kind, known, given in (("coalesce", COALESCE, wish.coalesce), ("offloads", OFFLOADS, wish.offloads)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise NicPlanError(f"{kind}: no such setting: {', '.join(unknown)} (there are {', '.join(known)})")


def plan(
    ports: Mapping[str, Mapping[str, Port]], wishes: Mapping[str, NicWish], isolated: Iterable[int] = ()
) -> NicPlan:
    """``ports``: by the wish's name, the ports that its interfaces end at, by name. Raises NicPlanError.

    ``isolated``: CPUs of ``isolcpus=domain`` and ``nohz_full``. The kernel takes them out of ``rps_cpus``, and refuses
    a mask that is empty then (rps_cpumask_housekeeping in net/core/net-sysfs.c).
    """
    result = NicPlan()
    shut = set(isolated)
    queues: dict[str, tuple[int, int]] = {}
    for name, wish in sorted(wishes.items(), key=lambda item: (item[1].channels == 0, item[0])):
        for port in ports[name].values():
            count = queues.get(port.name, (port.rx, port.tx))
            queues[port.name] = _channels(result, name, wish, port, count)
    for name, wish in sorted(wishes.items()):
        for port in ports[name].values():
            rx, tx = queues[port.name]
            _receive(result, name, wish, port, rx, shut)
            _transmit(result, name, wish, port, tx)
            _driver(result, name, wish, port)
            _discipline(result, name, wish, port, tx)
    return result


def _want(result: NicPlan, name: str, port: Port, key: str, value: Value) -> None:
    whole = full_key(port.name, key)
    if whole in result.wanted and result.wanted[whole] != value:
        raise NicPlanError(
            f"{port.name}: {key} is {result.wanted[whole]!r} by {result.owner[whole]!r} and {value!r} by {name!r}; "
            "let one of them name it"
        )
    result.wanted[whole] = value
    result.owner.setdefault(whole, name)


def _lacks(result: NicPlan, port: Port, what: str, reason: str) -> None:
    entry = Unsupported(port.name, what, reason)
    if entry not in result.unsupported:
        result.unsupported.append(entry)


def _channels(result: NicPlan, name: str, wish: NicWish, port: Port, count: tuple[int, int]) -> tuple[int, int]:
    """Numbers of queues that there will be."""
    if wish.channels == 0:
        return count
    asked = len(wish.cpus) if wish.channels < 0 else wish.channels
    now = port.channels
    if now is None or (not now.max_combined and not now.max_rx and not now.max_tx):
        _lacks(result, port, "channels", f"the driver {port.driver or 'of this port'} has a fixed number of queues")
        return count
    if now.max_combined:
        number = min(asked, now.max_combined)
        _want(result, name, port, "channels/combined", number)
        change_rx = change_tx = number - now.combined
    else:
        number = min(asked, max(now.max_rx, now.max_tx))
        change_rx = change_tx = 0
        if now.max_rx:
            _want(result, name, port, "channels/rx", min(number, now.max_rx))
            change_rx = min(number, now.max_rx) - now.rx
        if now.max_tx:
            _want(result, name, port, "channels/tx", min(number, now.max_tx))
            change_tx = min(number, now.max_tx) - now.tx
    if number < asked:
        _lacks(result, port, "channels", f"the driver has at most {number} channels, {asked} were wanted")
    return count[0] + change_rx, count[1] + change_tx


def _receive(result: NicPlan, name: str, wish: NicWish, port: Port, queues: int, shut: set[int]) -> None:
    if wish.rps:
        cpus = [cpu for cpu in wish.cpus if cpu not in shut]
        cut = _cpu_list.render(set(wish.cpus) & shut)
        if cut:
            left = f"left out of the mask {_cpu_list.render(cpus)}" if cpus else "nothing is left of the mask"
            _lacks(result, port, "rps", f"CPU {cut} is isolated (isolcpus, nohz_full), which rps_cpus refuses: {left}")
        if "rps/rx-0" not in port.values:
            _lacks(result, port, "rps", "no rps_cpus at its receive queues (kernel without CONFIG_RPS?)")
        elif cpus:
            for number in range(queues):
                _want(result, name, port, f"rps/rx-{number}", _cpu_list.render(cpus))
    if wish.flow_entries:
        if "rfs/rx-0" not in port.values:
            _lacks(result, port, "rfs", "no rps_flow_cnt at its receive queues (kernel without CONFIG_RFS_ACCEL?)")
        else:
            for number in range(queues):
                _want(result, name, port, f"rfs/rx-{number}", wish.flow_entries)


def _transmit(result: NicPlan, name: str, wish: NicWish, port: Port, queues: int) -> None:
    if not wish.xps:
        return
    if queues < 2:
        _lacks(result, port, "xps", "it has one transmit queue, so there is nothing to choose (xps_cpus is absent)")
    elif port.tx >= 2 and "xps/tx-0" not in port.values:
        _lacks(result, port, "xps", "no xps_cpus at its transmit queues (kernel without CONFIG_XPS?)")
    else:
        for number in range(queues):
            _want(result, name, port, f"xps/tx-{number}", _cpu_list.render(wish.cpus))


def _driver(result: NicPlan, name: str, wish: NicWish, port: Port) -> None:
    for key, value in wish.coalesce.items():
        if f"coalesce/{key}" not in port.values:
            _lacks(result, port, "coalesce", f"the driver {port.driver or 'of this port'} does not coalesce interrupts")
        else:
            _want(result, name, port, f"coalesce/{key}", value)
    for key, on in wish.offloads.items():
        if f"offload/{key}" not in port.values:
            _lacks(result, port, f"offload {key}", "the kernel does not know it of this port")
        else:
            _want(result, name, port, f"offload/{key}", on)


def _discipline(result: NicPlan, name: str, wish: NicWish, port: Port, queues: int) -> None:
    if not wish.qdisc:
        return
    now = str(port.values.get("qdisc", ""))
    first = now.partition(":")[0]
    kinds = set(now.replace(":", ",").split(",")) - {wish.qdisc}
    if not kinds <= _PLAIN:
        _lacks(result, port, "qdisc", f"somebody has set up {now!r} here, which is left as it is")
    else:
        many = first == "mq" or (queues > 1 and now != wish.qdisc)
        _want(result, name, port, "qdisc", f"mq:{wish.qdisc}" if many else wish.qdisc)


def order(key: Key, value: Value | None = None) -> tuple[int, str]:
    """Sort key for setting values: channels first, since they bring and take queues; adaptive coalescing off before the
    times, and on after them, since many drivers refuse times while it is on."""
    _port, rest = split_key(key)
    kind = rest.split("/")[0]
    if kind == "coalesce":
        return 2 if "adaptive" not in rest else 3 if value else 1, key
    return {"channels": 0, "offload": 4, "qdisc": 5}.get(kind, 6), key
