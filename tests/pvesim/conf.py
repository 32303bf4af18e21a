# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM's configuration as the file that it is: ``key: value``, then a section ``[PENDING]``; its digest is the file's.

The files are the truth, as in /etc/pve: an edit by hand is seen, and changes the digest.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from .errors import Died


@dataclass
class Conf:
    """``delete``: options whose removal waits, and whether by force."""

    values: dict[str, str] = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)
    delete: dict[str, bool] = field(default_factory=dict)
    digest: str = ""

    def get(self, key: str) -> str | None:
        return self.values.get(key)

    @property
    def has_pending(self) -> bool:
        return bool(self.pending or self.delete)

    def merged(self) -> dict[str, str]:
        """What ``GET config`` shows: as if the pending changes were made."""
        found = {key: value for key, value in self.values.items() if key not in self.delete}
        return {**found, **self.pending}

    def render(self) -> str:
        text = _section(self.values)
        if self.has_pending:
            waiting = dict(self.pending)
            if self.delete:
                waiting["delete"] = ",".join(("!" if force else "") + key for key, force in sorted(self.delete.items()))
            text += "\n[PENDING]\n" + _section(waiting)
        return text


def _section(values: dict[str, str]) -> str:
    head = "".join(f"#{urllib.parse.quote(line, safe=_PLAIN)}\n" for line in values.get("description", "").splitlines())
    return head + "".join(f"{key}: {value}\n" for key, value in sorted(values.items()) if key != "description")


_PLAIN = " !\"$&'()*+,-./;<=>?@[\\]^_`{|}~"


def parse(text: str) -> Conf:
    """Read a file's text; lines that are none are left out, as Proxmox VE does with a warning."""
    conf = Conf(digest=hashlib.sha1(text.encode()).hexdigest())
    section, described = conf.values, []
    for line in text.splitlines():
        if re.fullmatch(r"\[PENDING\]\s*", line):
            section = conf.pending
        elif line.startswith("#"):
            described.append(urllib.parse.unquote(line[1:]))
        elif found := re.fullmatch(r"([a-z][a-z_\d-]*):\s*(.*?)\s*", line, re.IGNORECASE):
            section[found[1]] = found[2]
    if described:
        conf.values["description"] = "\n".join(described) + "\n"
    for word in re.split(r"[,;\s]+", conf.pending.pop("delete", "")):
        if word:
            conf.delete[word.lstrip("!")] = word.startswith("!")
    return conf


class Configs:
    """The files of one node's VMs."""

    def __init__(self, folder: Path, node: str) -> None:
        self.folder = folder
        self.node = node

    def path(self, vmid: int) -> Path:
        return self.folder / f"{vmid}.conf"

    def exists(self, vmid: int) -> bool:
        return self.path(vmid).exists()

    def vmids(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.conf") if path.stem.isdigit())

    def load(self, vmid: int) -> Conf:
        try:
            return parse(self.path(vmid).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Died(f"Configuration file 'nodes/{self.node}/qemu-server/{vmid}.conf' does not exist") from None

    def write(self, vmid: int, conf: Conf) -> None:
        """In one step, as pmxcfs does: a reader sees the old or the new."""
        path = self.path(vmid)
        fresh = path.with_suffix(".tmp")
        fresh.write_text(conf.render(), encoding="utf-8")
        fresh.replace(path)
        conf.digest = hashlib.sha1(path.read_bytes()).hexdigest()
