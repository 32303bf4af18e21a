# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Boot loaders are told apart as proxmox-boot-tool does it, and GRUB's settings are what a shell makes of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from organism.core import _boot_loader as loaders
from organism.core import _grub_dropin as grub
from organism.core import _kernel_cmdline as kc
from organism.core._root import Root
from organism.core._systemd import CommandError, run_command

STATUS_UEFI = """\
Re-executing '/usr/sbin/proxmox-boot-tool' in new private mount namespace..
System currently booted with uefi
8C0F-F1A2 is configured with: uefi (versions: 6.14.8-2-pve, 6.8.12-1-pve)
8C10-0B3D is configured with: uefi (versions: 6.14.8-2-pve, 6.8.12-1-pve)
"""
STATUS_GRUB = """\
System currently booted with uefi
8C0F-F1A2 is configured with: grub (versions: 6.14.8-2-pve)
"""
# changed from systemd-boot to GRUB: the former's loader.conf is still on the partition
STATUS_CHANGED = """\
8C0F-F1A2 is configured with: uefi (versions: 6.8.12-1-pve), grub (versions: 6.14.8-2-pve)
"""
STATUS_MIXED = STATUS_GRUB + "8C10-0B3D is configured with: uefi (versions: 6.14.8-2-pve)\n"


def host(top: Path, *files: str, managed: bool = False, efi: bool = True) -> Root:
    names = [*files, *(["etc/kernel/proxmox-boot-uuids"] if managed else []), *(["sys/firmware/efi/x"] if efi else [])]
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    return Root(top)


@pytest.mark.parametrize(
    ("status", "efi", "name", "places"),
    [
        (STATUS_UEFI, True, "proxmox-boot-tool-systemd-boot", (loaders.KERNEL_CMDLINE,)),
        (STATUS_GRUB, True, "proxmox-boot-tool-grub", (loaders.GRUB,)),
        (STATUS_CHANGED, True, "proxmox-boot-tool-grub", (loaders.GRUB,)),
        (STATUS_UEFI, False, "proxmox-boot-tool-grub", (loaders.GRUB,)),
        (STATUS_MIXED, True, "proxmox-boot-tool-mixed", (loaders.GRUB, loaders.KERNEL_CMDLINE)),
    ],
)
def test_managed_partitions(tmp_path: Path, status: str, efi: bool, name: str, places: tuple[str, ...]) -> None:
    found = loaders.detect(host(tmp_path, "etc/default/grub", managed=True, efi=efi), lambda _argv: status)
    assert (found.name, found.places, found.refresh) == (name, places, (("proxmox-boot-tool", "refresh"),))


def test_managed_without_a_usable_partition_is_refused(tmp_path: Path) -> None:
    with pytest.raises(loaders.BootLoaderError, match="repair"):
        loaders.detect(host(tmp_path, managed=True), lambda _argv: "WARN: /dev/disk/by-uuid/8C0F does not exist\n")


def never(_argv: list[str]) -> str:
    raise AssertionError("proxmox-boot-tool has no business here")


def test_plain_grub(tmp_path: Path) -> None:
    found = loaders.detect(host(tmp_path, "etc/default/grub"), never)
    assert (found.name, found.refresh) == ("grub", (("update-grub",),))


def test_the_loader_that_started_the_kernel_wins_over_leftovers(tmp_path: Path) -> None:
    root = host(tmp_path, "etc/default/grub", "boot/vmlinuz-6.1", "boot/vmlinuz-6.2", "lib/modules/6.2/modules.dep")
    info = tmp_path / "sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
    info.parent.mkdir(parents=True)
    info.write_bytes(b"\6\0\0\0" + "systemd-boot 257.13\0".encode("utf-16-le"))
    found = loaders.detect(root, never)
    assert (found.name, found.places) == ("systemd-boot", (loaders.KERNEL_CMDLINE,))
    assert found.refresh == (("kernel-install", "add", "6.2", "/boot/vmlinuz-6.2"),)


def test_systemd_boot_alone(tmp_path: Path) -> None:
    assert loaders.detect(host(tmp_path, "boot/efi/EFI/systemd/systemd-bootx64.efi"), never).name == "systemd-boot"


def test_no_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(loaders.BootLoaderError, match="set loader"):
        loaders.detect(host(tmp_path), never)


WANTED = kc.wanted_words(
    {"isolcpus": "domain,managed_irq,2-5", "mitigations": None, "vfio-pci.ids": "1002:73bf", "hugepages": {"1G": 2}},
    ["threadirqs"],
)
ADDED = "hugepagesz=1G hugepages=2 isolcpus=domain,managed_irq,2-5 threadirqs vfio-pci.ids=1002:73bf"


def defaults(top: Path, text: str, **snippets: str) -> Root:
    (top / "etc/default/grub.d").mkdir(parents=True)
    (top / "etc/default/grub").write_text(text)
    for name, content in snippets.items():
        (top / f"etc/default/grub.d/{name}.cfg").write_text(content)
    return Root(top)


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize(
    ("linux", "default", "after"),
    [
        ("", "", ADDED),
        ("", "quiet", f"quiet {ADDED}"),
        ("console=ttyS0 mitigations=off", "quiet isolcpus=1 isolcpus=3,4", f"console=ttyS0 quiet {ADDED}"),
        ("", 'dyndbg="file isolcpus=3 +p" vfio_pci.ids=x hugepages=3', f'dyndbg="file isolcpus=3 +p" {ADDED}'),
        ("", '"isolcpus=3" iso\\lcpus=4 *', f"* {ADDED}"),
        ("", "isolcpusx=1 xisolcpus=1 vfiopci.ids=3 threadirqs=1", f"isolcpusx=1 xisolcpus=1 vfiopci.ids=3 {ADDED}"),
        ("", "a\\ b  c=\\\\ mitigations", f"a\\ b c=\\\\ {ADDED}"),
        ("", "tail='open isolcpus=1", f"tail='open isolcpus=1  {ADDED}"),
    ],
)
def test_the_file_replaces_by_key_in_real_shells(
    tmp_path: Path, shell: str, linux: str, default: str, after: str
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    quoted = {name: "'" + value.replace("'", "'\\''") + "'" for name, value in (("", linux), ("_DEFAULT", default))}
    root = defaults(tmp_path, f"GRUB_CMDLINE_LINUX={quoted['']}\nGRUB_CMDLINE_LINUX_DEFAULT={quoted['_DEFAULT']}\n")
    text = grub.render("hard", WANTED)
    assert grub.evaluate(root, {grub.path("hard"): text}, lambda argv: run_command([shell, *argv[1:]])) == after


def test_the_file_passes_shellcheck_and_is_alike_twice(tmp_path: Path) -> None:
    text = grub.render("hard", WANTED)
    assert text == grub.render("hard", dict(reversed(WANTED.items()))), "in whatever order it is declared"
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here")
    (tmp_path / "s.cfg").write_text(text)
    done = subprocess.run(
        ["shellcheck", "--severity=style", tmp_path / "s.cfg"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_two_capabilities_and_the_installers_file_live_together(tmp_path: Path) -> None:
    other = grub.render("power", kc.wanted_words({"pcie_aspm": "off", "mitigations": "off"}))
    root = defaults(
        tmp_path,
        'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX=""\n',
        zfs='GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX root=ZFS=rpool/ROOT/pve-1 boot=zfs"\n',
        **{"organism-power": other},
    )
    mine = grub.render("hard", kc.wanted_words({"isolcpus": "2"}))
    after = grub.evaluate(root, {grub.path("hard"): mine})
    assert after.split() == [
        "root=ZFS=rpool/ROOT/pve-1", "boot=zfs", "quiet", "isolcpus=2", "mitigations=off", "pcie_aspm=off"
    ]  # fmt: skip
    assert grub.evaluate(root, {grub.path("power"): None}).split()[-1] == "quiet"


@pytest.mark.parametrize("text", ['GRUB_CMDLINE_LINUX="unclosed\n', "false\n", "exit 0\n"])
def test_settings_that_end_the_shell_are_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(CommandError):
        grub.evaluate(defaults(tmp_path, text))


WORDS = st.sampled_from(
    [
        "isolcpus=1",
        "isolcpus",
        "iso-lcpus=1",
        "nohz-full=2",
        "nohz_full",
        "quiet",
        "a=b",
        "x.isolcpus=1",
        "isolcpus.x=1",
    ]
)


@given(linux=st.lists(WORDS, max_size=6), default=st.lists(WORDS, max_size=6))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shell_and_library_agree_on_what_a_parameter_is(tmp_path: Path, linux: list[str], default: list[str]) -> None:
    wanted = kc.wanted_words({"isolcpus": "7", "nohz_full": "7"})
    file = tmp_path / "etc/default/grub"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'GRUB_CMDLINE_LINUX="{" ".join(linux)}"\nGRUB_CMDLINE_LINUX_DEFAULT="{" ".join(default)}"\n')
    said = grub.evaluate(Root(tmp_path), {grub.path("hard"): grub.render("hard", wanted)})
    removed = kc.replace(kc.parse(" ".join([*linux, *default])), dict.fromkeys(wanted, ()))
    assert said.split() == [*removed.render().split(), "isolcpus=7", "nohz_full=7"]
