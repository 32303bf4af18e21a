# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which compute stacks answer for each GPU of this machine: the tools are asked, and their devices put to the cards."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from organism.core import _gpu
from organism.core._gpu import Gpu
from organism.core._gpu_map import Entry
from organism.core._root import Root
from organism.worker import stacks
from organism.worker.stacks import Device

LIMIT = 20.0
"""Seconds for a tool."""
MOST = 8 * 1024 * 1024
"""Bytes of a tool's output that are read."""
MORE_PATH = ("/usr/sbin", "/opt/rocm/bin")
HIDING = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "CUDA_VISIBLE_DEVICES")
"""Variables that would hide cards from the tools."""


@dataclass(frozen=True)
class Tool:
    """How a stack is asked."""

    stack: str
    argv: tuple[str, ...]
    package: str
    """Debian's package of the command."""
    parse: Callable[[str], list[Device]]
    vendors: tuple[str, ...]
    """Makers whose cards the stack is for."""


TOOLS = (
    Tool("opencl", ("clinfo", "--raw"), "clinfo", stacks.parse_clinfo, ("amd", "nvidia", "intel")),
    Tool("vulkan", ("vulkaninfo",), "vulkan-tools", stacks.parse_vulkaninfo, ("amd", "nvidia", "intel")),
    Tool("rocm", ("rocminfo",), "rocminfo", stacks.parse_rocminfo, ("amd",)),
    Tool("cuda", ("nvidia-smi", "-q"), "nvidia-smi", stacks.parse_nvidia_smi, ("nvidia",)),
)
STACKS = tuple(tool.stack for tool in TOOLS)

DRIVER_PACKAGES = {
    "amd": "mesa-opencl-icd mesa-vulkan-drivers",
    "nvidia": "nvidia-driver libcuda1 nvidia-opencl-icd",
    "intel": "intel-opencl-icd mesa-vulkan-drivers",
}
POLARIS = re.compile(r"0x(67[c-f].|69[89].|6fdf|7300|730f)")
"""PCI device ids of gfx803: Polaris 10, 11, 12 and Fiji (the kernel's amdgpu_drv.c)."""


@dataclass(frozen=True)
class Answer:
    """What came of asking one tool."""

    state: str
    """``answered``, ``missing``, ``failed`` or ``hung``."""
    text: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Offer:
    """One stack on one card."""

    state: str
    """``works``, ``no`` (the tool answered without it, or with a broken one), ``unknown`` (the tool did not answer)."""
    device: str = ""
    driver: str = ""
    detail: str = ""


@dataclass
class Card:
    """One GPU of the machine, and what it offers."""

    address: str
    model: str
    driver: str | None
    nodes: list[str]
    ids: list[str]
    """Of the map; several for a card split into MIG instances."""
    judged: bool
    """False: it is no GPU of the pool, or a virtual machine has it; it is only listed."""
    stacks: dict[str, Offer] = field(default_factory=dict)
    problem: str = ""
    next: list[str] = field(default_factory=list)

    def works(self, stack: str) -> bool:
        return stack in self.stacks and self.stacks[stack].state == "works"


@dataclass
class Probe:
    """The whole answer."""

    cards: list[Card]
    tools: dict[str, Answer]
    cpu_only: list[Device]
    unplaced: list[Device]
    """GPU devices of which the tool does not tell which card they are."""
    simulated: list[str]
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and not any(card.problem for card in self.cards if card.judged)


def call(tool: Tool, limit: float = LIMIT, environ: Mapping[str, str] | None = None) -> Answer:
    """Ask one tool, for at most ``limit`` seconds and a little.

    The output goes to files: a process that hangs in the driver cannot be killed, and what waits for the end of its
    pipes or for its end hangs with it. Such a process is left behind.
    """
    env = {key: value for key, value in (environ or os.environ).items() if key not in HIDING} | {"LC_ALL": "C"}
    path = os.pathsep.join([env.get("PATH", os.defpath), *MORE_PATH])
    program = shutil.which(tool.argv[0], path=path)
    if program is None:
        return Answer("missing", detail=f"{tool.argv[0]} is not installed: apt-get install {tool.package}")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                [program, *tool.argv[1:]],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Answer("failed", detail=f"{program}: {error.strerror}")
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            stuck = _kill(process)
            left = f"; process {process.pid} hangs in the kernel and is left behind" if stuck else ""
            return Answer("hung", detail=f"{tool.argv[0]} did not answer within {limit:g} s{left}")
        text, complaint = _head(out.fileno()), _head(err.fileno())
    if code:
        lines = [line.strip() for line in (complaint + "\n" + text).splitlines() if line.strip()]
        said = next((line for line in lines if re.search(r"error|fail|not |unable|cannot", line, re.I)), "")
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        return Answer("failed", text, f"{tool.argv[0]} {how}: {(said or (lines or ['it said nothing'])[-1])[:200]}")
    return Answer("answered", text)


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """Whether it is still there."""
    os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so its group is still its own
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        return True
    return False


def _head(descriptor: int) -> str:
    return os.pread(descriptor, MOST, 0).decode(errors="replace")


def place(devices: list[Device], gpus: list[Gpu]) -> tuple[dict[str, list[Device]], list[Device]]:
    """Devices by the address of their card, and those whose card nobody can tell.

    A tool without addresses is believed where it lists as many of a maker's devices as there are cards of it.
    """
    placed: dict[str, list[Device]] = {}
    silent: dict[tuple[str, str, str], list[Device]] = {}
    unplaced: list[Device] = []
    for device in devices:
        if device.address:
            matches = [gpu for gpu in gpus if gpu.address == device.address or gpu.address[5:] == device.address]
            if len(matches) == 1:
                placed.setdefault(matches[0].address, []).append(device)
            else:
                unplaced.append(device)
        else:
            silent.setdefault((device.stack, device.driver, device.vendor), []).append(device)
    for (_stack, _driver, vendor), group in silent.items():
        cards = [gpu for gpu in gpus if gpu.vendor == vendor]
        if cards and len(group) == len(cards):
            for gpu, device in zip(cards, group, strict=True):
                placed.setdefault(gpu.address, []).append(device)
        else:
            unplaced += group
    return placed, unplaced


def judge(
    gpus: list[Gpu], entries: list[Entry] | None, answers: dict[str, Answer], root: Root, required: tuple[str, ...] = ()
) -> Probe:
    """Put together what was asked. ``entries`` is None where there is no map yet: then all cards count.

    ``required``: stacks that each GPU must have; without it any working one will do.
    """
    listed = {tool.stack: tool.parse(answers[tool.stack].text) for tool in TOOLS if tool.stack in answers}
    devices = [device for found in listed.values() for device in found]
    placed, unplaced = place([device for device in devices if not device.cpu], gpus)
    cards = [_card(gpu, entries, placed.get(gpu.address, []), answers, root) for gpu in gpus]
    for gpu, card in zip(gpus, cards, strict=True):
        _conclude(gpu, card, required, answers, root)
    expected = [entry for entry in entries or [] if entry.present and entry.backend != "simulated"]
    cards += [_vanished(entry) for entry in expected if not any(_is(entry, gpu) for gpu in gpus)]
    simulated = [entry.id for entry in entries or [] if entry.backend == "simulated"]
    probe = Probe(cards, answers, [device for device in devices if device.cpu], unplaced, simulated)
    if not any(card.judged for card in cards) and not simulated:
        probe.problem = (
            "this machine has no GPU that a worker could use; in a virtual machine look at `lspci -nn` here and at the"
            " passthrough on its host"
        )
    return probe


def _is(entry: Entry, gpu: Gpu) -> bool:
    """By UUID where both have one of the same kind, as in the map; a MIG instance is found by its card's address."""
    if entry.uuid and gpu.uuid and not entry.uuid.startswith("MIG-"):
        return entry.uuid == gpu.uuid
    return entry.address == gpu.address


def _card(gpu: Gpu, entries: list[Entry] | None, placed: list[Device], answers: dict[str, Answer], root: Root) -> Card:
    nodes = [f"/dev/dri/{gpu.render}"] if gpu.render else []
    if gpu.vendor == "nvidia":
        minor = _gpu.nvidia_information(root, gpu.address).get("Device Minor", "")
        nodes = ([f"/dev/nvidia{minor}"] if minor.isdecimal() else []) + nodes
    ids = [entry.id for entry in entries or [] if _is(entry, gpu)]
    judged = bool(ids) if entries else gpu.driver != "vfio-pci"
    card = Card(gpu.address, gpu.model, gpu.driver, nodes, ids, judged)
    for tool in TOOLS:
        if gpu.vendor in tool.vendors and tool.stack in answers:
            mine = [device for device in placed if device.stack == tool.stack]
            card.stacks[tool.stack] = _offer(mine, answers[tool.stack], tool)
    return card


def _offer(mine: list[Device], answer: Answer, tool: Tool) -> Offer:
    if answer.state != "answered":
        return Offer("unknown", detail=answer.detail)
    for device in sorted(mine, key=lambda device: bool(device.broken)):
        state = "no" if device.broken else "works"
        return Offer(state, device.name, device.driver, device.broken or device.note)
    return Offer("no", detail=f"{tool.argv[0]} does not list this card")


def _conclude(gpu: Gpu, card: Card, required: tuple[str, ...], answers: dict[str, Answer], root: Root) -> None:
    """The verdict on a card, and what to do about it."""
    if required:
        lacking = [stack for stack in required if not card.works(stack)]
        card.problem = f"lacks what is required: {', '.join(lacking)}" if lacking else ""
    else:
        lacking = list(card.stacks)
        card.problem = "" if any(card.works(stack) for stack in STACKS) else "no stack is known to work"
    if not card.problem:
        return
    if gpu.unusable:
        card.problem += f": {gpu.unusable}"
        card.next.append(f"`lspci -nnk -s {gpu.address}` shows its driver")
        return
    if not card.nodes:
        firmware = "; its firmware is in the package firmware-amd-graphics" if gpu.vendor == "amd" else ""
        card.next.append(f"driver {gpu.driver} made no device node: `dmesg | grep -i {gpu.driver}` says why{firmware}")
    elif closed := [node for node in card.nodes if root.exists(node) and not os.access(root.path(node), os.W_OK)]:
        card.next.append(f"you may not open {' and '.join(closed)}: probe as root, or join the group render")
    missing = [t.package for t in TOOLS if t.stack in lacking and t.stack in answers and _missing(answers[t.stack])]
    # ROCm's tool would only be an answer more, and its packages are large: not asked for unless it is wanted
    missing = [package for package in missing if package != "rocminfo" or "rocm" in required]
    if missing:
        card.next.append(f"apt-get install {' '.join(missing)}, and probe again")
    card.next.append(f"apt-get install {DRIVER_PACKAGES[gpu.vendor]}")
    if gpu.vendor == "amd":
        if POLARIS.match((root.read_or_none(f"{gpu.sysfs}/device") or "").strip()):
            card.next.append("ROCm has dropped this card (gfx803): use Vulkan by RADV or OpenCL by rusticl")
        card.next.append("OpenCL by rusticl shows the card only with RUSTICL_ENABLE=radeonsi in the environment")


def _missing(answer: Answer) -> bool:
    return answer.state == "missing"


def _vanished(entry: Entry) -> Card:
    problem = "the map has it, but no such card is there now"
    step = f"`lspci -nn -s {entry.address}`; in a virtual machine look at the passthrough on its host"
    return Card(entry.address, entry.model, None, [], [entry.id], judged=True, problem=problem, next=[step])


def probe(
    root: Root, entries: list[Entry] | None, limit: float = LIMIT, required: tuple[str, ...] = (),
    ask: Callable[[Tool, float], Answer] = call,
) -> Probe:  # fmt: skip
    """Look at the cards, and ask each tool that is for one of their makers (or is required), one after the other."""
    gpus = _gpu.discover(root)
    vendors = {gpu.vendor for gpu in gpus} or {"amd"}
    answers = {
        tool.stack: ask(tool, limit) for tool in TOOLS if vendors & set(tool.vendors) or tool.stack in required
    }  # fmt: skip
    return judge(gpus, entries, answers, root, required)
