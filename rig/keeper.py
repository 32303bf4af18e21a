# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig's keeper: one process behind each rig, which runs QEMU, serves its GPUs and starts it again after a reset.

    python3 -m rig.keeper NAME       (started by `rig up`; its folder holds machine.json)

A machine that does not come up, because its kernel died or hung, gets one more try.
"""

from __future__ import annotations

import json
import os
import signal
import socketserver
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from . import firmware, launch, prepared, qemu, state
from .config import Settings, settings
from .control import CONTROL
from .errors import RigError
from .life import Life, copy, make_disks
from .ports import free_port
from .show import say

TRIES = 2


class Ended(BaseException):
    """A signal came before there was a machine."""


class Keeper:
    """The main thread lives the machine's lives; a thread for each request asks for the next one."""

    def __init__(self, where: Settings) -> None:
        self.where = where
        self.machine = state.load_machine(where)
        self.qemu = qemu.find(where)
        self.state = state.State(port=free_port(), keeper=os.getpid())
        self._changed = threading.Condition()
        self._life: Life | None = None
        self._wanted = ""  # what a request made the present life end for: reset, power, restore, stop
        self.publish()

    def publish(self, **values: Any) -> None:
        with self._changed:
            for name, value in values.items():
                setattr(self.state, name, value)
            state.write(self.where.state_file, self.state)
            self._changed.notify_all()

    def run(self) -> int:
        """Until the machine is shut down or the rig is taken down; 1 when it does not come up."""
        image = prepared.ensure(self.where, self.machine, self.qemu)
        self.publish(accelerator=image.accelerator)
        snapshot, fresh, tries = not self.machine.cold, True, TRIES
        while True:
            life = self._begin(image, snapshot=snapshot, fresh=fresh)
            reason = life.live(lambda life=life: self.publish(phase="up", seconds=[*self.state.seconds, life.seconds]))  # type: ignore[misc]  # a default binds the loop's value
            wanted, self._wanted = self._wanted, ""
            say(f"life {self.state.life} ended: {wanted or reason}")
            seconds = self.state.seconds if life.up else [*self.state.seconds, 0.0]
            self.publish(ends=[*self.state.ends, wanted or reason], seconds=seconds, qemu=0)
            if wanted == "stop" or (not wanted and reason in ("guest-shutdown", "host-signal", "host-qmp-quit")):
                self.publish(phase="ended")
                return 0
            if life.up or wanted:
                tries = TRIES
            elif tries == 1:
                self.publish(phase="failed", error=f"it did not come up in {TRIES} tries: {reason}")
                return 1
            else:
                tries -= 1
                say("it did not come up: once more")
            if wanted == "restore":
                snapshot, fresh = not self.machine.cold, True
            elif life.up or wanted:
                snapshot, fresh = False, False
            # else: the same start again

    def _begin(self, image: prepared.Prepared, *, snapshot: bool, fresh: bool) -> Life:
        system = self.where.run / "system.qcow2"
        if fresh:
            system.unlink(missing_ok=True)
            copy(image.disk, system)
        how = "snapshot" if snapshot else "boot"
        direct = firm = None
        if not snapshot and self.machine.append is not None:
            direct, how = (
                launch.Direct(image.kernel, image.initrd, f"root=UUID={image.root} ro {self.machine.append}"),
                "kernel",
            )
        elif not snapshot and self.machine.loader != "grub":
            firm = firmware.prepare(self.where)
        disks = make_disks(self.where, self.machine, fresh=fresh)
        arguments = launch.base(self.machine, system, image.table, self.state.port, image.accelerator)
        arguments += launch.start(direct, firm)
        life = Life(
            self.where, self.qemu, self.machine, arguments, self.state.port, "snapshot" if snapshot else "boot", disks
        )
        self._life = life
        say(f"life {self.state.life + 1}: {how}")
        self.publish(phase="starting", life=self.state.life + 1, how=how)
        self.publish(qemu=life.begin())
        return life

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request's answer: the state after it."""
        verb = request.get("do")
        if verb == "wait":
            with self._changed:
                self._changed.wait_for(lambda: self._settled(int(request["life"])), timeout=float(request["seconds"]))
        elif verb in ("stop", "reset", "power", "restore") and self._life is not None:
            if "append" in request or "loader" in request:
                changes = {name: request[name] for name in ("append", "loader") if name in request}
                self.machine = replace(self.machine, cold=True, **changes)
                state.save_machine(self.where, self.machine)
            self._wanted = verb
            if verb == "reset":
                self._life.reset()
            else:
                self._life.kill(verb)
        elif verb != "status":
            return {"error": f"there is no request {verb!r}, or no machine yet"}
        with self._changed:
            return asdict(self.state)

    def _settled(self, life: int) -> bool:
        return self.state.phase in ("ended", "failed") or (self.state.phase == "up" and self.state.life >= life)

    def serve(self) -> None:
        keeper = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    try:
                        answer = keeper.answer(json.loads(line))
                    except (RigError, OSError, ValueError, KeyError, TypeError) as error:
                        answer = {"error": str(error)}
                    self.wfile.write(json.dumps(answer).encode() + b"\n")

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

        os.chdir(self.where.run)  # the socket's address is relative: the folder's path may be too long for it
        server = Server(CONTROL, Handler)
        threading.Thread(target=server.serve_forever, name="control", daemon=True).start()

    def end(self) -> None:
        """Called on a signal: take the machine along."""
        self._wanted = "stop"
        if self._life is None:
            raise Ended  # while it was prepared: what is under way cleans up after itself
        self._life.kill("stop")


def main(arguments: Sequence[str]) -> int:
    where = settings(arguments[0])
    keeper = Keeper(where)
    keeper.serve()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: keeper.end())
    try:
        return keeper.run()
    except Ended:
        keeper.publish(phase="ended")
        return 0
    except (RigError, OSError) as error:
        say(f"failed: {error}")
        hint = error.hint if isinstance(error, RigError) else ""
        keeper.publish(phase="failed", error=f"{error}{'; ' + hint if hint else ''}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
