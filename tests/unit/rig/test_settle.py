# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wait for what is plugged into a machine whose clock stood still, in a shell of this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rig import control, driver
from rig.driver import SETTLE, Rig
from rig.errors import HangsError, RigError

# Setting the clock adds the snapshot's age to the shell's seconds; the devices come with the first second look.
WORLD = """
date() { SECONDS=$((SECONDS + 7200)); }
systemctl() { :; }
sleep() { echo waited; present() { return 0; }; }
"""


def test_the_time_that_a_machine_has_slept_is_no_time_of_waiting(tmp_path: Path) -> None:
    (tmp_path / "udevadm").write_text("#!/bin/sh\necho settled\n")
    (tmp_path / "udevadm").chmod(0o755)
    script = SETTLE.format(now=1, functions=0, disks="", mac="none", seconds=240)
    done = subprocess.run(
        ["bash", "-s"],
        input=WORLD + script,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["waited", "settled"]), done.stderr


@pytest.mark.parametrize(
    ("outcomes", "launches"),
    [([None], 1), ([HangsError, None], 2), ([HangsError, HangsError], 2), ([RigError], 1)],
)
def test_a_machine_that_hangs_is_started_once_more(
    outcomes: list[type[RigError] | None], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, waits = [], iter(outcomes)

    def wait(rig: Rig) -> None:
        if (error := next(waits)) is not None:
            raise error("rig x no longer answers")

    monkeypatch.setattr(control, "alive", lambda where: False)
    monkeypatch.setattr(driver.Rig, "_launch", lambda rig: launched.append(rig))
    monkeypatch.setattr(driver.Rig, "wait", wait)
    if outcomes[-1] is None:
        Rig("x").start()
    else:
        with pytest.raises(outcomes[-1]):
            Rig("x").start()
    assert len(launched) == launches
