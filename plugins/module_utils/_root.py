# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The file system as the library sees it: every path goes through a Root, so a recorded tree can stand for a machine.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
from pathlib import Path


class Root:
    """Reads below one directory as if it were ``/``.

    ``Root()`` is the running machine; ``Root("/some/recording")`` is a tree recorded from another one. Absolute
    symbolic links inside a recording are resolved inside it, never on the machine that runs the test.
    """

    def __init__(self, top: str | os.PathLike[str] = "/") -> None:
        self.top = Path(top)

    def path(self, path: str) -> Path:
        """The real path of an absolute path of the tree, its links not followed."""
        return self.top / path.lstrip("/")

    def exists(self, path: str) -> bool:
        return self.path(path).exists()

    def read(self, path: str) -> str:
        """The text of a file without its trailing newline. Raises OSError."""
        return self.path(path).read_text(encoding="utf-8", errors="replace").rstrip("\n")

    def read_or_none(self, path: str) -> str | None:
        """The text, or None when it is absent or the kernel refuses to read it.

        sysfs answers some reads with ENODEV, EINVAL or EOPNOTSUPP when the hardware lacks the value: that is
        "unknown", never zero.
        """
        try:
            return self.read(path)
        except OSError:
            return None

    def read_int(self, path: str) -> int | None:
        """The decimal or 0x-prefixed integer in a file, or None when it is absent, unreadable or not a number."""
        text = self.read_or_none(path)
        if text is None:
            return None
        try:
            return int(text.strip(), 0)
        except ValueError:
            return None

    def listdir(self, path: str) -> list[str]:
        """Sorted names in a directory; empty when it does not exist."""
        try:
            return sorted(entry.name for entry in self.path(path).iterdir())
        except OSError:
            return []

    def glob(self, pattern: str) -> list[str]:
        """Sorted absolute paths (of the tree) that match a shell pattern."""
        return sorted("/" + str(found.relative_to(self.top)) for found in self.top.glob(pattern.lstrip("/")))

    def link_name(self, path: str) -> str | None:
        """The last component of a symbolic link's target (a driver's or group's name in sysfs), or None."""
        try:
            return os.path.basename(os.readlink(self.path(path)))  # noqa: PTH115, PTH119 - the target may not exist
        except OSError:
            return None
