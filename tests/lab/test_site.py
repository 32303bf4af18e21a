# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""site.yml on real systemd: its check mode tells the truth, its first run builds, its second finds nothing to do.

What the roles did is looked at with other tools than ours (ss, systemctl, findmnt, stat); then the pool is used.
"""

from __future__ import annotations

import json
import shlex
import signal
from dataclasses import dataclass

import pytest

from lab import host, nodes, play
from lab.config import require_state
from lab.demo import Batch
from lab.driver import Lab
from lab.remote import BIN, Remote

# Every file that changed since a moment, but for what a running system writes by itself and Ansible's own scratch.
CHANGED_SINCE = (
    "find / -xdev -newer /root/moment ! -type d ! -path /root/moment ! -path '/root/.ansible/*' "
    "! -path '/var/log/*' ! -path '/var/lib/chrony/*' ! -path '/var/lib/systemd/*' ! -path '/tmp/*' "
    "! -path '/var/tmp/*'"
)
# What a python on the node prints about the bus's greeting (NATS protocol: INFO comes first, in clear).
GREETING = "import socket; print(socket.create_connection(('bus1', 4222), 5).makefile().readline().partition(' ')[2])"


# What check mode foretells under another task's name, since its own needs something that the run has yet to make:
# the start of a task's name -> the task that foretells it.
FORETOLD_BY = {
    "runtime : push | Push wheels": "runtime : Install and switch",
    "nats : certificates |": "nats : Foretell certificates",
    "nats : trust | Install the authority's certificate": "nats : Foretell certificates",
    "nats : configure | Have the server running": "nats : configure | Install the unit",
    "nats : configure | Have the watch running": "nats : configure | Install the watch over its disk",
}


@dataclass
class Site:
    """A lab on which site.yml ran three times: in check mode, for real, and again."""

    lab: Lab
    forecast: str
    touched: dict[str, str]
    first: str
    second: str

    def gpus(self, node: str) -> list[str]:
        """Logical ids of a node's GPUs, by the workers' units."""
        units = self.lab.sh(node, "systemctl list-units --plain --no-legend 'gpu-worker@*.service'")
        return [line.split()[0].removeprefix("gpu-worker@").removesuffix(".service") for line in units.splitlines()]

    def remote(self) -> Remote:
        return Remote(self.lab.where, require_state(self.lab.where))


@pytest.fixture(scope="module")
def site(site_lab: Lab) -> Site:
    names = [record["name"] for record in site_lab.status()]
    for name in names:
        site_lab.sh(name, "touch /root/moment")
    forecast = site_lab.must("play", "--check", "--diff")
    touched = {name: site_lab.sh(name, CHANGED_SINCE) for name in names}
    return Site(site_lab, forecast, touched, first=site_lab.must("play"), second=site_lab.must("play", "--diff"))


def test_check_mode_changes_nothing(site: Site) -> None:
    assert site.touched == dict.fromkeys(site.touched, "")


def test_check_mode_foretells_what_the_first_run_does(site: Site) -> None:
    foretold, done = play.changes(site.forecast), play.changes(site.first)
    assert len(foretold) > 5
    surprises = {}
    for task, hosts in done.items():
        name = task.removeprefix("organism.proxmox.")
        other = next((by for start, by in FORETOLD_BY.items() if name.startswith(start)), None)
        known = hosts if f"organism.proxmox.{other}" in foretold else foretold.get(task, [])
        if not set(hosts) <= set(known):
            surprises[task] = hosts
    assert surprises == {}


def test_a_second_run_changes_nothing(site: Site) -> None:
    figures = play.recap(site.second)
    assert set(figures) == set(site.touched)
    assert {name: figure["changed"] for name, figure in figures.items()} == dict.fromkeys(figures, 0), site.second


def test_every_node_is_sound(site: Site) -> None:
    for name in site.touched:
        failed = site.lab.sh(name, "systemctl list-units --failed --plain --no-legend")
        assert failed == ""
        assert site.lab.sh(name, "systemctl is-system-running").strip() == "running"


def listening(lab: Lab, node: str) -> dict[int, set[str]]:
    """TCP port -> addresses on which something listens, as ss sees it."""
    found: dict[int, set[str]] = {}
    for line in lab.sh(node, "ss -Hltn").splitlines():
        address, _, port = line.split()[3].rpartition(":")
        found.setdefault(int(port), set()).add(address)
    return found


def test_the_bus_listens_and_its_monitoring_stays_on_loopback(site: Site) -> None:
    ports = listening(site.lab, "bus1")
    assert 4222 in ports
    outside = {port for port, addresses in ports.items() if not addresses <= {"127.0.0.1", "[::1]"}}
    assert outside <= {22, 4222, 6222}
    assert set(listening(site.lab, "pool1")) == {22}


def test_the_bus_wants_keys_and_tls(site: Site) -> None:
    greeting = json.loads(site.lab.sh("pool1", f"python3 -c {shlex.quote(GREETING)}"))
    assert greeting["auth_required"] is True
    assert greeting["tls_required"] is True
    assert greeting["jetstream"] is True


def test_keys_are_readable_to_their_owners_only(site: Site) -> None:
    for name in site.touched:
        listing = site.lab.sh(name, "find /etc/organism/keys -type f -printf '%m %u %p\\n'").splitlines()
        assert listing
        assert [line for line in listing if int(line.split()[0], 8) & 0o007] == []


def test_every_gpu_has_a_worker_and_an_overlay_with_explicit_options(site: Site) -> None:
    gpus = site.gpus("pool1")
    assert len(gpus) == 4
    for gpu in gpus:
        assert site.lab.sh("pool1", f"systemctl is-active gpu-worker@{gpu}.service").strip() == "active"
        kind, options = site.lab.sh(
            "pool1", f"findmnt --noheadings --output FSTYPE,OPTIONS /srv/gpucache/{gpu}"
        ).split()
        assert kind == "overlay"
        upper = next(word.removeprefix("upperdir=") for word in options.split(",") if word.startswith("upperdir="))
        assert site.lab.sh("pool1", f"stat --file-system --format=%T {upper}").strip() == "tmpfs"


def test_jobs_are_accounted_for_although_a_worker_is_killed(site: Site) -> None:
    batch = Batch(site.remote())
    accounts = batch.run()
    assert len(accounts) == 24
    assert batch.killed
    assert [account for account in accounts if account.problems] == []


def test_a_python_program_travels_to_a_unit_of_its_own(site: Site) -> None:
    program = (
        "import json, os, pathlib, sys\n"
        "own = pathlib.Path('/proc/self/cgroup').read_text().strip().rsplit('/', 1)[-1]\n"
        "print(json.dumps({'unit': own, 'root': os.geteuid() == 0, 'words': sys.argv[1:]}))\n"
    )
    remote = site.remote()
    submit = ("--python", "-", "--", "one", "two words")
    answer = remote.maestro("submit", *submit, stdin=program)
    waited = remote.maestro("wait", str(answer["task_id"]), "--timeout", "60", timeout=90, may_fail=True)
    ((state, told),) = [(result["state"], json.loads(result["data"]["stdout"])) for result in waited["results"]]
    assert (state, told["root"], told["words"]) == ("done", False, ["one", "two words"])
    assert told["unit"].startswith("organism-job-") and str(answer["task_id"]) in told["unit"]


def test_a_job_survives_the_loss_of_its_whole_node(site: Site) -> None:
    remote = site.remote()
    answer = remote.maestro("submit", "--retries", "3", "--", "sh", "-c", "sleep 5; hostname")
    task_id = str(answer["task_id"])
    remote.call(remote.conductor, f"{BIN}/maestroctl", "--json", "wait", task_id, "--timeout", "1")
    watch = host.Watch(nodes.running(site.lab.where)["pool1"].supervisor)
    watch.signal(signal.SIGKILL)
    assert watch.ended(timeout=30)
    watch.close()
    site.lab.must("up")
    waited = remote.maestro("wait", task_id, "--timeout", "120", timeout=150, may_fail=True)
    assert [(result["state"], result["data"]["stdout"]) for result in waited["results"]] == [("done", "pool1\n")]


def test_the_pool_comes_back_by_itself_when_all_nodes_were_off(site: Site) -> None:
    site.lab.must("down")
    site.lab.must("up")
    remote = site.remote()
    answer = remote.maestro("submit", "--patience", "60", "--", "hostname", timeout=90)
    waited = remote.maestro("wait", str(answer["task_id"]), "--timeout", "60", timeout=90, may_fail=True)
    assert [result["state"] for result in waited["results"]] == ["done"]
    test_every_node_is_sound(site)


def test_validation_passes_and_names_a_gpu_whose_worker_is_stopped(site: Site) -> None:
    remote = site.remote()
    passed = remote.call(remote.conductor, f"{BIN}/organism-validate", timeout=180)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    gpu = site.gpus("pool1")[0]
    site.lab.sh("pool1", f"systemctl stop gpu-worker@{gpu}.service")
    try:
        failed = remote.call(remote.conductor, f"{BIN}/organism-validate", timeout=180)
    finally:
        site.lab.sh("pool1", f"systemctl start gpu-worker@{gpu}.service")
    assert failed.returncode == 1
    assert gpu in failed.stdout
