# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which stacks work for which card, from tools that answer, lack, fail or hang."""

from __future__ import annotations

import json
import os
import select
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from unit.gpu.trees import Card, make_tree, rx580
from unit.worker.stack_outputs import Cl, clinfo, khr, nvidia_smi, recorded, rocminfo, vulkaninfo

from organism.cli import gpu_worker_ctl
from organism.core._gpu_map import Entry, render_map
from organism.core._root import Root
from organism.worker import probe as probing
from organism.worker.probe import TOOLS, Answer, Probe

ONE, TWO = "0000:03:00.0", "0000:1b:00.0"
POCL, LLVMPIPE = recorded("clinfo_pocl.txt"), recorded("vulkaninfo_llvmpipe.txt")
NOTHING = {"opencl": "#PLATFORMS 0\n", "vulkan": "", "rocm": "", "cuda": ""}


def look(root: Root, texts: dict[str, str | Answer], entries: list[Entry] | None = None, *required: str) -> Probe:
    """``texts``: answers that differ from "nothing is there"."""

    def ask(tool: probing.Tool, _limit: float) -> Answer:
        told = {**NOTHING, **texts}[tool.stack]
        return told if isinstance(told, Answer) else Answer("answered", told)

    return probing.probe(root, entries, required=required, ask=ask)


@pytest.fixture
def pair(tmp_path: Path) -> Root:
    return Root(make_tree(tmp_path / "pair", [rx580(ONE, 128), rx580(TWO, 129)]))


def states(found: Probe, stack: str) -> dict[str, str]:
    return {card.address: card.stacks[stack].state for card in found.cards}


def test_each_stack_is_put_to_its_card(pair: Root) -> None:
    found = look(
        pair,
        {
            "opencl": clinfo({"Clover": [], "rusticl": [Cl("RX 580", place=khr(TWO))]}),
            "vulkan": vulkaninfo([ONE]),
            "rocm": rocminfo([TWO]),
        },
    )
    assert found.ok
    assert states(found, "opencl") == {ONE: "no", TWO: "works"}
    assert states(found, "vulkan") == {ONE: "works", TWO: "no"}
    assert states(found, "rocm") == {ONE: "no", TWO: "works"}
    assert [card.nodes for card in found.cards] == [["/dev/dri/renderD128"], ["/dev/dri/renderD129"]]
    assert "cuda" not in found.tools, "no card of NVIDIA is there"


def test_cpu_devices_are_listed_and_count_for_no_card(pair: Root) -> None:
    found = look(pair, {"opencl": POCL, "vulkan": LLVMPIPE})
    assert not found.ok
    assert [(device.stack, device.cpu) for device in found.cpu_only] == [("opencl", True), ("vulkan", True)]
    assert not found.unplaced
    for card in found.cards:
        assert card.problem
        assert {offer.state for offer in card.stacks.values()} == {"no"}


def test_a_polaris_without_a_stack_is_told_what_still_has_it(pair: Root) -> None:
    steps = "\n".join(look(pair, {}).cards[0].next)
    for word in ("gfx803", "mesa-opencl-icd", "mesa-vulkan-drivers", "RUSTICL_ENABLE=radeonsi"):
        assert word in steps


def test_a_newer_card_is_not_said_to_be_dropped(tmp_path: Path) -> None:
    root = Root(make_tree(tmp_path, [Card(ONE, device="0x66af", minor=128)]))
    assert "dropped" not in "\n".join(look(root, {}).cards[0].next)


def test_a_missing_tool_is_no_missing_stack(pair: Root) -> None:
    lacking = Answer("missing", detail="clinfo is not installed: apt-get install clinfo")
    found = look(pair, {"opencl": lacking})
    assert states(found, "opencl") == {ONE: "unknown", TWO: "unknown"}
    assert not found.ok
    assert found.cards[0].next[0] == "apt-get install clinfo, and probe again"


def test_devices_without_address_count_only_when_there_are_enough(pair: Root) -> None:
    both = look(pair, {"opencl": clinfo({"Clover": [Cl("a"), Cl("b")]})})
    assert states(both, "opencl") == {ONE: "works", TWO: "works"}
    single = look(pair, {"opencl": clinfo({"Clover": [Cl("a")]})})
    assert states(single, "opencl") == {ONE: "no", TWO: "no"}
    assert [device.name for device in single.unplaced] == ["a"]


def test_a_bus_in_two_domains_is_not_guessed(tmp_path: Path) -> None:
    root = Root(make_tree(tmp_path, [rx580(ONE, 128), rx580("0001:03:00.0", 129)]))
    found = look(root, {"rocm": rocminfo([ONE])})
    assert [device.stack for device in found.unplaced] == ["rocm"]
    assert not found.ok


def test_a_broken_device_gives_way_to_a_working_one(pair: Root) -> None:
    broken, working = Cl("old", place=khr(ONE), compiler=False), Cl("new", place=khr(ONE))
    found = look(pair, {"opencl": clinfo({"Clover": [broken], "rusticl": [working]})})
    assert (found.cards[0].stacks["opencl"].state, found.cards[0].stacks["opencl"].device) == ("works", "new")
    found = look(pair, {"opencl": clinfo({"Clover": [broken]})})
    assert found.cards[0].stacks["opencl"].state == "no"
    assert "compiler" in found.cards[0].stacks["opencl"].detail


def test_what_is_required_decides(pair: Root) -> None:
    texts: dict[str, str | Answer] = {"vulkan": vulkaninfo([ONE, TWO])}
    assert look(pair, texts, None, "vulkan").ok
    found = look(pair, texts, None, "vulkan", "opencl")
    assert [card.problem for card in found.cards] == ["lacks what is required: opencl"] * 2


def test_the_map_says_which_cards_count(pair: Root) -> None:
    texts: dict[str, str | Answer] = {"vulkan": vulkaninfo([ONE])}
    assert not look(pair, texts).ok
    found = look(pair, texts, [Entry("gpu0", "amdgpu", ONE)])
    assert found.ok
    assert [(card.ids, card.judged) for card in found.cards] == [(["gpu0"], True), ([], False)]
    gone = look(pair, texts, [Entry("gpu0", "amdgpu", ONE), Entry("gpu1", "amdgpu", "0000:44:00.0")])
    assert not gone.ok
    assert "no such card" in gone.cards[-1].problem
    away = Entry("gpu1", "amdgpu", "0000:44:00.0", present=False)
    assert look(pair, texts, [Entry("gpu0", "amdgpu", ONE), away]).ok, "it is known to be away"


def test_a_card_keeps_its_id_in_another_slot_and_no_other_card_takes_it(tmp_path: Path) -> None:
    root = Root(make_tree(tmp_path, [Card(ONE, minor=128, unique_id="aa"), Card(TWO, minor=129, unique_id="bb")]))
    moved, gone = Entry("gpu0", "amdgpu", ONE, uuid="bb"), Entry("gpu1", "amdgpu", TWO, uuid="cc")
    found = look(root, {"vulkan": vulkaninfo([ONE, TWO])}, [moved, gone])
    assert [(card.address, card.ids) for card in found.cards] == [(ONE, []), (TWO, ["gpu0"]), (TWO, ["gpu1"])]
    assert "no such card" in found.cards[2].problem


def test_the_instances_of_a_split_card_share_its_stacks(tmp_path: Path) -> None:
    root = Root(make_tree(tmp_path, [Card(ONE, vendor="0x10de", device="0x2335", driver="nvidia", uuid="GPU-1")]))
    parts = [Entry(f"gpu{number}", "nvml", ONE, uuid=f"MIG-{number}") for number in range(2)]
    found = look(root, {"cuda": nvidia_smi([ONE])}, parts)
    assert found.ok
    assert [card.ids for card in found.cards] == [["gpu0", "gpu1"]]


def test_a_machine_without_gpus_fails_unless_it_simulates_them(tmp_path: Path) -> None:
    root = Root(make_tree(tmp_path, []))
    assert "passthrough" in look(root, {}).problem
    assert look(root, {}, [Entry("sim0", "simulated", "sim:0")]).ok


def test_a_card_of_a_virtual_machine_is_only_listed(tmp_path: Path) -> None:
    root = Root(make_tree(tmp_path, [Card(ONE, driver="vfio-pci"), rx580(TWO, 129)]))
    found = look(root, {"vulkan": vulkaninfo([TWO])})
    assert [card.judged for card in found.cards] == [False, True]
    assert found.ok


def test_a_card_without_driver_or_nodes_is_sent_to_the_kernel(tmp_path: Path) -> None:
    root = Root(make_tree(tmp_path, [Card(ONE, driver=None), Card(TWO)]))
    unbound, dumb = look(root, {}).cards
    assert "no driver is bound" in unbound.problem
    assert "lspci -nnk -s 0000:03:00.0" in unbound.next[0]
    assert "dmesg | grep -i amdgpu" in dumb.next[0]


def test_a_node_that_one_may_not_open(pair: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    node = pair.path("/dev/dri/renderD128")
    node.parent.mkdir(parents=True)
    node.touch()
    monkeypatch.setattr(os, "access", lambda path, _mode: path != node)
    assert look(pair, {}).cards[0].next[0].startswith("you may not open /dev/dri/renderD128")
    assert not look(pair, {}).cards[1].next[0].startswith("you may not open")


def test_nvidia_cards_have_their_own_nodes_and_stack(tmp_path: Path) -> None:
    card = Card(ONE, vendor="0x10de", device="0x2335", driver="nvidia", uuid="GPU-1")
    root = Root(make_tree(tmp_path, [card]))
    found = look(root, {"cuda": nvidia_smi([ONE])})
    assert found.ok
    assert set(found.tools) == {"opencl", "vulkan", "cuda"}
    assert found.cards[0].nodes == ["/dev/nvidia0"]
    assert not look(root, {"cuda": nvidia_smi([ONE], cuda="Not Found")}).ok


# ---- the tools as processes ------------------------------------------------------------------------------------------

CLINFO = TOOLS[0]


def fake(tmp_path: Path, name: str, script: str) -> None:
    """A command of that name, first in the PATH of ``environ``."""
    program = tmp_path / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def environ(tmp_path: Path) -> dict[str, str]:
    return {"PATH": str(tmp_path / "bin")}


@pytest.fixture
def _nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "MORE_PATH", ())


@pytest.mark.usefixtures("_nowhere_else")
def test_a_tool_that_is_not_installed_names_its_package(tmp_path: Path) -> None:
    for tool in TOOLS:
        answer = probing.call(tool, environ=environ(tmp_path))
        assert answer.state == "missing"
        assert answer.detail.endswith(f"apt-get install {tool.package}")


def test_a_tool_is_called_without_what_hides_cards(tmp_path: Path) -> None:
    fake(tmp_path, "clinfo", 'echo "$@ ${ROCR_VISIBLE_DEVICES-shown} $LC_ALL $RUSTICL_ENABLE"')
    given = {**environ(tmp_path), "ROCR_VISIBLE_DEVICES": "-1", "RUSTICL_ENABLE": "radeonsi"}
    assert probing.call(CLINFO, environ=given) == Answer("answered", "--raw shown C radeonsi\n")


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        (
            "echo before; echo 'ERROR: no driver' >&2; echo trailing >&2; exit 3",
            "clinfo ended with 3: ERROR: no driver",
        ),
        ("echo 'ROCk module is NOT loaded'; exit 1", "clinfo ended with 1: ROCk module is NOT loaded"),
        ("exit 1", "clinfo ended with 1: it said nothing"),
        ("kill -SEGV $$", "clinfo was ended by signal 11: it said nothing"),
    ],
)
def test_a_tool_that_fails_says_why(tmp_path: Path, script: str, detail: str) -> None:
    fake(tmp_path, "clinfo", script)
    answer = probing.call(CLINFO, environ=environ(tmp_path))
    assert (answer.state, answer.detail) == ("failed", detail)


def test_a_file_that_is_no_program_is_a_failure(tmp_path: Path) -> None:
    fake(tmp_path, "clinfo", "")
    (tmp_path / "bin/clinfo").write_bytes(b"\x7fELF")
    assert probing.call(CLINFO, environ=environ(tmp_path)).state == "failed"


def test_a_tool_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    ends = shlex.quote(str(tmp_path / "ends"))
    os.mkfifo(tmp_path / "ends")
    # whoever reads the fifo sees its end when the last process that could write to it is gone
    fake(tmp_path, "clinfo", f"exec 3<>{ends}; /bin/sleep 300 & /bin/sleep 300")
    reader = os.open(tmp_path / "ends", os.O_RDONLY | os.O_NONBLOCK)
    try:
        answer = probing.call(CLINFO, limit=1.0, environ=environ(tmp_path))
        assert (answer.state, answer.detail) == ("hung", "clinfo did not answer within 1 s")
        assert select.select([reader], [], [], 30)[0], "a child of the tool is still there"
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_a_tool_that_not_even_a_kill_ends_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "clinfo", "/bin/sleep 300")
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _signal: killed.append(group))
    answer = probing.call(CLINFO, limit=0.2, environ=environ(tmp_path))
    monkeypatch.undo()
    os.killpg(killed[0], 9)
    os.waitpid(killed[0], 0)
    assert answer.state == "hung"
    assert f"process {killed[0]} hangs in the kernel and is left behind" in answer.detail


# ---- the command -----------------------------------------------------------------------------------------------------


def ctl(root: Root, *argv: str) -> tuple[int, str]:
    said: list[str] = []
    code = gpu_worker_ctl.main(list(argv), root=root, say=said.append)
    return code, "\n".join(said)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _nowhere_else: None) -> Path:
    """Vulkan reaches both cards, clinfo hangs, the others are not installed."""
    (tmp_path / "vulkan.txt").write_text(vulkaninfo([ONE, TWO]) + LLVMPIPE)
    fake(tmp_path, "vulkaninfo", f"exec /bin/cat {shlex.quote(str(tmp_path / 'vulkan.txt'))}")
    fake(tmp_path, "clinfo", "exec /bin/sleep 300")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


@pytest.mark.usefixtures("tools")
def test_the_command_tells_people(pair: Root) -> None:
    code, text = ctl(pair, "probe", "--timeout", "0.5")
    assert code == 0
    assert "0000:03:00.0" in text
    assert "driver amdgpu, /dev/dri/renderD128" in text
    assert "  opencl ?    clinfo did not answer within 0.5 s" in text
    assert "  vulkan yes  AMD Radeon RX 580 Series (RADV POLARIS10), radv Mesa 22.3.6" in text
    assert "  rocm   ?    rocminfo is not installed: apt-get install rocminfo" in text
    assert "vulkan: llvmpipe (LLVM 15.0.6, 256 bits) is CPU only; it counts for no GPU" in text
    assert "FAILED" not in text


@pytest.mark.usefixtures("tools")
def test_the_command_tells_machines(pair: Root) -> None:
    map_file = pair.path("/etc/organism/gpus.json")
    map_file.parent.mkdir(parents=True)
    map_file.write_text(render_map([Entry("gpu0", "amdgpu", ONE)]))
    code, text = ctl(pair, "probe", "--json", "--timeout", "0.5", "--require", "vulkan,rocm")
    told: dict[str, Any] = json.loads(text)
    assert (code, told["ok"]) == (1, False)
    assert [(gpu["address"], gpu["ids"], gpu["judged"]) for gpu in told["gpus"]] == [
        (ONE, ["gpu0"], True),
        (TWO, [], False),
    ]
    assert told["gpus"][0]["problem"] == "lacks what is required: rocm"
    assert told["gpus"][0]["next"][0] == "apt-get install rocminfo, and probe again"
    assert told["tools"]["opencl"]["state"] == "hung"
    assert told["cpu_only"] == [{"stack": "vulkan", "device": "llvmpipe (LLVM 15.0.6, 256 bits)"}]


@pytest.mark.parametrize(
    "argv", [["--require", "directx"], ["--require", ","], ["--timeout", "0"], ["--timeout", "x"], ["gpu0"]]
)
def test_a_wrong_call_ends_with_2(pair: Root, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ctl(pair, "probe", *argv)
    assert ended.value.code == 2


def test_a_map_that_was_named_must_be_there(pair: Root, capsys: pytest.CaptureFixture[str]) -> None:
    code, _text = ctl(pair, "--map", "/nowhere.json", "probe")
    assert code == 1
    assert "nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_probe_and_its_options(pair: Root, shell: str) -> None:
    pytest.importorskip("shtab")
    code, script = ctl(pair, "completion", shell)
    assert code == 0
    assert "probe" in script
    assert "--require" in script


def test_completion_without_shtab_says_what_to_install(
    pair: Root, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert ctl(pair, "completion", "bash")[0] == 1
    assert "organism[completion]" in capsys.readouterr().err
