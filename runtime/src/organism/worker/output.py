# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A job's output: all of it into a file up to a cap, head and tail into the report, never more than that in memory."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import TracebackType

from organism.bus.outputs import incomplete, notice

LOG_CHUNK = 64 * 1024
"""Bytes that one look at a log returns at most."""
_NOTICE_BYTES = 80


class Capture:
    """Takes one stream of a job as it comes.

    ``report_bytes`` bounds :meth:`text`, ``file_bytes`` the file; what goes beyond is counted and dropped, and a notice
    says so.
    """

    def __init__(self, path: Path, *, report_bytes: int, file_bytes: int) -> None:
        self.path = path
        self.total = 0
        self._report_bytes = report_bytes
        self._half = max(0, report_bytes - _NOTICE_BYTES) // 2
        self._file_left = file_bytes
        self._file_bytes = file_bytes
        self._head = bytearray()
        self._tail = bytearray()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file: int | None = os.open(path, flags, 0o640)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def feed(self, data: bytes) -> None:
        """The next bytes. Raises OSError when the file cannot take them (a full disk)."""
        self.total += len(data)
        room = self._report_bytes - len(self._head)
        if room > 0:
            self._head += data[:room]
            self._tail += data[room:]
        else:
            self._tail += data
        if len(self._tail) > 4 * max(self._half, 1024):
            del self._tail[: len(self._tail) - self._half]
        self._to_file(data)

    def _to_file(self, data: bytes) -> None:
        if self._file is None or self._file_left <= 0:
            return
        keep = memoryview(data)[: self._file_left]
        self._file_left -= len(keep)
        while keep:
            keep = keep[os.write(self._file, keep) :]
        if self._file_left <= 0:
            notice = f"[organism: the log's limit of {self._file_bytes} bytes is reached; the rest is dropped]"
            os.write(self._file, f"\n{notice}\n".encode())

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def text(self) -> str:
        """What a report carries: everything when it fits, else head and tail halves around a notice."""
        if self.total <= self._report_bytes:
            return self._head.decode("utf-8", "replace")
        # the tail may still be short right after the limit: its beginning is then at the end of the head
        tail = (bytes(self._head) + bytes(self._tail))[-self._half :] if self._half else b""
        left_out = self.total - 2 * self._half
        return self._head[: self._half].decode("utf-8", "replace") + notice(left_out) + tail.decode("utf-8", "replace")


class PipeReader:
    """Feeds a capture from the reading end of a pipe on the event loop; :meth:`finished` waits for its end."""

    def __init__(self, descriptor: int, capture: Capture) -> None:
        self._descriptor = descriptor
        self._capture = capture
        self._loop = asyncio.get_running_loop()
        self._done = self._loop.create_future()
        self.trouble: OSError | None = None
        """Why the log is incomplete, if it is."""
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._descriptor, LOG_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self.trouble = error
            data = b""
        if not data:
            self.stop()
            return
        if self.trouble is None:
            try:
                self._capture.feed(data)
            except OSError as error:
                # keep reading, or the job would block on a full pipe; its log stays incomplete
                self.trouble = error

    def stop(self) -> None:
        """Read no more (the end was reached, or nobody wants the rest)."""
        if not self._done.done():
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._done.set_result(None)

    async def finished(self, patience: float) -> bool:
        """True when the pipe's end came within ``patience`` seconds; reading stops in either case."""
        await asyncio.wait([self._done], timeout=patience)
        ended = self._done.done()
        self.stop()
        return ended


def read_log(path: Path, offset: int, *, finished: bool, limit: int = LOG_CHUNK) -> tuple[str, int, bool]:
    """Text of a log from a byte offset on, the next offset, and whether that was the last of it.

    A character whose bytes have not all been written yet is left for the next look. A negative offset counts from the
    end. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        start = max(0, size + offset) if offset < 0 else min(offset, size)
        data = os.pread(descriptor, limit, start)
    finally:
        os.close(descriptor)
    if not (finished and start + len(data) >= size):
        data = data[: len(data) - incomplete(data)]
    following = start + len(data)
    return data.decode("utf-8", "replace"), following, finished and following >= size
