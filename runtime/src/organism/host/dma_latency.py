# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-dma-latency``: keeps every CPU ready to wake up within so many microseconds, for as long as it runs.

A request on /dev/cpu_dma_latency is a signed 32-bit number of microseconds and holds only while the file is open
(Documentation/power/pm_qos_interface.rst), so somebody has to keep it open: this program does, and nothing else.

With ``--release-above`` it lets go while a sensor of the processor shows more than that, and holds again when it has
cooled down by HYSTERESIS. Sensors have no event for that, so they are read each few seconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import struct
import sys
from collections.abc import Callable

from organism.core import _power, _sdnotify, _thermal
from organism.core._root import Root

HYSTERESIS = 10.0
"""Degrees Celsius below the limit at which a released request is held again."""
EVERY = 5.0
"""Seconds between two looks at the sensors."""


class NotHeld(Exception):
    """The kernel did not take the request; the message names the device and the values."""


class Request:
    """One request on the device; it exists while ``held``."""

    def __init__(self, device: str, microseconds: int) -> None:
        self.device, self.microseconds = device, microseconds
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def hold(self) -> int:
        """Make the request; returns the limit that counts now, which others may have made lower.

        Raises OSError, and NotHeld when the limit that counts is above what was asked for.
        """
        self.release()
        descriptor = os.open(self.device, os.O_RDWR | os.O_CLOEXEC)
        self._descriptor = descriptor
        os.write(descriptor, struct.pack("=i", self.microseconds))
        counts = int(struct.unpack("=i", os.pread(descriptor, 4, 0))[0])
        if counts > self.microseconds:
            self.release()
            raise NotHeld(f"{self.device}: wrote {self.microseconds}, and the limit that counts is {counts}")
        return counts

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Keeper:
    """Holds a request, and lets go while the processor is too hot. ``limit`` 0: never."""

    def __init__(self, request: Request, root: Root, limit: float = 0, *, slow_down: bool = False) -> None:
        self.request, self.root, self.limit, self.slow_down = request, root, limit, slow_down
        self.released = False
        self._turbo_before: str | None = None

    def start(self) -> str:
        """Hold, unless it is too hot already; says what is so now. Raises OSError, NotHeld."""
        return self.look() or self._hold()

    def look(self) -> str | None:
        """Compare the temperature with the limit; a sentence when something has changed. Raises OSError, NotHeld.

        Where no sensor answers any more everything stays as it is: a released request is not held again blindly.
        """
        sensors = _thermal.processors(self.root) if self.limit else {}
        if not sensors:
            return None
        name, celsius = max(sensors.items(), key=lambda sensor: sensor[1])
        if celsius >= self.limit and not self.released:
            self.released = True
            self.request.release()
            self._forbid_turbo()
            return f"released: {name} is at {celsius:.0f} C, the limit is {self.limit:.0f} C"
        if celsius <= self.limit - HYSTERESIS and self.released:
            self.released = False
            self._restore_turbo()
            return f"{self._hold()} again: {name} is at {celsius:.0f} C"
        return None

    def stop(self) -> None:
        self.request.release()
        self._restore_turbo()

    def _hold(self) -> str:
        return f"holding {self.request.hold()} us"

    def _forbid_turbo(self) -> None:
        switch = _power.turbo_switch(self.root) if self.slow_down else None
        if switch is not None:
            path, _allowed, forbidden = switch
            self._turbo_before = self.root.read(path)
            self.root.path(path).write_text(f"{forbidden}\n")

    def _restore_turbo(self) -> None:
        switch = _power.turbo_switch(self.root)
        if switch is not None and self._turbo_before is not None:
            self.root.path(switch[0]).write_text(f"{self._turbo_before}\n")
        self._turbo_before = None


def run(keeper: Keeper, every: float, stopped: Callable[[float | None], bool]) -> None:
    """Hold until ``stopped`` (which waits so many seconds, or for ever with None) says so. Raises OSError, NotHeld."""
    said = keeper.start()
    _sdnotify.notify("READY=1", f"STATUS={said}")
    try:
        while not stopped(every if keeper.limit else None):
            news = keeper.look()
            if news:
                sys.stderr.write(f"{news}\n")
                _sdnotify.notify(f"STATUS={news}")
    finally:
        _sdnotify.notify("STOPPING=1")
        keeper.stop()


def wait_for_signal(seconds: float | None) -> bool:
    """True when SIGTERM or SIGINT came, False when the time is over."""
    wanted = {signal.SIGTERM, signal.SIGINT}
    if seconds is None:
        signal.sigwait(wanted)
        return True
    return signal.sigtimedwait(wanted, seconds) is not None


def main(argv: list[str] | None = None) -> int:
    """0: it was told to stop, 1: the request cannot be held, 2: usage."""
    parser = argparse.ArgumentParser(
        prog="organism-dma-latency", description="Keep all CPUs ready to wake up within so many microseconds."
    )
    parser.add_argument("--latency-us", type=int, default=0, metavar="US", help="microseconds, 0 makes idle CPUs poll")
    parser.add_argument("--release-above", type=float, default=0, metavar="C", help="let go above so many degrees C")
    parser.add_argument("--slow-down", action="store_true", help="forbid turbo, too, while it is that hot")
    parser.add_argument("--every", type=float, default=EVERY, metavar="S", help="seconds between looks at the sensors")
    parser.add_argument("--device", default=_power.DEVICE, help=argparse.SUPPRESS)
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not 0 <= options.latency_us < 2**31 or options.every <= 0 or options.release_above < 0:
        parser.error("--latency-us is 0 or more, --release-above too, --every more than 0")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    request = Request(options.device, options.latency_us)
    keeper = Keeper(request, Root(options.root), options.release_above, slow_down=options.slow_down)
    try:
        run(keeper, options.every, wait_for_signal)
    except (OSError, NotHeld) as error:
        sys.stderr.write(f"organism-dma-latency: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
