# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A driver and a traffic control that behave as the kernel's do, for a port in a tree."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from unit.steer.trees import queues

from organism.core._ethtool import Channels, Ethtool
from organism.core._systemd import CommandError


class Driver(Ethtool):
    """``coalescing``: None: the driver has none. ``writes``: everything that was set, in order."""

    def __init__(self, top: Path, channels: Channels | None = None, coalescing: dict[str, int] | None = None) -> None:
        self.top = top
        self.now = channels
        self.coalescing = coalescing
        self.offloads = {"gro": True, "gso": True, "tso": True, "lro": False}
        self.fixed_offloads = {"lro"}
        self.refuses: set[str] = set()
        self.writes: list[str] = []

    def channels(self, name: str) -> Channels | None:
        return self.now

    def set_channels(self, name: str, *, rx: int, tx: int, combined: int) -> None:
        assert self.now is not None
        self.writes.append("channels")
        self.now = replace(self.now, rx=rx, tx=tx, combined=combined)
        queues(self.top, name, rx or combined, tx or combined)

    def coalesce(self, name: str) -> dict[str, int] | None:
        return None if self.coalescing is None else dict(self.coalescing)

    def set_coalesce(self, name: str, values: Mapping[str, int]) -> None:
        assert self.coalescing is not None
        for key, value in values.items():
            if key in self.refuses:
                raise OSError(errno.EOPNOTSUPP, "not by this driver")
            if "usecs" in key and self.coalescing["adaptive_rx"]:
                raise OSError(errno.EINVAL, "adaptive coalescing is on")
            self.writes.append(key)
            self.coalescing[key] = value

    def offload(self, name: str, which: str) -> bool | None:
        return self.offloads[which]

    def set_offload(self, name: str, which: str, on: bool) -> None:
        if which in self.fixed_offloads:
            raise OSError(errno.EOPNOTSUPP, "fixed")
        self.writes.append(which)
        self.offloads[which] = on


class TrafficControl:
    """``tc`` for one port: the root's kind and handle, and the children's kinds where the root is mq."""

    def __init__(self, top: Path, name: str, root: str = "pfifo_fast", known: tuple[str, ...] = ("fq",)) -> None:
        self.top, self.name, self.default, self.known = top, name, root, known
        self.handle = "0:"
        self.kind = "mq" if self.many() else root
        self.children = [root] * self.many()
        self.calls: list[str] = []

    def many(self) -> int:
        count = len(list((self.top / f"sys/class/net/{self.name}/queues").glob("tx-*")))
        return count if count > 1 else 0

    def __call__(self, argv: list[str]) -> str:
        assert argv[0] == "tc" and self.name in argv
        if argv[1:4] == ["-json", "qdisc", "show"]:
            return self.show()
        self.calls.append(" ".join(argv[2:]))
        match argv[2:]:
            case ["del", "dev", _, "root"]:
                self.handle, self.kind = "0:", "mq" if self.many() else self.default
                self.children = [self.default] * self.many()
            case ["replace", "dev", _, "root", "handle", handle, "mq"]:
                self.handle, self.kind, self.children = handle, "mq", [self.default] * self.many()
            case ["replace", "dev", _, "root", kind]:
                self.check(kind)
                self.handle, self.kind, self.children = "8001:", kind, []
            case ["replace", "dev", _, "parent", parent, kind]:
                self.check(kind)
                major, minor = parent.split(":")
                assert f"{major}:" == self.handle
                self.children[int(minor, 16) - 1] = kind
            case other:
                raise AssertionError(other)
        return ""

    def check(self, kind: str) -> None:
        if kind not in self.known:
            raise CommandError("`tc` ended with 2: Error: Specified qdisc kind is unknown.")

    def show(self) -> str:
        root = {"kind": self.kind, "handle": self.handle, "root": True}
        major = "" if self.handle == "0:" else self.handle.rstrip(":")
        children = self.children + [self.default] * (self.many() - len(self.children))
        below = [
            {"kind": kind, "handle": "0:", "parent": f"{major}:{number:x}"}
            for number, kind in enumerate(children[: self.many()], 1)
        ]
        ingress = {"kind": "ingress", "handle": "ffff:", "parent": "ffff:fff1"}
        return json.dumps([root, *(below if self.kind == "mq" else []), ingress])
