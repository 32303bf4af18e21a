# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of hosts as one HTML page: no file, font or script beside it, light and dark by the reader's choice.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d1d9e0;
  --host: #0969da; --vcpu: #1a7f37; --io: #9a6700; --bad: #cf222e; --shared: #8250df }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #3d444d;
  --host: #4493f8; --vcpu: #3fb950; --io: #d29922; --bad: #f85149; --shared: #ab7df8 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem }
h1, h2, h3 { line-height: 1.25 } section { border-top: 1px solid var(--line); margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line) }
td.n { text-align: right; font-variant-numeric: tabular-nums } td { overflow-wrap: anywhere }
code { font: 13px/1.5 ui-monospace, monospace } .soft { color: var(--soft) }
.PASS { color: var(--vcpu) } .FAIL, .worse { color: var(--bad); font-weight: 600 } .SKIP { color: var(--soft) }
.cores { display: flex; flex-wrap: wrap; gap: .4rem } .core { border: 1px solid var(--line); border-radius: .3rem;
  padding: .2rem; display: flex; gap: .2rem }
.cpu { min-width: 2rem; text-align: center; border-radius: .2rem; color: var(--paper); background: var(--soft);
  font-variant-numeric: tabular-nums; padding: 0 .2rem }
.host { background: var(--host) } .vcpu { background: var(--vcpu) } .io { background: var(--io) }
.shared { background: var(--shared) }
"""

_ZONES = {"host": "HOST: the house", "vcpu": "VCPU: virtual CPUs", "io": "IO: interrupts and packets"}


def _text(value: Any) -> str:
    return escape(str(value), quote=True)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any, kind: str = "") -> str:
    mark = f' class="{_text(kind)}"' if kind else ""
    return f"<td{mark}>{_text(value)}</td>"


def _plan(plan: Mapping[str, Any] | None) -> str:
    """Every core with its CPUs in the colour of their zone."""
    if not plan:
        return '<p class="soft">No CPU plan: level 1 has not run.</p>'
    zone_of = {cpu: "shared" if plan["shared"] else zone for zone in _ZONES for cpu in plan[zone]}
    cores = plan["cores"] or [[cpu] for cpu in sorted(zone_of)]
    drawn = "".join(
        '<span class="core">'
        + "".join(
            f'<span class="cpu {zone_of.get(cpu, "")}" title="{_text(zone_of.get(cpu, "none"))}">{_text(cpu)}</span>'
            for cpu in core
        )
        + "</span>"
        for core in cores
    )
    kinds = [("shared", "all zones are all CPUs")] if plan["shared"] else list(_ZONES.items())
    legend = " ".join(
        f'<span class="cpu {kind}">{_text("" if plan["shared"] else plan["lists"][kind])}</span> {_text(meaning)}'
        for kind, meaning in kinds
    )
    reasons = "".join(f"<li>{_text(reason)}</li>" for reason in plan["reasons"])
    return f'<div class="cores">{drawn}</div><p>{legend}</p><ul class="soft">{reasons}</ul>'


def _bench(found: Mapping[str, Any]) -> str:
    base, last = found.get("baseline"), found.get("last")
    problem = f'<p class="FAIL">{_text(found["problem"])}</p>' if found.get("problem") else ""
    if not base and not last:
        return f'{problem}<p class="soft">Not measured yet: ansible-playbook organism.proxmox.bench</p>'
    before = (base or {}).get("metrics", {})
    after = (last or {}).get("metrics", {})
    rows = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        about = new or old
        change, kind = "", "n"
        if old and new and old["value"]:
            percent = 100 * (new["value"] - old["value"]) / old["value"]
            change = f"{percent:+.0f} %"
            kind += " worse" if name in found["worse"] else ""
        shown = [f"{each['value']:g}" if each else "" for each in (old, new)]
        rows.append([_cell(name), *(_cell(each, "n") for each in shown), _cell(change, kind), _cell(about["unit"])])
    taken = [(each or {}).get("taken", "") for each in (base, last)]
    return problem + _table(["figure", f"baseline {taken[0]}", f"last {taken[1]}", "change", "unit"], rows)


def _checks(audit: Mapping[str, Any]) -> str:
    order = {False: 0, None: 1, True: 2}
    rows = []
    for each in sorted(audit["checks"], key=lambda check: order[check["ok"]]):
        verdict = "SKIP" if each["ok"] is None else "PASS" if each["ok"] else "FAIL"
        rows.append([_cell(verdict, verdict), *(_cell(each[key]) for key in ("check", "subject", "detail"))])
        if each["next"]:
            rows[-1][-1] = f"<td>{_text(each['detail'])}<br><code>{_text(each['next'])}</code></td>"
    return _table(["", "check", "subject", "found"], rows)


def _host(name: str, found: Mapping[str, Any]) -> str:
    audit = found["audit"]
    verdict = "PASS" if audit["ok"] else "FAIL"
    levels = [
        [
            _cell(number),
            _cell(marker["version"] if marker else "-"),
            _cell(marker["finished"] if marker else "not here"),
        ]
        for number, marker in sorted(found["levels"].items())
    ]
    pending = "".join(f"<li><code>{_text(entry)}</code></li>" for entry in found["pending"])
    facts = [[f"<th>{_text(key)}</th>", _cell(value)] for key, value in found["facts"].items()]
    sums = f"{audit['passed']} passed, {audit['failed']} failed, {audit['skipped']} skipped"
    return (
        f'<section><h2>{_text(name)} <span class="{verdict}">{verdict}</span></h2><p>{sums}</p>'
        f"<h3>Waits for a reboot</h3>{f'<ul>{pending}</ul>' if pending else '<p>Nothing.</p>'}"
        f"<h3>CPU plan</h3>{_plan(found['plan'])}"
        f"<h3>Levels</h3>{_table(['level', 'version', 'finished'], levels)}"
        f"<h3>Settings, now and after a boot</h3>{_checks(audit)}"
        f"<h3>Bench</h3>{_bench(found['bench'])}"
        f"<h3>Host</h3>{_table(['', ''], facts)}</section>"
    )


def render(hosts: Mapping[str, Mapping[str, Any]], unreached: Iterable[str], taken: str) -> str:
    """The page. ``hosts``: by name what ``host_audit`` returns of it; ``unreached``: hosts that gave no answer."""
    missing = "".join(f'<p class="FAIL">{_text(name)} gave no answer</p>' for name in sorted(unreached))
    body = "".join(_host(name, found) for name, found in sorted(hosts.items()))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>organism.proxmox: report</title><style>{_STYLE}</style></head><body>"
        f"<h1>Hosts</h1><p>{_text(taken)}, {len(hosts)} hosts</p>{missing}{body}</body></html>\n"
    )
