#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: host_bench
short_description: Measure a host's jitter and disk latency, and compare them with its stored baseline
version_added: 0.1.0
description:
  - Runs C(cyclictest) on each CPU zone and C(fio) on a folder, several rounds each, and stores the medians in
    C(/var/lib/organism/bench).
  - The first result becomes the baseline. Later ones are compared with it, and the module fails when one is worse than
    O(tolerance_percent) allows; the result is stored all the same.
  - cyclictest runs at real-time priority 90. It would preempt running vCPUs, so the zone V(vcpu) is measured only with
    O(maintenance) or while no VM runs.
author: The organism.proxmox authors (!UNKNOWN)
extends_documentation_fragment:
  - organism.proxmox.attributes
attributes:
  diff_mode:
    support: none
    details: A measurement has no earlier value that could be predicted.
options:
  zones:
    description:
      - CPU lists by name of zone, such as V(0,6) for C(host) and V(1,7) for C(io).
      - Empty takes the zones of C(/etc/organism/cpu_plan.json), and where there are none all CPUs as one zone C(all).
    type: dict
    default: {}
  maintenance:
    description: Measure the zone V(vcpu) also while VMs run.
    type: bool
    default: false
  rounds:
    description: Rounds of each measurement. The median of the rounds counts.
    type: int
    default: 3
  loops:
    description: Wake-ups of each cyclictest thread and round; 0 leaves cyclictest out.
    type: int
    default: 50000
  interval_us:
    description: Time between two wake-ups in microseconds.
    type: int
    default: 200
  directory:
    description: Folder on the disk to measure. Empty leaves fio out.
    type: str
    default: ""
  size:
    description: Size of each fio job's file, as fio writes it.
    type: str
    default: 1G
  seconds:
    description: Seconds of each fio measurement and round.
    type: int
    default: 20
  jobs:
    description: Parallel fio jobs.
    type: int
    default: 4
  depth:
    description: Requests in flight of each fio job.
    type: int
    default: 32
  tolerance_percent:
    description: How much worse than the baseline a figure may be, in percent.
    type: int
    default: 25
  floor_us:
    description: A latency that is worse by less than this, in microseconds, is never a regression.
    type: int
    default: 20
  new_baseline:
    description: Make this result the baseline, whatever the stored one says.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Measure before tuning
  organism.proxmox.host_bench:
    directory: /mnt/fast/bench
    new_baseline: true

- name: Measure after tuning, and fail when something became worse
  organism.proxmox.host_bench:
    directory: /mnt/fast/bench
"""

RETURN = r"""
metrics:
  description: Figures by name, such as C(jitter.io.p99) (microseconds) or C(disk.randread.iops).
  returned: when something was measured
  type: dict
  sample: {"jitter.io.p99": {"value": 9, "unit": "us", "better": "lower", "samples": [9, 8, 11]}}
baseline:
  description: The figures compared with; empty when this result became the baseline.
  returned: when something was measured
  type: dict
regressions:
  description: What is worse than the baseline allows, a line each.
  returned: when something was measured
  type: list
  elements: str
  sample: []
skipped:
  description: What was not measured, and why.
  returned: always
  type: list
  elements: str
  sample: ["vcpu: 2 VMs are running; set maintenance=true to measure it all the same"]
file:
  description: Where the result is stored.
  returned: when something was measured
  type: str
  sample: /var/lib/organism/bench/2026-11-22T05-50-12Z.json
table:
  description: The figures for people, a line each.
  returned: when something was measured
  type: list
  elements: str
"""

import dataclasses
import datetime
import os
import pathlib
import shutil
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import (
    _ansible,
    _atomic,
    _cpu_list,
    _cpu_plan,
    _host_bench,
)
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root


def zones_to_measure(module: AnsibleModule, root: Root) -> dict[str, tuple[int, ...]]:
    """CPU numbers by zone. Raises ValueError for a list that is none."""
    if module.params["zones"]:
        return {str(name): _cpu_list.parse(str(cpus)) for name, cpus in module.params["zones"].items()}
    plan = _cpu_plan.load(root)
    if plan is None or plan.shared:
        return {"all": tuple(sorted(os.sched_getaffinity(0)))}
    return {"host": plan.host, "vcpu": plan.vcpu, "io": plan.io}


def running_vms(root: Root) -> int:
    """VMs that Proxmox VE has started: one scope each in qemu.slice (pve-common, Systemd.pm)."""
    return len(root.glob("/sys/fs/cgroup/qemu.slice/*.scope"))


def plan_of(module: AnsibleModule, root: Root) -> tuple[dict[str, tuple[int, ...]], bool, list[str]]:
    """(zones for cyclictest, whether fio runs, what is left out and why)."""
    skipped = []
    zones = zones_to_measure(module, root)
    vms = running_vms(root)
    if "vcpu" in zones and vms and not module.params["maintenance"]:
        skipped.append(f"vcpu: {vms} VMs are running; set maintenance=true to measure it all the same")
        del zones["vcpu"]
    if module.params["loops"] == 0:
        skipped.append("jitter: loops is 0")
        zones = {}
    for name, cpus in zones.items():
        foreign = sorted(set(cpus) - os.sched_getaffinity(0))
        if foreign or not cpus:
            raise ValueError(f"zone {name}: CPUs {foreign or 'none'} cannot be used here")
    fio = bool(module.params["directory"])
    if not fio:
        skipped.append("disk: no directory given")
    elif not pathlib.Path(module.params["directory"]).is_dir():
        raise ValueError(f"directory {module.params['directory']} does not exist")
    return zones, fio, skipped


def run(module: AnsibleModule, command: list[str]) -> str:
    code, out, err = module.run_command(command)
    if code:
        module.fail_json(msg=f"{command[0]} ended with {code}: {err.strip()[-600:]}", cmd=command, rc=code)
    return str(out)


def measure_jitter(module: AnsibleModule, zone: str, cpus: tuple[int, ...]) -> dict[str, _host_bench.Metric]:
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _round in range(module.params["rounds"]):
            output = f"{folder}/cyclictest.json"
            command = _host_bench.cyclictest_command(
                cpus, interval_us=module.params["interval_us"], loops=module.params["loops"], output=output
            )
            run(module, command)
            rounds.append(_host_bench.parse_cyclictest(pathlib.Path(output).read_text(encoding="utf-8")))
    return _host_bench.jitter_metrics(zone, rounds)


def measure_disk(module: AnsibleModule, pattern: str) -> dict[str, _host_bench.Metric]:
    options = {key: module.params[key] for key in ("size", "seconds", "jobs", "depth")}
    command = _host_bench.fio_command(pattern, module.params["directory"], **options)
    direction = pattern.removeprefix("rand")
    rounds = [_host_bench.parse_fio(run(module, command))[direction] for _round in range(module.params["rounds"])]
    return _host_bench.disk_metrics(pattern, rounds)


def stored_baseline(path: pathlib.Path) -> dict[str, _host_bench.Metric]:
    if not path.exists():
        return {}
    return _host_bench.parse(path.read_text(encoding="utf-8"))[0]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "zones": {"type": "dict", "default": {}},
            "maintenance": {"type": "bool", "default": False},
            "rounds": {"type": "int", "default": 3},
            "loops": {"type": "int", "default": 50000},
            "interval_us": {"type": "int", "default": 200},
            "directory": {"type": "str", "default": ""},
            "size": {"type": "str", "default": "1G"},
            "seconds": {"type": "int", "default": 20},
            "jobs": {"type": "int", "default": 4},
            "depth": {"type": "int", "default": 32},
            "tolerance_percent": {"type": "int", "default": 25},
            "floor_us": {"type": "int", "default": 20},
            "new_baseline": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    root = Root()
    folder = root.path(_host_bench.RESULTS)
    try:
        zones, fio, skipped = plan_of(module, root)
        baseline = {} if module.params["new_baseline"] else stored_baseline(folder / _host_bench.BASELINE)
    except (ValueError, _host_bench.BenchError) as error:
        _ansible.refuse(module, str(error))
    if module.params["rounds"] < 1:
        _ansible.refuse(module, f"rounds is {module.params['rounds']}: at least one is needed")
    if not zones and not fio:
        _ansible.refuse(module, "nothing to measure: " + "; ".join(skipped), skipped=skipped)
    missing = [tool for tool, used in (("cyclictest", zones), ("fio", fio)) if used and not shutil.which(tool)]
    if missing and not module.check_mode:
        _ansible.refuse(module, f"{' and '.join(missing)} not found: install the Debian packages rt-tests and fio")
    if module.check_mode:
        what = [*zones, *(["disk"] if fio else [])]
        module.exit_json(changed=True, msg=f"would measure {', '.join(what)}", skipped=skipped)
    measure(module, folder, zones, fio, skipped, baseline)


def measure(
    module: AnsibleModule,
    folder: pathlib.Path,
    zones: dict[str, tuple[int, ...]],
    fio: bool,
    skipped: list[str],
    baseline: dict[str, _host_bench.Metric],
) -> None:
    metrics: dict[str, _host_bench.Metric] = {}
    try:
        for zone, cpus in zones.items():
            metrics.update(measure_jitter(module, zone, cpus))
        for pattern in _host_bench.PATTERNS if fio else ():
            metrics.update(measure_disk(module, pattern))
    except _host_bench.BenchError as error:
        _ansible.refuse(module, str(error))
    now = datetime.datetime.now(tz=datetime.UTC)
    kept = ("rounds", "loops", "interval_us", "directory", "size", "seconds", "jobs", "depth")
    conditions: dict[str, Any] = {key: module.params[key] for key in kept}
    conditions["zones"] = {name: _cpu_list.render(cpus) for name, cpus in zones.items()}
    text = _host_bench.render(
        metrics, taken=now.strftime("%Y-%m-%dT%H:%M:%SZ"), kernel=os.uname().release, conditions=conditions
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    file = folder / now.strftime("%Y-%m-%dT%H-%M-%SZ.json")
    _atomic.write_atomic(file, text)
    if not baseline:
        _atomic.write_atomic(folder / _host_bench.BASELINE, text)
    worse = _host_bench.regressions(metrics, baseline, module.params["tolerance_percent"], module.params["floor_us"])
    result = {
        "metrics": {name: dataclasses.asdict(value) for name, value in metrics.items()},
        "baseline": {name: dataclasses.asdict(value) for name, value in baseline.items()},
        "regressions": [str(one) for one in worse],
        "skipped": skipped,
        "file": str(file),
        "table": list(_host_bench.summary(metrics, baseline)),
    }
    if worse:
        message = "worse than the baseline: " + "; ".join(str(one) for one in worse)
        module.fail_json(msg=f"{message}. The result is in {file}", changed=True, **result)
    what = "compared with the baseline" if baseline else "this is the baseline now"
    module.exit_json(changed=True, msg=f"{len(metrics)} figures in {file}; {what}", **result)


if __name__ == "__main__":
    main()
