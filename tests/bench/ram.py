# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a sync of a RAM layer costs, side by side with what people use: ``./run bench ram [--files N] [--repeat N]``.

The peers run on the same tree, on the same disk, one after the other with us in each round; the median of the rounds
counts. ``rsync`` is ``rsync -aHAX --delete`` into a second copy followed by a rename, which is what a script does whose
generation is whole; ``in place`` is rsync onto the last copy, as the resync of anything-sync-daemon,
profile-sync-daemon and log2ram is (a cut leaves it torn). Neither waits for the disk; we do. Bytes are those that the
block layer counted.

The peers read out of the tmpfs what has changed, which marks it as read, and a sync of ours compares what was read. No
peer runs beside us on a real machine, so each round begins with a sync of ours that is not counted, and the peers' turn
comes after ours. Jobs do read: what that costs is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from chaos.ram.alone import alone

from organism.core import _ramlayer as ramlayer
from organism.core._overlay import mounts
from organism.core._ramlayer import Layer
from organism.core._ramlayer_copy import sync_filesystem
from organism.core._ramlayer_seen import SLACK
from organism.core._root import Root

HERE = Path(__file__).parent
ROOT = Root()
DISK_MB = 3072
IN_PLACE = "nothing changed: our time / rsync's in place (goal < 0.1)"
ATOMIC = "nothing changed: our time / rsync's with a rename (goal < 0.1)"
CORES = "twelve layers: cores (goal <= 1)"
STALL = "twelve layers: p99 of a job's write in ms (goal <= 50)"
GOALS = {IN_PLACE: 0.1, ATOMIC: 0.1, CORES: 1.0, STALL: 50.0}


@dataclass
class Disk:
    """An ext4 on a loop device of its own, so that nobody else's writes are counted."""

    folder: Path
    place: Path = field(init=False)
    _statistics: Path = field(init=False)

    def __post_init__(self) -> None:
        image = self.folder / "bench.img"
        with image.open("wb") as stream:
            stream.truncate(DISK_MB * 1024 * 1024)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-N", "600000", str(image)], check=True)
        self.place = self.folder / "disk"
        self.place.mkdir()
        subprocess.run(["mount", "-o", "loop", str(image), str(self.place)], check=True)
        device = self.place.stat().st_dev
        self._statistics = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")

    def written(self) -> int:
        """Bytes written to the device since it was made (sectors are of 512 bytes)."""
        return int(self._statistics.read_text().split()[6]) * 512

    def flush(self) -> None:
        """Only this disk: others' writes are nobody's business here."""
        descriptor = os.open(self.place, os.O_RDONLY)
        sync_filesystem(descriptor)
        os.close(descriptor)

    def bandwidth(self) -> float:
        """MB/s of one large write that is synced: the limit of what any sync can do here."""
        path = self.place / "bandwidth"
        block = os.urandom(8 * 1024 * 1024)
        began = time.monotonic()
        with path.open("wb") as stream:
            for _ in range(32):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        spent = time.monotonic() - began
        path.unlink()
        return 32 * 8.388608 / spent


@dataclass
class Cost:
    """One run: seconds of the clock and of processors, bytes written to the disk."""

    seconds: float
    cpu: float
    written: int


def measure(disk: Disk, work: Callable[[], object]) -> Cost:
    disk.flush()
    before, cpu, began = disk.written(), _cpu(), time.monotonic()
    work()
    spent, used = time.monotonic() - began, _cpu() - cpu
    disk.flush()
    return Cost(spent, used, disk.written() - before)


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def make_tree(top: Path, files: int, size: int) -> list[Path]:
    """``files`` files of ``size`` bytes, a hundred to a directory."""
    made = []
    block = os.urandom(size)
    for number in range(files):
        folder = top / f"d{number // 100}"
        if number % 100 == 0:
            folder.mkdir()
        path = folder / f"file-{number}"
        path.write_bytes(block)
        made.append(path)
    return made


def change(paths: list[Path], count: int) -> None:
    """Write to every so-many-th file, in place."""
    step = max(len(paths) // max(count, 1), 1)
    for path in paths[: step * count : step]:
        with path.open("r+b") as stream:
            stream.write(os.urandom(64))


def read(paths: list[Path], count: int) -> None:
    """Read every so-many-th file, as a job does."""
    step = max(len(paths) // max(count, 1), 1)
    for path in paths[: step * count : step]:
        path.read_bytes()


class Rsync:
    """``rsync -aHAX`` into a copy beside the current one, then a rename; or onto the current one in place."""

    def __init__(self, source: Path, place: Path, *, in_place: bool) -> None:
        self.source, self.place, self.in_place = source, place, in_place
        place.mkdir()

    def sync(self) -> None:
        current, new = self.place / "upper", self.place / ".upper.new"
        if self.in_place:
            self._rsync(current, [])
        else:
            self._rsync(new, [f"--link-dest={current}"] if current.exists() else [])
        descriptor = os.open(self.place, os.O_RDONLY)
        os.fsync(descriptor)  # the directory; what rsync wrote is synced by nobody, as in the scripts
        os.close(descriptor)
        if not self.in_place:
            old = self.place / ".upper.old"
            if current.exists():
                current.rename(old)
            new.rename(current)
            shutil.rmtree(old, ignore_errors=False) if old.exists() else None

    def _rsync(self, target: Path, more: list[str]) -> None:
        subprocess.run(
            ["rsync", "-aHAX", "--delete", "--numeric-ids", *more, f"{self.source}/", f"{target}/"], check=True
        )

    def restore(self, target: Path) -> None:
        subprocess.run(["rsync", "-aHAX", "--numeric-ids", f"{self.place}/upper/", f"{target}/"], check=True)


class Bench:
    """One layer and its peers."""

    def __init__(self, top: Path, disk: Disk, name: str, size_mb: int, ends: float) -> None:
        """``ends``: after that no second round of anything begins."""
        self.disk = disk
        self.ends = ends
        self.layer = Layer(name, top / "run" / name, disk.place / name / "base", disk.place / name / "persist",
                           top / "srv" / name, size_mb)  # fmt: skip
        self.layer.base.mkdir(parents=True)
        ramlayer.mount(self.layer, ROOT)
        self.peers = {
            "rsync": Rsync(self.layer.upper, disk.place / name / "rsync", in_place=False),
            "in place": Rsync(self.layer.upper, disk.place / name / "in place", in_place=True),
        }

    def first(self) -> dict[str, Cost]:
        ours = measure(self.disk, lambda: ramlayer.sync(self.layer, ROOT))
        return {"ours": ours} | {name: measure(self.disk, peer.sync) for name, peer in self.peers.items()}

    def warm(self, paths: list[Path]) -> None:
        """A few generations, so that there is a spare one, as in any layer that has run a while."""
        for _ in range(self.layer.keep + 1):
            change(paths, 1)
            ramlayer.sync(self.layer, ROOT)

    def settle(self) -> None:
        """Let our next sync find nothing of what was done before it."""
        for _ in range(2):
            time.sleep(2 * SLACK / 1e9)  # a sync looks again at what was touched in the clock's last ticks
            ramlayer.sync(self.layer, ROOT)
        time.sleep(2 * SLACK / 1e9)

    def rounds(self, repeat: int, prepare: Callable[[], object]) -> dict[str, Cost]:
        """Medians of ``repeat`` rounds; ``prepare`` changes the tree before each."""
        for peer in self.peers.values():
            peer.sync()
        found: dict[str, list[Cost]] = {"ours": [], **{name: [] for name in self.peers}}
        for number in range(repeat):
            if number and time.monotonic() > self.ends:
                _say(f"{number} rounds of {repeat}: the time is over")
                break
            self.settle()
            prepare()
            found["ours"].append(measure(self.disk, lambda: ramlayer.sync(self.layer, ROOT)))
            for name, peer in self.peers.items():
                found[name].append(measure(self.disk, peer.sync))
        return {name: Cost(*(statistics.median(getattr(cost, part) for cost in costs)
                             for part in ("seconds", "cpu", "written"))) for name, costs in found.items()}  # fmt: skip

    def command(self, repeat: int) -> float:
        """Seconds of a whole process that syncs an unchanged layer, the interpreter's start included."""
        code = (
            "import sys\nfrom pathlib import Path\n"
            "from organism.core import _ramlayer as r\nfrom organism.core._root import Root\n"
            "places = [Path(a) if a.startswith('/') else a for a in sys.argv[1:]]\n"
            f"r.sync(r.Layer(*places, {self.layer.size_mb}), Root())"
        )
        layer = self.layer
        words = [layer.name, *(str(path) for path in (layer.ram, layer.base, layer.persist, layer.merged))]
        spent = []
        for _ in range(repeat):
            began = time.monotonic()
            subprocess.run([sys.executable, "-I", "-c", code, *words], check=True)
            spent.append(time.monotonic() - began)
        return statistics.median(spent)

    def restore(self) -> dict[str, float]:
        found = {}
        for name, peer in self.peers.items():
            target = self.layer.ram.parent / f"restored-{name}"
            target.mkdir()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={self.layer.size_mb}M", "bench", str(target)], check=True
            )
            _forget()
            began = time.monotonic()
            peer.restore(target)
            found[name] = time.monotonic() - began
            subprocess.run(["umount", str(target)], check=True)
            target.rmdir()
        ramlayer.stop(self.layer, ROOT)
        _forget()
        began = time.monotonic()
        ramlayer.mount(self.layer, ROOT)
        return {"ours": time.monotonic() - began} | found


def _forget() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _sync_one(layer: Layer) -> None:
    ramlayer.sync(layer, ROOT)


def twelve(top: Path, disk: Disk, seconds: float) -> dict[str, float]:
    """Twelve layers synced together by twelve processes while a job writes to each in turn."""
    layers = []
    for number in range(12):
        name = f"gpu{number}"
        layer = Layer(name, top / "run12" / name, disk.place / "twelve" / name / "base",
                      disk.place / "twelve" / name / "persist", top / "srv12" / name, 64)  # fmt: skip
        layer.base.mkdir(parents=True)
        ramlayer.mount(layer, ROOT)
        make_tree(layer.merged, 500, 20_000)
        layers.append(layer)
    stalls: list[float] = []
    ended = threading.Event()

    def job() -> None:
        block, number = os.urandom(64 * 1024), 0
        while not ended.is_set():
            path = layers[number % 12].merged / f"out-{number % 40}"
            began = time.monotonic()
            with path.open("wb") as stream:
                stream.write(block)
            stalls.append(time.monotonic() - began)
            number += 1
            ended.wait(0.002)

    with ProcessPoolExecutor(12) as pool:
        list(pool.map(_sync_one, layers))  # the workers are up, and the first generation is there
        writer = threading.Thread(target=job)
        writer.start()
        began, cpu, rounds = time.monotonic(), _all_cpu(), 0
        while rounds < 3 or time.monotonic() - began < seconds:
            list(pool.map(_sync_one, layers))
            rounds += 1
        spent, used = time.monotonic() - began, _all_cpu() - cpu
        ended.set()
        writer.join()
    for layer in layers:
        ramlayer.stop(layer, ROOT)
    stalls.sort()
    return {"rounds": rounds, "seconds_a_round": spent / rounds, "cores": used / spent, "writes": len(stalls),
            "write_p50_ms": stalls[len(stalls) // 2] * 1000, "write_p99_ms": stalls[len(stalls) * 99 // 100] * 1000,
            "write_max_ms": stalls[-1] * 1000}  # fmt: skip


def _all_cpu() -> float:
    """Processor seconds of this process's children that are still there, found by their parent's number."""
    total, me, tick = 0.0, os.getpid(), os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == me:
            total += sum(int(number) for number in fields[11:15]) / tick
    return total


def absent_peers() -> list[str]:
    """Peers that cannot be had here, so that nobody takes their absence for a result."""
    found = []
    for package in ("anything-sync-daemon", "folder2ram", "log2ram", "profile-sync-daemon"):
        done = subprocess.run(["apt-cache", "policy", package], capture_output=True, text=True, check=False)
        if "Candidate: (none)" in done.stdout or not done.stdout.strip():
            found.append(package)
    return found


def main(words: list[str]) -> int:
    made = argparse.ArgumentParser(prog="./run bench ram", description=__doc__)
    made.add_argument("--files", type=int, default=50_000)
    made.add_argument("--repeat", type=int, default=3)
    made.add_argument("--minutes", type=float, default=8, help="after these, one round of each row has to do")
    made.add_argument("--seconds", type=float, default=20, help="of the twelve layers")
    made.add_argument(
        "--store-baseline", action="store_true", help="make this run the one that later ones are held against"
    )
    asked = made.parse_args(words)
    if os.geteuid() != 0:
        print("bench: mounting needs root; run it as root", file=sys.stderr)
        return 1
    alone()
    folder = Path(tempfile.mkdtemp(prefix="ram-bench-"))
    try:
        result = run(folder, asked)
    finally:
        for found in reversed(mounts(ROOT)):
            if found.target.startswith(f"{folder}/"):
                subprocess.run(["umount", "-l", found.target], check=True)
        shutil.rmtree(folder)
    _show(result)
    _keep(result, store=asked.store_baseline)
    return 0


def _say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    disk = Disk(folder)
    _say("how fast the disk is")
    limit = disk.bandwidth()
    rows: dict[str, dict[str, Cost]] = {}
    _say(f"{asked.files} files")
    ends = time.monotonic() + asked.minutes * 60
    many = Bench(folder, disk, "many", 1024, ends)
    paths = make_tree(many.layer.merged, asked.files, 2000)
    rows[f"first sync of {asked.files} files"] = many.first()
    many.warm(paths)
    for count in (0, 1, 1000):
        _say(f"{count} of them changed, {asked.repeat} rounds")
        row = rows[f"{count} of {asked.files} changed"] = many.rounds(asked.repeat, partial(change, paths, count))
        _say(", ".join(f"{who} {cost.seconds:.3f} s" for who, cost in row.items()))
    _say("1000 of them read")
    rows[f"0 of {asked.files} changed, 1000 read"] = many.rounds(asked.repeat, lambda: read(paths, 1000))
    many.settle()
    command = many.command(asked.repeat)
    _say("restore")
    restores = {f"{asked.files} files": many.restore()}
    ramlayer.stop(many.layer, ROOT)
    _say("500 MB")
    big = Bench(folder, disk, "big", 700, ends)
    paths = make_tree(big.layer.merged, 500, 1024 * 1024)
    big.first()
    big.warm(paths)
    rows["500 MB, 10 % changed"] = big.rounds(asked.repeat, lambda: change(paths, 50))
    restores["500 MB"] = big.restore()
    ramlayer.stop(big.layer, ROOT)
    _say("twelve layers")
    together = twelve(folder, disk, asked.seconds)
    idle = rows[f"0 of {asked.files} changed"]
    tenth = rows["500 MB, 10 % changed"]["ours"]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _processor(), "cores": os.cpu_count(), "kernel": platform.release(),
                    "load": os.getloadavg()[0], "python": platform.python_version()},
        "absent_peers": absent_peers(),
        "disk_mb_s": limit,
        "rows": {name: {who: vars(cost) for who, cost in row.items()} for name, row in rows.items()},
        "restore_seconds": restores,
        "whole_command_nothing_changed_seconds": command,
        "twelve_layers": together,
        "goals": {
            IN_PLACE: idle["ours"].seconds / idle["in place"].seconds,
            ATOMIC: idle["ours"].seconds / idle["rsync"].seconds,
            "nothing changed: our processor time / rsync's in place": idle["ours"].cpu / idle["in place"].cpu,
            "500 MB, 10 %: MB/s / the disk's": tenth.written / 1e6 / tenth.seconds / limit,
            CORES: together["cores"],
            STALL: together["write_p99_ms"],
        },
    }  # fmt: skip


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _show(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(
        f"{result['date']}  {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load']:.1f}, Linux {machine['kernel']}"
    )
    print(
        f"disk: {result['disk_mb_s']:.0f} MB/s in one synced write; "
        f"not to be had here: {', '.join(result['absent_peers'])}"
    )
    who = ("ours", "rsync", "in place")
    print(f"{'':<34}" + "".join(f"{what:^30}" for what in ("seconds", "processor seconds", "MB written")))
    print(f"{'':<34}" + "".join(f"{name:>10}" for name in who) * 3)
    for name, row in result["rows"].items():
        parts = [row[peer][part] / scale for part, scale in (("seconds", 1), ("cpu", 1), ("written", 1e6))
                 for peer in who]  # fmt: skip
        print(f"{name:<34}" + "".join(f"{part:>10.3f}" for part in parts))
    for name, row in result["restore_seconds"].items():
        print(f"{'restore ' + name:<34}" + "".join(f"{row[peer]:>10.3f}" for peer in who))
    print(f"a whole process that finds nothing changed: {result['whole_command_nothing_changed_seconds']:.3f} s")
    together = result["twelve_layers"]
    print("twelve layers together: " + ", ".join(f"{name} {value:.2f}" for name, value in together.items()))
    for name, value in result["goals"].items():
        verdict = "" if name not in GOALS else "  reached" if value <= GOALS[name] else "  NOT REACHED"
        print(f"  {name}: {value:.3f}{verdict}")
    baseline = HERE / "baseline" / "ram.json"
    if baseline.exists():
        before = json.loads(baseline.read_text())
        for name in result["goals"]:
            if name in before["goals"]:
                print(f"  baseline of {before['date'][:10]}: {name}: {before['goals'][name]:.3f}")


def _keep(result: dict[str, Any], *, store: bool) -> None:
    results = Path(os.environ.get("ORGANISM_CACHE") or HERE.parents[1] / ".cache") / "bench"
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    path = results / f"ram-{result['date'].replace(':', '')}.json"
    path.write_text(text)
    print(f"kept in {path}")
    if store:
        (HERE / "baseline").mkdir(exist_ok=True)
        (HERE / "baseline" / "ram.json").write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
