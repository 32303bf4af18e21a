# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How ``gpu-worker-ctl probe`` tells what it found."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from organism.worker.probe import Card, Probe

WORDS = {"works": "yes", "no": "no", "unknown": "?"}


def record(found: Probe) -> dict[str, Any]:
    """For machines; the tools' whole texts stay out of it."""
    cards = []
    for card in found.cards:
        values = asdict(card)
        cards.append({**values, "ok": not card.problem})
    return {
        "ok": found.ok,
        "problem": found.problem,
        "gpus": cards,
        "simulated": found.simulated,
        "cpu_only": [{"stack": device.stack, "device": device.name} for device in found.cpu_only],
        "unplaced": [{"stack": device.stack, "device": device.name} for device in found.unplaced],
        "tools": {stack: {"state": tool.state, "detail": tool.detail} for stack, tool in found.tools.items()},
    }


def lines(found: Probe) -> list[str]:
    """For people."""
    said: list[str] = []
    for card in found.cards:
        said += _card(card)
    said += [f"{gpu}: simulated; it needs no stack" for gpu in found.simulated]
    for stack, tool in found.tools.items():
        if tool.detail and not any(stack in card.stacks for card in found.cards):
            said.append(f"{stack}: {tool.detail}")
    for device in found.unplaced:
        said.append(f"{device.stack} lists {device.name}, but not which card that is; it counts for none")
    for device in found.cpu_only:
        said.append(f"{device.stack}: {device.name} is CPU only; it counts for no GPU")
    if found.problem:
        said.append(f"FAILED: {found.problem}")
    return said


def _card(card: Card) -> list[str]:
    name = ", ".join(card.ids) or ("no GPU of the pool" if not card.judged else "not in a map yet")
    nodes = " ".join(card.nodes) or "no device node"
    said = [f"{card.address}  {card.model}  ({name})", f"  driver {card.driver or 'none'}, {nodes}"]
    for stack, offer in card.stacks.items():
        what = ", ".join(part for part in (offer.device, offer.driver, offer.detail) if part)
        said.append(f"  {stack:<7}{WORDS[offer.state]:<4} {what}")
    if card.judged and card.problem:
        said.append(f"  FAILED: {card.problem}")
        said += [f"  next: {step}" for step in card.next]
    return said
