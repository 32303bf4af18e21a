# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""nkeys: an ed25519 seed in a file that only its owner reads; the public half goes into the server's configuration.

The seed is made where it is used and never leaves that machine.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import nkeys

from organism.bus.errors import Refused


def public_key(path: str | Path) -> str:
    """The public key (``U...``) of the seed in ``path``. Raises Refused when there is no user's seed."""
    try:
        seed = Path(path).read_bytes()
    except FileNotFoundError:
        raise Refused(f"key file {path} is missing: make it with `organism-bus key create {path}`") from None
    except OSError as error:
        raise Refused(f"key file {path} cannot be read: {error.strerror}") from error
    return _public(seed, str(path))


def create(path: str | Path) -> str:
    """Make a new seed in ``path`` (mode 0400), which must not exist; returns the public key. Raises FileExistsError."""
    path = Path(path)
    seed = bytes(nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER))
    public = _public(seed, str(path))
    # complete or absent, also after a power cut; link() refuses an existing name where rename() would replace it
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(seed + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)
    finally:
        part.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return public


def _public(seed: bytes, where: str) -> str:
    try:
        pair = nkeys.from_seed(bytearray(seed.strip()))
        public = bytes(pair.public_key).decode("ascii")
    except (nkeys.NkeysError, ValueError, IndexError) as error:
        raise Refused(f"key file {where} holds no nkey seed: {type(error).__name__}") from error
    if not public.startswith("U"):
        raise Refused(f"key file {where} holds the seed of another kind of nkey; a user's begins with SU")
    return public
