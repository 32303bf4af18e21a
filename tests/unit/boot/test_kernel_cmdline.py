# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module kernel_cmdline on trees of hosts with GRUB and with systemd-boot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.organism.proxmox.plugins.module_utils import _boot_tokens, _grub_dropin
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError
from ansible_collections.organism.proxmox.plugins.modules import kernel_cmdline

from .conftest import snapshot

DROPIN = "etc/default/grub.d/organism-profile.cfg"
LINE = "root=ZFS=rpool/ROOT/pve-1 boot=zfs  quiet mitigations=auto"
ISOLATED = {"isolcpus": "domain,managed_irq,2-5", "mitigations": None}
MARK = "run/organism/reboot-required.d/profile"


class Host:
    """A tree, the module on it, and the commands that it ran."""

    def __init__(self, top: Path, run: Callable[..., Any]) -> None:
        self.top, self._run = top, run
        self.commands: list[str] = []
        self.fail = 0
        self.before: dict[str, str] = {}

    def run(self, capability: str = "profile", **arguments: Any) -> Any:
        return self._run(capability=capability, **arguments)

    def live(self, line: str) -> None:
        (self.top / "proc/cmdline").write_text(line + "\n")

    def text(self, name: str) -> str:
        return (self.top / name).read_text()

    def etc(self) -> dict[str, str]:
        return {name: text for name, text in snapshot(self.top).items() if name.startswith("etc/")}

    def records(self) -> list[str]:
        return sorted(path.name for path in self.top.glob("var/lib/organism/earlier/*"))


def write(top: Path, **files: str) -> None:
    for name, text in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build(top: Path, module_runner: Any, monkeypatch: pytest.MonkeyPatch, **files: str) -> Host:
    write(top, **files)
    host = Host(top, module_runner(kernel_cmdline))

    def refresh(argv: list[str]) -> str:
        host.commands.append(" ".join(argv))
        if host.fail:
            host.fail -= 1
            raise CommandError(f"`{argv[0]}` ended with 1: no space left on device")
        return ""

    monkeypatch.setattr(kernel_cmdline, "refresh", refresh)
    host.before = host.etc()
    return host


@pytest.fixture
def grub(tmp_path: Path, module_runner: Any, monkeypatch: pytest.MonkeyPatch) -> Host:
    return build(
        tmp_path, module_runner, monkeypatch,
        **{
            "etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="quiet mitigations=auto"\nGRUB_CMDLINE_LINUX=""\n',
            "proc/cmdline": "BOOT_IMAGE=/vmlinuz root=/dev/a ro quiet mitigations=auto\n",
            "proc/sys/kernel/random/boot_id": "one\n",
        },
    )  # fmt: skip


@pytest.fixture
def sdboot(tmp_path: Path, module_runner: Any, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(
        "ansible_collections.organism.proxmox.plugins.module_utils._boot_loader.run_command", lambda _argv: ""
    )
    return build(
        tmp_path, module_runner, monkeypatch,
        **{
            "etc/kernel/cmdline": LINE + "\nsecond line, kept\n",
            "proc/cmdline": f"initrd=\\EFI\\initrd {LINE}\n",
        },
    )  # fmt: skip


PBT: dict[str, Any] = {"loader": "proxmox-boot-tool-systemd-boot"}


def test_grub_present_check_idempotence_absent(grub: Host) -> None:
    foreseen = grub.run(tokens=ISOLATED, check=True, diff=True)
    assert foreseen.result["changed"] and foreseen.result["reboot_required"]
    assert grub.etc() == grub.before and grub.commands == [] and grub.records() == []
    done = grub.run(tokens=ISOLATED, diff=True)
    assert done.result["diff"] == foreseen.result["diff"]
    assert done.result["pending"] == foreseen.result["pending"] == [
        {"key": "isolcpus", "live": None, "coming": "isolcpus=domain,managed_irq,2-5"},
        {"key": "mitigations", "live": "mitigations=auto", "coming": None},
    ]  # fmt: skip
    assert done.result["cmdline"] == ["quiet isolcpus=domain,managed_irq,2-5"]
    assert grub.commands == ["update-grub"]
    assert json.loads(grub.text(MARK))["pending"] == done.result["pending"]
    again = grub.run(tokens=ISOLATED)
    assert not again.result["changed"] and again.result["reboot_required"]
    assert grub.commands == ["update-grub"]
    assert grub.run(state="absent").result["changed"]
    assert grub.etc() == grub.before and grub.records() == [] and not (grub.top / MARK).exists()
    assert not grub.run(state="absent").result["changed"]
    assert grub.commands == ["update-grub"] * 2


def test_a_reboot_settles_what_was_pending(grub: Host) -> None:
    grub.run(tokens=ISOLATED)
    grub.live("BOOT_IMAGE=/vmlinuz root=/dev/a ro quiet isolcpus=domain,managed_irq,2-5")
    after = grub.run(tokens=ISOLATED)
    assert (after.result["changed"], after.result["reboot_required"]) == (False, False)
    assert not (grub.top / MARK).exists()


def test_taking_back_waits_for_a_reboot_too_and_says_so_each_time(grub: Host) -> None:
    grub.run(tokens=ISOLATED)
    grub.live("root=/dev/a ro quiet isolcpus=domain,managed_irq,2-5")
    for _ in range(2):
        keys = [entry["key"] for entry in grub.run(state="absent").result["pending"]]
        assert sorted(keys) == ["isolcpus", "mitigations"]


def test_a_smaller_set_takes_the_rest_back(grub: Host) -> None:
    grub.run(tokens={"isolcpus": "2", "nohz_full": "2"})
    smaller = grub.run(tokens={"isolcpus": "2"})
    assert smaller.result["changed"] and smaller.result["cmdline"] == ["quiet mitigations=auto isolcpus=2"]
    assert grub.run(tokens={}).result["changed"]
    assert grub.etc() == grub.before and grub.records() == []


def test_a_failed_refresh_puts_the_file_back(grub: Host) -> None:
    grub.fail = 1
    failed = grub.run(tokens=ISOLATED)
    assert failed.failed and "no space left" in failed.result["msg"] and "update-grub" in failed.result["msg"]
    assert grub.etc() == grub.before
    assert grub.records() == [] and not (grub.top / MARK).exists()
    assert grub.run(tokens=ISOLATED).result["changed"]


def test_a_failed_refresh_of_a_later_change_keeps_the_earlier_state(grub: Host) -> None:
    grub.run(tokens={"isolcpus": "2"})
    first = grub.text(DROPIN)
    grub.fail = 1
    assert grub.run(tokens={"isolcpus": "3"}).failed
    assert grub.text(DROPIN) == first
    redo = grub.run(tokens={"isolcpus": "2"})
    assert redo.result["changed"] and "boot loader" in redo.result["msg"]
    assert not grub.run(tokens={"isolcpus": "2"}).result["changed"]
    grub.run(state="absent")
    assert grub.etc() == grub.before


def test_a_run_cut_short_before_the_refresh_is_finished_by_the_next(
    grub: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(_argv: list[str]) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kernel_cmdline, "refresh", cut)
        with pytest.raises(KeyboardInterrupt):
            grub.run(tokens=ISOLATED)
    assert (grub.top / DROPIN).exists() and grub.commands == []
    assert grub.run(tokens=ISOLATED).result["changed"]
    assert grub.commands == ["update-grub"]


def test_our_file_edited_by_somebody_else_stays_and_is_named(grub: Host) -> None:
    grub.run(tokens=ISOLATED)
    edited = grub.text(DROPIN) + "# mine\n"
    (grub.top / DROPIN).write_text(edited)
    taken = grub.run(state="absent")
    assert taken.result["kept_by_others"][0]["name"] == "/" + DROPIN
    assert grub.text(DROPIN) == edited
    assert not taken.result["changed"]


def test_a_later_file_with_the_last_word_is_refused_before_anything_changes(grub: Host) -> None:
    write(grub.top, **{"etc/default/grub.d/zz.cfg": 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n'})
    before = grub.etc()
    refused = grub.run(tokens=ISOLATED)
    assert refused.failed and "isolcpus" in refused.result["msg"] and "grub.d" in refused.result["msg"]
    assert grub.etc() == before and grub.commands == [] and grub.records() == []


def test_a_menu_without_the_words_is_an_error(grub: Host) -> None:
    write(grub.top, **{"boot/grub/grub.cfg": "menuentry a {\n\tlinux\t/vmlinuz root=/dev/a ro quiet\n}\n"})
    failed = grub.run(tokens=ISOLATED)
    assert failed.failed and "grub.cfg" in failed.result["msg"]
    assert not (grub.top / DROPIN).exists()


def test_capabilities_are_apart_and_disagreement_is_refused_by_name(grub: Host) -> None:
    grub.run(tokens={"isolcpus": "2-5", "quiet": None})
    refused = grub.run(capability="power", tokens={"isolcpus": "2-4"})
    assert refused.failed and "profile" in refused.result["msg"] and "isolcpus=2-5" in refused.result["msg"]
    assert grub.run(capability="power", tokens={"isolcpus": "2-5", "pcie_aspm": "off"}).result["changed"]
    assert not grub.run(tokens={"isolcpus": "2-5", "quiet": None}).result["changed"]
    grub.run(state="absent")
    left = grub.run(capability="power", tokens={"isolcpus": "2-5", "pcie_aspm": "off"})
    assert not left.result["changed"] and "quiet" in left.result["cmdline"][0]
    grub.run(capability="power", state="absent")
    assert grub.etc() == grub.before and grub.records() == []


def test_systemd_boot_is_edited_by_key_and_restored_to_the_letter(sdboot: Host) -> None:
    wanted = {**ISOLATED, "hugepages": {"1G": 4}}
    assert sdboot.run(tokens=wanted, check=True, **PBT).result["changed"]
    assert sdboot.etc() == sdboot.before
    done = sdboot.run(tokens=wanted, **PBT)
    assert sdboot.text("etc/kernel/cmdline") == (
        "root=ZFS=rpool/ROOT/pve-1 boot=zfs quiet isolcpus=domain,managed_irq,2-5 hugepagesz=1G hugepages=4\n"
        "second line, kept\n"
    )
    assert sdboot.commands == ["proxmox-boot-tool refresh"] and done.result["reboot_required"]
    assert not sdboot.run(tokens=wanted, **PBT).result["changed"]
    sdboot.run(state="absent", **PBT)
    assert sdboot.etc() == sdboot.before and sdboot.records() == []


@pytest.mark.parametrize("order", [("profile", "power"), ("power", "profile")])
def test_two_capabilities_on_systemd_boot_leave_in_any_order(sdboot: Host, order: tuple[str, str]) -> None:
    sdboot.run(tokens={"isolcpus": "2", "mitigations": "off", "shared": "1"}, **PBT)
    sdboot.run(capability="power", tokens={"pcie_aspm": "off", "shared": "1", "quiet": None}, **PBT)
    sdboot.run(capability=order[0], state="absent", **PBT)
    assert "shared=1" in sdboot.text("etc/kernel/cmdline")
    sdboot.run(capability=order[1], state="absent", **PBT)
    assert sorted(sdboot.text("etc/kernel/cmdline").split()) == sorted(sdboot.before["etc/kernel/cmdline"].split())
    assert sdboot.records() == []


def test_later_edits_by_others_survive(sdboot: Host) -> None:
    sdboot.run(tokens={"isolcpus": "2", "nohz_full": "2"}, **PBT)
    path = sdboot.top / "etc/kernel/cmdline"
    path.write_text(path.read_text().replace("isolcpus=2", "isolcpus=7").replace("quiet", "quiet splash"))
    taken = sdboot.run(state="absent", **PBT)
    assert path.read_text().splitlines()[0].split() == [*LINE.split()[:3], "splash", "mitigations=auto", "isolcpus=7"]
    assert [entry["name"] for entry in taken.result["kept_by_others"]] == ["/etc/kernel/cmdline: isolcpus"]


def test_a_missing_file_is_made_of_the_running_line_and_goes_again(sdboot: Host) -> None:
    (sdboot.top / "etc/kernel/cmdline").unlink()
    sdboot.run(tokens={"isolcpus": "2"}, **PBT)
    assert sdboot.text("etc/kernel/cmdline") == " ".join(LINE.split()) + " isolcpus=2\n"
    sdboot.run(state="absent", **PBT)
    assert not (sdboot.top / "etc/kernel/cmdline").exists()


def test_a_line_without_root_is_refused(sdboot: Host) -> None:
    (sdboot.top / "etc/kernel/cmdline").write_text("quiet\nroot=/dev/a\n")
    before = sdboot.etc()
    refused = sdboot.run(tokens=ISOLATED, **PBT)
    assert refused.failed and "no root=" in refused.result["msg"]
    assert sdboot.etc() == before and sdboot.commands == [] and sdboot.records() == []


def test_entries_that_kernel_install_did_not_write_are_an_error(sdboot: Host) -> None:
    failed = sdboot.run(tokens={"isolcpus": "2"}, loader="systemd-boot", refresh_command=["kernel-install", "add-all"])
    assert failed.failed and "layout=bls" in failed.result["msg"]
    assert sdboot.etc() == sdboot.before
    write(sdboot.top, **{"boot/efi/loader/entries/a.conf": "title x\noptions root=/dev/a isolcpus=2\n"})
    assert sdboot.run(tokens={"isolcpus": "2"}, loader="systemd-boot", refresh_command=["true"]).result["changed"]


def test_a_host_that_changed_its_loader_keeps_nothing_of_the_former(sdboot: Host) -> None:
    sdboot.run(tokens={"isolcpus": "2"}, loader="grub")
    assert (sdboot.top / DROPIN).exists()
    sdboot.run(tokens={"isolcpus": "2"}, **PBT)
    assert not (sdboot.top / DROPIN).exists() and "isolcpus=2" in sdboot.text("etc/kernel/cmdline")


def test_a_read_only_file_is_refused_before_anything_changes(grub: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    refused = grub.run(tokens=ISOLATED)
    assert refused.failed and "read-only" in refused.result["msg"]
    assert grub.etc() == grub.before and grub.records() == []


def test_a_disk_that_refuses_the_write_leaves_all_as_it_was(grub: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _boot_tokens.write_atomic

    def full(path: Path, *rest: Any, **more: Any) -> None:
        if "grub.d" in str(path):
            raise OSError(28, "No space left on device")
        real(path, *rest, **more)

    monkeypatch.setattr(_boot_tokens, "write_atomic", full)
    failed = grub.run(tokens=ISOLATED)
    assert failed.failed and "No space" in failed.result["msg"]
    assert grub.records() == [] and grub.commands == [] and not (grub.top / DROPIN).exists()


@pytest.mark.parametrize("arguments", [{"tokens": {"a": "b c"}}, {"tokens": {"root": "x"}}, {"capability": "a/b"}])
def test_bad_arguments_are_refused(grub: Host, arguments: dict[str, Any]) -> None:
    assert grub.run(**arguments).failed
    assert grub.etc() == grub.before


def test_the_files_name_is_the_contract() -> None:
    assert _grub_dropin.path("profile") == "/" + DROPIN


def test_taking_back_what_never_was_needs_no_boot_loader(
    tmp_path: Path, module_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = build(tmp_path, module_runner, monkeypatch, **{"proc/cmdline": "root=/dev/a\n"})
    back = host.run(state="absent")
    assert (back.result["changed"], back.result["loader"], back.result["pending"]) == (False, "none", [])
    refused = host.run(tokens=ISOLATED)
    assert refused.failed and "no boot loader was found" in refused.result["msg"]


def test_a_boot_loader_that_is_gone_keeps_what_was_set_from_being_forgotten(grub: Host) -> None:
    grub.run(tokens=ISOLATED)
    (grub.top / "etc/default/grub").unlink()
    refused = grub.run(state="absent")
    assert refused.failed and "no boot loader was found" in refused.result["msg"]
    assert grub.records() == ["kernel_cmdline-profile.json"]
