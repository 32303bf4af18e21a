# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The verbs of ./run. Exit codes: 0 done, 1 it failed, 2 usage, 130 interrupted; tests end with pytest's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from . import proofs, setup
from .completion import BASH, ZSH
from .places import Places
from .steps import StepFailed


@dataclass(frozen=True)
class Verb:
    """One word after ./run: what help says, and what it does with the words that follow."""

    help: str
    act: Callable[[Places, list[str]], int] | None  # None: comes with a later version
    arguments: str = ""


def _become(places: Places, *words: str, path: str = "") -> int:
    """Replace this process by a program of the venv, at the checkout's root: signals and exit code are its own.

    What lies in ``path`` can be imported, too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(places.repo)
    environment = places.environment() | ({"PYTHONPATH": path} if path else {})
    os.execve(places.python, [str(places.python), *words], environment)


def _setup(places: Places, words: list[str]) -> int:
    _none(words, "setup")
    setup.ensure(places, "test")
    print(f"Ready: {places.venv}")
    return 0


def _demo(places: Places, words: list[str]) -> int:
    setup.ensure(places, "demo")
    return _become(places, "-m", "lab", "demo", *words)


def _lab(places: Places, words: list[str]) -> int:
    if not words:
        raise UsageError("lab wants one of: up, down, status, ssh, play")
    setup.ensure(places, "demo")
    return _become(places, "-m", "lab", *words)


RIG_VERBS = (
    "up",
    "ssh",
    "status",
    "reboot",
    "reset",
    "restart",
    "restore",
    "play",
    "put",
    "get",
    "qmp",
    "serial",
    "down",
)


MOLECULE_VERBS = ("test", "create", "prepare", "check", "converge", "idempotence", "verify", "destroy", "list", "login")


def _rig(places: Places, words: list[str]) -> int:
    setup.ensure(places, "rig")
    return _become(places, "-m", "rig", *words)


def _rig_down(places: Places, words: list[str]) -> int:
    name = []
    if words[:1] == ["--name"]:
        name, words = words[:2], words[2:]
    if words not in ([], ["--purge"]):
        raise UsageError("rig-down takes nothing but --name NAME and --purge")
    setup.ensure(places, "rig")
    return _become(places, "-m", "rig", *name, "down", *words)


def _rig_test(places: Places, words: list[str]) -> int:
    setup.ensure(places, "test")
    os.environ["ORGANISM_RIG_WHOLE"] = "1"
    return _become(places, "-m", "pytest", "tests/rig", *words)


def _molecule(places: Places, words: list[str]) -> int:
    setup.ensure(places, "test")
    return _become(places, "-m", "molecule", *words)


def _test(places: Places, words: list[str]) -> int:
    setup.ensure(places, "test")
    return _become(places, "-m", "pytest", *words)


def _proof(places: Places, words: list[str], of: Callable[[Places, list[str]], proofs.Program]) -> int:
    try:
        program = of(places, words)
    except proofs.BadWords as error:
        raise UsageError(str(error)) from None
    setup.ensure(places, "test")
    return _become(places, *program.words, path=program.path)


def _pvesim(places: Places, words: list[str]) -> int:
    setup.ensure(places, "test")
    return _become(places, "-m", "pvesim", *words, path=str(places.repo / "tests"))


def _lint(places: Places, words: list[str]) -> int:
    setup.ensure(places, "test")
    if words == ["--fix"]:
        os.chdir(places.repo)
        for arguments in (["check", "--fix", "."], ["format", "."]):
            code = os.spawnve(os.P_WAIT, places.venv / "bin" / "ruff", ["ruff", *arguments], places.environment())
            if code != 0:
                return 1
        return 0
    _none(words, "lint")
    return _become(places, "-m", "pytest", "tests/gates", "-m", "not slow")


def _docs(places: Places, words: list[str]) -> int:
    from .docs import build  # only this verb needs it

    _none(words, "docs")
    setup.ensure(places, "test")
    return build(places)


def _clean(places: Places, words: list[str]) -> int:
    from .clean import clean

    if words not in ([], ["--keep-cache"]):
        raise UsageError("clean takes nothing but --keep-cache")
    return clean(places, keep_cache=bool(words))


def _completion(_places: Places, words: list[str]) -> int:
    scripts = {"bash": BASH, "zsh": ZSH}
    if len(words) != 1 or words[0] not in scripts:
        raise UsageError("completion wants the name of the shell: bash or zsh")
    script = scripts[words[0]]
    for name, offered in (("VERBS", VERBS), ("RIG", RIG_VERBS), ("BENCH", proofs.BENCH), ("MOLECULE", MOLECULE_VERBS)):
        script = script.replace(f"@{name}@", " ".join(offered))
    sys.stdout.write(script)
    return 0


def _help(_places: Places, words: list[str]) -> int:
    _none(words, "help")
    print("usage: ./run VERB [arguments]\n")
    for name, verb in VERBS.items():
        later = "  (comes with a later version)" if verb.act is None else ""
        print(f"  {(name + ' ' + verb.arguments).strip():<26} {verb.help}{later}")
    print("\nEverything is made in .cache, or in the folder that ORGANISM_CACHE names; the log is in its log/.")
    return 0


VERBS = {
    "demo": Verb("boot the lab, build the pool, run jobs through it, kill a worker, show that nothing is lost", _demo),
    "test": Verb("all tests and gates, or what pytest's arguments choose", _test, "[pytest arguments]"),
    "setup": Verb("install what the tests need, and nothing else", _setup),
    "lint": Verb("the quick gates; --fix lets ruff mend and format first", _lint, "[--fix]"),
    "docs": Verb("the modules' and roles' pages, from their docstrings, into .cache/docs", _docs),
    "lab": Verb("the throw-away machines by themselves", _lab, "up|down|status|ssh|play ..."),
    "bench": Verb(
        "measure against the stored baseline",
        lambda places, words: _proof(places, words, proofs.bench),
        "|".join(proofs.BENCH),
    ),
    "chaos": Verb(
        "kill and cut at every instant: SEED=n repeats a run, MINUTES=m bounds it",
        lambda places, words: _proof(places, words, proofs.chaos),
        f"SUITE={'|'.join(proofs.CHAOS)}",
    ),
    "rig": Verb("a virtual machine with a real kernel and twelve GPUs", _rig, "[up|ssh|status|...]"),
    "rig-down": Verb("take the rig down; --purge removes its image, too", _rig_down, "[--purge]"),
    "rig-test": Verb("every level on the rig, with its reboots", _rig_test, "[pytest arguments]"),
    "molecule": Verb("a scenario of molecule/: default in the lab, rig on the rig", _molecule, "[test -s default|rig]"),
    "pvesim": Verb(
        "a simulated Proxmox VE node by hand (docs/pvesim.md); --help tells more", _pvesim, "[--port 8006 ...]"
    ),
    "clean": Verb("take lab and rig down and remove what was made here", _clean, "[--keep-cache]"),
    "completion": Verb('print completion of these verbs: eval "$(./run completion bash)"', _completion, "bash|zsh"),
    "help": Verb("this", _help),
}


class UsageError(Exception):
    """The words after ./run make no sense together."""


def _none(words: list[str], verb: str) -> None:
    if words:
        raise UsageError(f"{verb} takes no such argument: {' '.join(words)}")


def main(words: list[str]) -> int:
    """Run one verb; returns the exit code."""
    name, *rest = words or ["help"]
    name = {"-h": "help", "--help": "help"}.get(name, name)
    try:
        if name not in VERBS:
            raise UsageError(f"there is no verb {name!r}")
        act = VERBS[name].act
        if act is None:
            raise UsageError(f"{name} comes with a later version; this one has no such verb yet")
        return act(Places.here(), rest)
    except UsageError as error:
        print(f"run: {error} (./run help lists the verbs)", file=sys.stderr)
        return 2
    except StepFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again: it goes on from a whole state.", file=sys.stderr)
        return 130
