# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs as plain process trees, for machines (and tests) without systemd: the whole tree ends with the job, and with the
worker; there is no sandbox, so a site that lets strangers submit wants the launcher ``systemd``."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import signal
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from organism.worker import warden
from organism.worker.launch import Ending, Launch, LaunchError

_WARDEN = Path(__file__).with_name("warden.py")


@dataclass(frozen=True)
class JobUser:
    """Who a job runs as."""

    name: str
    uid: int
    gid: int
    groups: list[int]


def find_user(name: str) -> JobUser:
    """The user with all its groups. Raises KeyError when there is none."""
    entry = pwd.getpwnam(name)
    groups = [group.gr_gid for group in grp.getgrall() if name in group.gr_mem]
    return JobUser(name, entry.pw_uid, entry.pw_gid, sorted({entry.pw_gid, *groups}))


class ProcessLauncher:
    """Starts jobs through one warden process, which is replaced when it has died."""

    confined = False

    def __init__(self, user: JobUser | None = None, *, adopt: bool = False) -> None:
        """``adopt``: this process has no other children, so it takes those of a killed warden and ends them."""
        self._user = user
        self._adopt = adopt
        if adopt:
            warden.prctl(warden.PR_SET_CHILD_SUBREAPER, 1)
        self._warden: asyncio.subprocess.Process | None = None
        self._link: socket.socket | None = None
        self._current: WardenProcess | None = None

    async def _connect(self) -> socket.socket:
        if self._link is not None and self._warden is not None and self._warden.returncode is None:
            return self._link
        await self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # -I -S: nothing of the environment or of site-packages; a start in a few milliseconds
            self._warden = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(_WARDEN), str(theirs.fileno()),
                pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise LaunchError(f"the warden process cannot be started: {error}") from error
        finally:
            theirs.close()
        ours.setblocking(False)
        self._link = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._event)
        return ours

    async def start(self, launch: Launch) -> WardenProcess:
        if self._current is not None:
            raise LaunchError("a job is still running; a GPU takes one at a time")
        try:
            link = await self._connect()
            request: dict[str, Any] = {
                "argv": launch.argv,
                "env": launch.env,
                "cwd": str(launch.cwd),
                "limit": launch.limit,
                "user": asdict(self._user) if self._user else None,
            }
            # a file in memory: an argument list may be larger than a packet
            descriptor = os.memfd_create("job", os.MFD_CLOEXEC)
            try:
                with os.fdopen(os.dup(descriptor), "wb") as stream:
                    stream.write(json.dumps(request).encode("utf-8", "surrogateescape"))
                os.lseek(descriptor, 0, os.SEEK_SET)
                process = self._current = WardenProcess(self)
                socket.send_fds(link, [b'{"op": "start"}'], [descriptor, launch.stdout, launch.stderr])
            except OSError as error:
                self._current = None
                raise LaunchError(f"the warden process does not listen: {error}") from error
            finally:
                os.close(descriptor)
        finally:
            os.close(launch.stdout)
            os.close(launch.stderr)
        return process

    def _event(self) -> None:
        assert self._link is not None
        try:
            data = self._link.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone()
            return
        event = json.loads(data)
        if event["event"] == "failed":
            self._ended(Ending(None, event["message"]))
        elif event["event"] == "ended":
            self._ended(Ending(event["status"]))

    def _gone(self) -> None:
        """The warden has died; its death took the job's first process along (PR_SET_PDEATHSIG), the rest is ours."""
        self._hang_up()
        if self._adopt:
            orphans = warden.descendants(os.getpid())
            warden.signal_all(orphans, signal.SIGSTOP)
            warden.signal_all(orphans, signal.SIGKILL)
        self._ended(Ending(-9, "the warden process was killed, and the job with it"))

    def _hang_up(self) -> None:
        if self._link is not None:
            asyncio.get_running_loop().remove_reader(self._link.fileno())
            self._link.close()
            self._link = None

    def _ended(self, ending: Ending) -> None:
        process, self._current = self._current, None
        if process is not None and not process.ending.done():
            process.ending.set_result(ending)

    def send_stop(self, grace: float) -> None:
        if self._link is not None:
            self._link.send(json.dumps({"op": "stop", "grace": grace}).encode())

    async def clear(self, gpu: str) -> list[str]:  # noqa: ARG002 - the launchers' interface
        """Nothing can be left: the warden of an earlier worker ended everything when that worker died."""
        return []

    async def close(self) -> None:
        self._hang_up()  # the warden hears it, ends what runs, and leaves
        if self._warden is not None:
            await self._warden.wait()
            self._warden = None
        self._ended(Ending(-9, "the worker has ended the job"))


class WardenProcess:
    """One job's tree."""

    def __init__(self, launcher: ProcessLauncher) -> None:
        self._launcher = launcher
        self.ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    async def wait(self) -> Ending:
        return await asyncio.shield(self.ending)

    async def stop(self, grace: float) -> None:
        if not self.ending.done():
            self._launcher.send_stop(grace)
