# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo: the product's main job done for real on this machine, told step by step."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import play
from .config import REPO, Node, Settings, load_state
from .errors import LabError
from .jobs import FINAL, STATES, Account, Job, audit, batch, counts, victim
from .lifecycle import Wish
from .remote import BIN, Remote
from .show import chapter, console, elapsed, say

BATCH_LIMIT = 180.0  # seconds; the batch takes about 30, the rest is for a loaded machine


def tell(where: Settings, wish: Wish) -> int:
    """Run the whole story. Gives the exit code: 0 when every job is accounted for and every check passed."""
    chapter("1. Boot the lab: throw-away systemd containers, no hardware needed")
    _lab_up(wish)
    state = load_state(where)
    if state is None:
        raise LabError("the lab vanished while it was brought up", "./run demo")
    remote = Remote(where, state)
    applied = where.folder / "applied"
    if not applied.exists():
        chapter("2. What would site.yml do? (--check --diff: nothing is changed)")
        forecast = _play(where, "check", "--check", "--diff")
        _tell_changes(forecast)
        say(f"the differences, line by line: {where.logs / 'check.log'}")
        chapter("3. Build it: ansible-playbook site.yml")
        _play(where, "site")
        applied.touch()
    chapter("4. Once more: a second run must find nothing to change")
    second = _play(where, "again")
    _require_unchanged(second)
    chapter("5. Jobs: some fail, one overruns, one is cancelled, and one worker is killed in the middle")
    accounts = Batch(remote).run()
    wrong = _tell_accounts(accounts)
    chapter("6. The pool: maestroctl top")
    console.print(escape(remote.text(remote.conductor, f"{BIN}/maestroctl", "top", "--once")))
    chapter("7. Proof from end to end: organism-validate")
    invalid = _validate(remote)
    chapter("What now?")
    _tell_next(where, remote.conductor)
    if wrong or invalid:
        console.print(
            f"[bold red]The demo failed:[/] {wrong} jobs are not as they must be, validation ended with {invalid}."
        )
        return 1
    console.print(
        f"[bold green]All {len(accounts)} jobs are accounted for, none lost, none twice.[/] ({elapsed().strip()})"
    )
    return 0


def _lab_up(wish: Wish) -> None:
    """Bring the lab up in a process of its own: only that part needs root."""
    words = [sys.executable, "-m", "lab", "up"]
    for option, value in (("--bus", wish.bus), ("--pool", wish.pool), ("--gpus", wish.gpus), ("--subnet", wish.subnet)):
        if value is not None:
            words += [option, str(value)]
    code = subprocess.run(words, cwd=REPO, check=False).returncode
    if code:
        raise LabError(
            f"the lab did not come up (exit code {code})", "see the message above; `./run clean` removes the lab"
        )


def _play(where: Settings, name: str, *arguments: str) -> str:
    """Run site.yml with its output in a log and the task at hand on the screen; gives the output."""
    where.logs.mkdir(parents=True, exist_ok=True)
    log = where.logs / f"{name}.log"
    began = time.monotonic()
    environment = {**play.environment(where), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
    with (
        log.open("w", encoding="utf-8") as file,
        console.status("ansible-playbook site.yml", spinner="dots") as status,
        subprocess.Popen(
            play.command(arguments), cwd=REPO, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        for line in process.stdout or ():
            file.write(line)
            if line.startswith("TASK ["):
                status.update(f"{elapsed()}  {escape(line[6:].split(']')[0])}")
            elif line.startswith("PLAY [") and not console.is_terminal:
                say(line.split("]")[0].removeprefix("PLAY ["))
    output = log.read_text(encoding="utf-8")
    figures = play.recap(output)
    if process.returncode:
        console.print(escape("\n".join(output.splitlines()[-25:])))
        raise LabError(f"site.yml ended with {process.returncode}", f"the whole output is {log}; again: ./run lab play")
    for host, figure in sorted(figures.items()):
        say(f"{host}: {figure['ok']} ok, {figure['changed']} changed, {figure['skipped']} skipped")
    say(f"[green]ok[/] site.yml {' '.join(arguments)} [dim]({time.monotonic() - began:.1f} s)[/]")
    return output


def _tell_changes(output: str) -> None:
    for task, hosts in play.changes(output).items():
        console.print(f"          would change: {escape(task)} [dim]({', '.join(hosts)})[/]")


def _require_unchanged(output: str) -> None:
    changed = {host: figure["changed"] for host, figure in play.recap(output).items() if figure["changed"]}
    if changed or not play.recap(output):
        _tell_changes(output)
        raise LabError(f"the second run changed something: {changed}", "this is a defect of the task named above")
    say("[green]changed=0[/] on every node")


@dataclass
class Batch:
    """Submits the jobs, cancels one, kills a worker under another, waits for all, and closes the accounts."""

    remote: Remote
    jobs: dict[str, Job] = field(default_factory=dict)
    killed: str = ""
    cancelled: bool = False

    def run(self) -> list[Account]:
        before = {str(record["task_id"]) for record in self.remote.jobs()}
        orders = batch()
        lines = "".join(json.dumps(job.order()) + "\n" for job in orders)
        answer = self.remote.maestro("submit", "--jsonl", "-", stdin=lines)
        self.jobs.update(zip(map(str, answer["task_ids"]), orders, strict=True))
        say(f"{len(self.jobs)} jobs submitted and acknowledged: each is on disk now")
        if again := before & set(self.jobs):
            raise LabError(f"these task ids were given out before: {', '.join(again)}")
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        ) as progress:  # fmt: skip
            bar = progress.add_task("jobs", total=len(self.jobs))
            for figures in self._until_final():
                final = sum(figures[state] for state in FINAL)
                text = "  ".join(f"{state} {figures[state]}" for state in (*STATES, "unseen") if figures[state])
                progress.update(bar, completed=final, description=text)
                if not console.is_terminal:
                    say(text)
        answer = self.remote.maestro("wait", *self.jobs, "--timeout", "60", timeout=90, may_fail=True)
        listed = self.remote.jobs()
        if not self.killed or not self.cancelled:
            raise LabError(
                "the batch ended before a worker could be killed or a job be cancelled", "run the demo again"
            )
        return audit(self.jobs, listed, answer.get("results", []))

    def _until_final(self) -> Iterator[dict[str, int]]:
        deadline = time.monotonic() + BATCH_LIMIT
        last: dict[str, int] | None = None
        while True:
            listed = self.remote.jobs()
            self._cancel(listed)
            self._kill(listed)
            figures = counts(self.jobs, listed)
            if figures != last:
                last = figures
                yield figures
            if sum(figures[state] for state in FINAL) == len(self.jobs):
                return
            if time.monotonic() > deadline:
                raise LabError(
                    f"after {BATCH_LIMIT:.0f} s not every job has ended: {dict(figures)}",
                    f"./run lab ssh {self.remote.conductor.name} {BIN}/maestroctl list",
                )

    def _cancel(self, listed: list[dict[str, object]]) -> None:
        for record in listed:
            task_id = str(record["task_id"])
            job = self.jobs.get(task_id)
            if job is not None and job.cancel and not self.cancelled and record["state"] == "running":
                self.remote.maestro("cancel", task_id)
                self.cancelled = True
                say(f"cancelled {task_id} while it runs on {record.get('gpu')}")

    def _kill(self, listed: list[dict[str, object]]) -> None:
        found = None if self.killed else victim(self.jobs, listed)
        if found is None:
            return
        gpu, task_id = found
        unit = f"gpu-worker@{gpu}.service"
        for node in self.remote.state.nodes:
            if "gpu_pool" in node.groups and self.remote.call(node, "systemctl", "is-active", unit).returncode == 0:
                pid = self.remote.text(node, "systemctl", "show", "--property=MainPID", "--value", unit).strip()
                self.remote.text(node, "systemctl", "kill", "--signal=KILL", "--kill-whom=main", unit)
                self.killed = gpu
                say(
                    f"[bold]killed[/] the worker of {gpu} (SIGKILL to process {pid} on {node.name}) under job {task_id}"
                )
                return
        raise LabError(f"no pool node runs {unit}", "./run lab ssh pool1 systemctl list-units 'gpu-worker@*'")


def _tell_accounts(accounts: list[Account]) -> int:
    """Print one line a job; gives the number of those that are wrong."""
    table = Table("job", "task", "expected", "got", "GPU", "attempts", "", box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for account in accounts:
        verdict = "[red]" + escape("; ".join(account.problems)) + "[/]" if account.problems else "[green]ok[/]"
        table.add_row(
            account.title, account.task_id, account.want, account.got, account.gpu, str(account.attempt), verdict
        )
    console.print(table)
    wrong = sum(1 for account in accounts if account.problems)
    say(f"{len(accounts)} submitted, {len(accounts) - wrong} ended once and as they must, {wrong} did not")
    return wrong


def _validate(remote: Remote) -> int:
    done = remote.call(remote.conductor, f"{BIN}/organism-validate", timeout=180)
    console.print(escape((done.stdout + done.stderr).rstrip()))
    return done.returncode


def _tell_next(where: Settings, conductor: Node) -> None:
    for command, meaning in (
        (f"./run lab ssh {conductor.name} maestroctl top", "the pool, live"),
        (f"./run lab ssh {conductor.name} maestroctl submit --wait -- uname -a", "a job of your own"),
        ("./run lab ssh pool1", "a root shell on the pool node"),
        ("./run lab play --tags level7", "a part of site.yml again"),
        (f"less {where.logs}/site.log", "what Ansible did"),
        ("./run clean", "remove everything the demo made"),
    ):
        console.print(f"  [bold]{escape(command)}[/]\n      {meaning}")
