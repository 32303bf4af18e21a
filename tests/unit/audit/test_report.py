# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The page of the report, and what is read for it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.organism.proxmox.plugins.filter.report_html import report_html
from organism.core import _check, _host_bench, _host_facts
from organism.core._check import Check
from organism.core._host_report import render
from organism.core._root import Root

EVIL = "<script>alert(1)</script>\"'"


def put(top: Path, name: str, text: str) -> None:
    path = top / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def result(value: float, iops: float) -> str:
    metrics = {
        "jitter.io.p99": _host_bench.metric([value], "us"),
        "disk.randread.iops": _host_bench.metric([iops], "iops"),
    }
    return _host_bench.render(metrics, taken="2026-11-22", kernel="6.12", conditions={})


def gathered(top: Path) -> dict[str, Any]:
    checks = [Check("host.now", EVIL, False, 0.1, EVIL, EVIL), Check("host.boot", "x", True, 0.1, "fine")]
    return {**_host_facts.gather(Root(top), lambda argv: EVIL), "audit": _check.as_dict(checks)}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    put(tmp_path, "proc/cmdline", f"root=/dev/sda1 {EVIL}\n")
    put(tmp_path, "proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 10 kB\n")
    put(tmp_path, "etc/os-release", 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n')
    put(tmp_path, "usr/bin/pveversion", "")
    plan = {"format": 1, "host": [0, 2], "vcpu": [1], "io": [3], "cores": [[0, 2], [1], [3]], "reasons": [EVIL]}
    put(tmp_path, "etc/organism/cpu_plan.json", json.dumps(plan))
    put(tmp_path, "run/organism/reboot-required.d/power", EVIL)
    put(tmp_path, "var/lib/organism/bench/baseline.json", result(100, 1000))
    put(tmp_path, "var/lib/organism/bench/2026-11-21.json", result(1, 1))
    put(tmp_path, "var/lib/organism/bench/2026-11-22.json", result(200, 1100))
    return tmp_path


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_beside_it_and_nothing_of_a_host_is_markup(host: Path) -> None:
    page = Page(text := render({EVIL: gathered(host)}, [EVIL], "now"))
    assert not page.open and not page.links and "script" not in page.tags
    assert page.text.count("alert(1)") == text.count("alert(1)") > 5
    assert "prefers-color-scheme: dark" in text and "url(" not in text and "@import" not in text
    assert "gave no answer" in page.text


def test_what_is_worse_than_the_baseline_is_marked_and_what_is_better_is_not(host: Path) -> None:
    text = render({"pve1": gathered(host)}, [], "now")
    assert '<td class="n worse">+100 %</td>' in text  # latency, against the newest result alone
    assert '<td class="n">+10 %</td>' in text
    assert _host_facts.bench(Root(host))["worse"] == ["jitter.io.p99"]


def test_every_cpu_is_drawn_once_in_the_colour_of_its_zone(host: Path) -> None:
    text = render({"pve1": gathered(host)}, [], "now")
    cores = text.split('<div class="cores">')[1].split("</div>")[0]
    drawn = [(kind, cores.count(f'class="cpu {kind}"')) for kind in ("host", "vcpu", "io")]
    assert drawn == [("host", 2), ("vcpu", 1), ("io", 1)]


def test_an_untouched_host_has_a_page_too(tmp_path: Path) -> None:
    put(tmp_path, "proc/cmdline", "quiet\n")
    text = render({"pve1": gathered(tmp_path)}, [], "now")
    assert "No CPU plan" in text and "Not measured yet" in text
    assert not Page(text).open


def test_a_damaged_result_is_told(host: Path) -> None:
    put(host, "var/lib/organism/bench/2026-11-23.json", "{")
    found = _host_facts.bench(Root(host))
    assert found["problem"].startswith("2026-11-23.json") and found["baseline"] and found["last"] is None


def test_the_filter_names_what_it_cannot_read() -> None:
    assert report_html({}, "now").startswith("<!DOCTYPE html>")
    with pytest.raises(AnsibleFilterError, match="not what host_audit returns"):
        report_html({"pve1": {}}, "now")
