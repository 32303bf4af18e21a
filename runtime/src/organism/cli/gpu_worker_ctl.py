# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``gpu-worker-ctl``: the workers of this machine at a glance, and the hand that starts them.

Exit codes: 0 done (status: all run; probe: each GPU has a working stack), 1 something failed (status: a worker does not
run; probe: a GPU has none), 2 usage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from organism._version import VERSION
from organism.cli import _probe
from organism.core import _bus, _gpu_map, _gpu_worker
from organism.core._gpu_map import Entry, MapError
from organism.core._keyvalue import SettingsError
from organism.core._maestro_deploy import File, read_files
from organism.core._root import Root
from organism.core._systemd import CommandError, Systemctl, UnitState, booted
from organism.core._worker_settings import CONFIG, GPU_MAP, check_cpuset, load_settings, render_dropin
from organism.worker import probe

STATUS_LINES = 12


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu-worker-ctl", description="Workers of this machine's GPUs.")
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--config", default=CONFIG, help=argparse.SUPPRESS)
    parser.add_argument("--map", help="map of GPUs (default: GPU_MAP of the settings)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("list", "each GPU's id, device and service"),
        ("enable", "start the workers, now and at each boot"),
        ("restart", "start the workers anew, one after the other (renews the pinning by GPU_WORKER_CPUSET)"),
        ("status", f"what systemd says of each worker ({STATUS_LINES} lines)"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if name != "list":
            command.add_argument("gpu", nargs="*", help="ids; default: all that are present")
    logs = commands.add_parser("logs", help="what a worker has logged", description="What a worker has logged.")
    logs.add_argument("gpu", help="id of the GPU")
    logs.add_argument("-n", "--lines", type=int, default=50, help="how many lines (default: %(default)s)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as more is logged")
    logs.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    ask = commands.add_parser(
        "probe",
        help="which compute stacks (OpenCL, Vulkan, ROCm, CUDA) answer for each GPU",
        description="Ask clinfo, vulkaninfo, rocminfo and nvidia-smi which of the GPUs they reach."
        " Ends with 0 when each GPU has at least one working stack.",
    )
    ask.add_argument("--require", metavar="STACK,...", type=_stacks, default=(), help="stacks that each GPU must have")
    ask.add_argument(
        "--timeout", metavar="S", type=_seconds, default=probe.LIMIT, help="seconds for a tool (default: %(default)g)"
    )
    ask.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    text = "completion script of a shell"
    completion = commands.add_parser("completion", help=text, description=f"Prints the {text}.")
    completion.add_argument("shell", choices=("bash", "zsh"))
    return parser


def _stacks(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in probe.STACKS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} must name some of {', '.join(probe.STACKS)}")
    return names


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0, at most 600")
    return value


class Command:
    """One call; everything outside it (system, output) is given, so that a test can stand in for it."""

    def __init__(
        self,
        options: argparse.Namespace,
        root: Root,
        systemctl: Systemctl,
        say: Callable[[str], None],
        run: Callable[[list[str]], int],
    ) -> None:
        self.options = options
        self.root = root
        self.systemctl = systemctl
        self.say = say
        self.run = run

    def entries(self) -> list[Entry]:
        """Of the map. Raises MapError or OSError."""
        return _gpu_map.load_map(self.root, self.options.map or GPU_MAP)

    def chosen(self) -> list[str]:
        """The ids that the call is about. Raises MapError for one that the map does not have."""
        entries = self.entries()
        for gpu in self.options.gpu:
            _gpu_map.find(entries, gpu)
        gpus = self.options.gpu or [entry.id for entry in entries if entry.present]
        if not gpus:
            raise MapError("the map has no GPU that is present; the module organism.proxmox.gpu_map writes it")
        return list(gpus)

    def states(self, gpus: list[str]) -> dict[str, UnitState]:
        """By GPU. Raises CommandError."""
        shown = self.systemctl.show(_gpu_worker.unit_of(gpu) for gpu in gpus)
        return {gpu: shown.get(_gpu_worker.unit_of(gpu), UnitState(_gpu_worker.unit_of(gpu))) for gpu in gpus}

    def table(self) -> int:
        entries = self.entries()
        states = self.states([entry.id for entry in entries]) if booted(self.root) else {}
        rows = []
        for entry in entries:
            state = states.get(entry.id)
            rows.append({**asdict(entry), "service": state.active if state else "unknown"})
        if self.options.json:
            self.say(json.dumps({"gpus": rows}, indent=2))
            return 0
        self.say(f"{'GPU':<12}{'SERVICE':<12}{'BACKEND':<11}{'ADDRESS':<14}{'VRAM':>8}  MODEL")
        for row in rows:
            vram = f"{row['vram_mb']} MB" if row["vram_mb"] else "-"
            model = row["model"] if row["present"] else f"{row['model']}  (not there now)"
            self.say(f"{row['id']:<12}{row['service']:<12}{row['backend']:<11}{row['address']:<14}{vram:>8}  {model}")
        return 0

    def enable(self) -> int:
        gpus = self.chosen()
        self.renew_dropins(gpus)
        for gpu in gpus:
            self.systemctl.call("enable", _gpu_worker.unit_of(gpu))
            _gpu_worker.call(self.systemctl, "start", gpu)
        return self.done(gpus, "enabled and started")

    def restart(self) -> int:
        gpus = self.chosen()
        self.renew_dropins(gpus)
        for gpu in gpus:
            _gpu_worker.call(self.systemctl, "restart", gpu)
        return self.done(gpus, "restarted")

    def renew_dropins(self, gpus: list[str]) -> None:
        """Pin by what the settings say now; nothing is written when one of them is wrong. Raises ValueError."""
        wanted: dict[str, File] = {}
        unwanted: list[str] = []
        for gpu in gpus:
            cpuset = load_settings(self.root, gpu, self.options.config).text("GPU_WORKER_CPUSET")
            path = _gpu_worker.dropin_of(gpu)
            if cpuset:
                check_cpuset(cpuset, self.root)
                wanted[path] = File(render_dropin(cpuset))
            else:
                unwanted.append(path)
        files = {**dict.fromkeys(unwanted), **wanted}
        plan = _gpu_worker.plan(_gpu_worker.Facts(read_files(self.root, files), {}, None, systemd=False), files, ())
        # also without a difference: a person may have edited the unit or the map before calling
        plan.reload = True
        _gpu_worker.apply(plan, self.root, self.systemctl)

    def done(self, gpus: list[str], what: str) -> int:
        if self.options.json:
            self.say(json.dumps({"gpus": gpus, "done": what}))
        else:
            self.say(f"{', '.join(gpus)}: {what}")
        return 0

    def status(self) -> int:
        gpus = self.chosen()
        states = self.states(gpus)
        if self.options.json:
            self.say(json.dumps({"workers": {gpu: asdict(state) for gpu, state in states.items()}}, indent=2))
        else:
            for gpu in gpus:
                lines = self.status_text(gpu).splitlines()
                self.say("\n".join([*lines[:STATUS_LINES], ""]))
        return 0 if all(state.running for state in states.values()) else 1

    def status_text(self, gpu: str) -> str:
        # 3 means that the unit does not run, which is an answer, too
        done = subprocess.run(
            ["systemctl", "status", "--no-pager", "--lines=5", _gpu_worker.unit_of(gpu)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout or done.stderr

    def probe(self) -> int:
        try:
            entries = self.entries()
        except FileNotFoundError:
            if self.options.map:
                raise
            entries = None  # before level 7 there is none, and passthrough is to be looked at already
        found = probe.probe(self.root, entries, self.options.timeout, self.options.require)
        if self.options.json:
            self.say(json.dumps(_probe.record(found), indent=2))
        else:
            self.say("\n".join(_probe.lines(found)))
        return 0 if found.ok else 1

    def completion(self) -> int:
        try:
            import shtab
        except ImportError as error:
            raise ValueError(
                "shell completion needs the package shtab (`pip install 'organism[completion]'`)"
            ) from error
        self.say(shtab.complete(build_parser(), shell=self.options.shell))
        return 0

    def logs(self) -> int:
        gpu: str = self.options.gpu
        if not _bus.is_identifier(gpu):
            raise MapError(f"GPU id {gpu!r} must match {_bus.IDENTIFIER.pattern}")
        call = ["journalctl", f"--unit={_gpu_worker.unit_of(gpu)}", f"--lines={self.options.lines}"]
        call += ["--output=json"] if self.options.json else []
        call += ["--follow"] if self.options.follow else ["--no-pager"]
        return self.run(call)


def _run(call: list[str]) -> int:
    return subprocess.run(call, check=False).returncode


def main(argv: list[str] | None = None, **given: Any) -> int:
    options = build_parser().parse_args(argv)
    command = Command(
        options,
        given.get("root", Root()),
        given.get("systemctl", Systemctl()),
        given.get("say", print),
        given.get("run", _run),
    )
    try:
        return {
            "list": command.table,
            "enable": command.enable,
            "restart": command.restart,
            "status": command.status,
            "logs": command.logs,
            "probe": command.probe,
            "completion": command.completion,
        }[options.command]()
    except (SettingsError, MapError, ValueError, CommandError, OSError) as error:
        sys.stderr.write(f"gpu-worker-ctl: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
