# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel command lines: read as the kernel reads them, replaced by key."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organism.core import _kernel_cmdline as kc

# next_arg() and the loop of parse_args(), as the kernel has them; prints each key, and each value behind a mark
ORACLE = r"""
#include <stdio.h>
#include <string.h>
static int blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
static char *skip(char *s) { while (blank(*s)) s++; return s; }
static char *next(char *args, char **param, char **val)
{
    unsigned int i, equals = 0;
    int in_quote = 0, quoted = 0;
    if (*args == '"') { args++; in_quote = 1; quoted = 1; }
    for (i = 0; args[i]; i++) {
        if (blank(args[i]) && !in_quote) break;
        if (equals == 0 && args[i] == '=') equals = i;
        if (args[i] == '"') in_quote = !in_quote;
    }
    *param = args;
    if (!equals) *val = NULL;
    else {
        args[equals] = '\0';
        *val = args + equals + 1;
        if (**val == '"') {
            (*val)++;
            if (args[i - 1] == '"') args[i - 1] = '\0';
        }
    }
    if (quoted && i > 0 && args[i - 1] == '"') args[i - 1] = '\0';
    if (args[i]) { args[i] = '\0'; args += i + 1; } else args += i;
    return skip(args);
}
int main(void)
{
    static char line[65536];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = '\0';
        char *at = skip(line), *param, *val;
        while (*at) {
            at = next(at, &param, &val);
            if (!val && !strcmp(param, "--")) break;
            printf("%s\001%s\002", param, val ? val : "\003");
        }
        printf("\n");
    }
    return 0;
}
"""


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[str, str | None]]]:
    """The kernel's own parser, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here: the kernel's own parser of command lines is not compared with")
    folder = tmp_path_factory.mktemp("oracle")
    Path(folder, "oracle.c").write_text(ORACLE)
    subprocess.run([compiler, "-O1", "-o", folder / "oracle", folder / "oracle.c"], check=True)

    def parse(line: str) -> list[tuple[str, str | None]]:
        done = subprocess.run([folder / "oracle"], input=line + "\n", capture_output=True, text=True, check=True)
        fields = [entry.split("\1") for entry in done.stdout.rstrip("\n").split("\2") if entry]
        return [(key, None if value == "\3" else value) for key, value in fields]

    return parse


def read(line: str) -> list[tuple[str, str | None]]:
    return [(token.key, token.value) for token in kc.parse(line).tokens]


LINES = [
    "BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve root=/dev/mapper/pve-root ro quiet",
    'dyndbg="file drivers/usb/* +p" quiet',
    '"dyndbg=file a +p" x',
    'a="b" "c" d"e f"g=h',
    "=x a= ==b c==d",
    'open="never closed quiet',
    "  a\t b  ",
    "quiet -- single a=b",
    '"',
    '""',
    'a=""',
    'x="',
    '"a"=b',
    '"--" c',
]


@pytest.mark.parametrize("line", LINES)
def test_recorded_lines_are_read_as_the_kernel_reads_them(line: str, kernel: Callable[[str], Any]) -> None:
    assert read(line) == kernel(line)


@given(line=st.text(alphabet='ab-_=." \t,1', max_size=40))
@settings(deadline=None)  # each example starts a process
def test_any_line_is_read_as_the_kernel_reads_it(line: str, kernel: Callable[[str], Any]) -> None:
    assert read(line) == kernel(line)


@given(line=st.text(alphabet='ab-_=." \t,1', max_size=60))
def test_a_rendered_line_means_the_same(line: str) -> None:
    once = kc.parse(line)
    assert kc.parse(once.render()) == once


KEYS = st.sampled_from(["isolcpus", "nohz_full", "nohz-full", "quiet", "hugepagesz", "hugepages", "console", "a.b"])
VALUES = st.one_of(st.none(), st.text(alphabet="0123456789-,", max_size=5))
PAIRS = st.lists(st.tuples(KEYS, VALUES), max_size=12)


@given(pairs=PAIRS, group=st.sampled_from(["isolcpus", "nohz_full", "quiet", "hugepages"]), value=st.text("0123,-"))
def test_replacing_touches_nothing_else_and_is_idempotent(
    pairs: list[tuple[str, str | None]], group: str, value: str
) -> None:
    line = kc.parse(" ".join(key if text is None else f"{key}={text}" for key, text in pairs))
    word = f"{group}={value}"
    after = kc.replace(line, {group: (word,)})
    assert [t.text for t in after.of(group)] == [word]
    assert [t for t in after.tokens if t.group != group] == [t for t in line.tokens if t.group != group]
    assert kc.replace(after, {group: (word,)}) == after
    assert kc.parse(after.render()) == after


@pytest.mark.parametrize(
    ("line", "wanted", "after"),
    [
        # a value that another one begins with is another value; a key within a key is another key
        ("irqaffinity=0-1 x", {"irqaffinity": ("irqaffinity=0",)}, "irqaffinity=0 x"),
        ("pcie_aspm.policy=powersave", {"pcie_aspm": ("pcie_aspm=off",)}, "pcie_aspm.policy=powersave pcie_aspm=off"),
        # duplicates and both spellings go
        ("nohz-full=1 a nohz_full=2", {"nohz_full": ("nohz_full=3",)}, "nohz_full=3 a"),
        ("vfio_pci.ids=1 a", {"vfio_pci.ids": ("vfio-pci.ids=2",)}, "vfio-pci.ids=2 a"),
        # nothing is put behind what belongs to init
        ("root=/dev/a -- single", {"x": ("x=1",)}, "root=/dev/a x=1 -- single"),
        ("a quiet b", {"quiet": ()}, "a b"),
        ("hugepagesz=2M hugepages=4 a hugepages=9", {"hugepages": ("hugepagesz=1G", "hugepages=2")},
         "hugepagesz=1G hugepages=2 a"),
        ('dyndbg="file isolcpus=3 +p" isolcpus=1', {"isolcpus": ()}, 'dyndbg="file isolcpus=3 +p"'),
    ],
)  # fmt: skip
def test_replace(line: str, wanted: dict[str, tuple[str, ...]], after: str) -> None:
    assert kc.replace(kc.parse(line), wanted).render() == after


def test_what_counts_of_repeated_parameters() -> None:
    line = kc.parse("isolcpus=1 isolcpus=2 mitigations=auto mitigations=off console=tty0 console=ttyS0")
    assert kc.effective(line.tokens, "isolcpus") == ("isolcpus=1",)
    assert kc.effective(line.tokens, "mitigations") == ("mitigations=off",)
    assert kc.effective(line.tokens, "console") == ("console=tty0", "console=ttyS0")


def test_quotes_make_no_difference_to_what_counts() -> None:
    assert kc.pending(["a"], kc.parse('a="1"'), kc.parse("a=1")) == []


def test_pending_says_what_is_there_and_what_comes() -> None:
    assert kc.pending(["isolcpus", "quiet", "x"], kc.parse("isolcpus=1 x"), kc.parse("isolcpus=2 quiet x")) == [
        {"key": "isolcpus", "live": "isolcpus=1", "coming": "isolcpus=2"},
        {"key": "quiet", "live": None, "coming": "quiet"},
    ]


def test_a_declaration_becomes_words() -> None:
    assert kc.wanted_words(
        {
            "isolcpus": "domain,2-5",
            "mitigations": None,
            "hugepages": {"1G": 8, "2M": 512},
            "console": ["tty0", "ttyS0"],
        },
        ["threadirqs"],
    ) == {
        "isolcpus": ("isolcpus=domain,2-5",),
        "mitigations": (),
        "hugepages": ("hugepagesz=1G", "hugepages=8", "hugepagesz=2M", "hugepages=512"),
        "console": ("console=tty0", "console=ttyS0"),
        "threadirqs": ("threadirqs",),
    }


@pytest.mark.parametrize(
    ("tokens", "flags", "said"),
    [
        ({"a": "$(reboot)"}, [], "boot loader"),
        ({"a": 'b"c'}, [], "boot loader"),
        ({"a": "b c"}, [], "boot loader"),
        ({"a": True}, [], "as text"),
        ({"root": "/dev/sda"}, [], "for tuning"),
        ({}, ["ro"], "for tuning"),
        ({"a=b": "c"}, [], "not the name"),
        ({}, ["--"], "not the name"),
        ({"": "x"}, [], "not the name"),
        ({"kthread_cpus": "0-1"}, [], "accept_unknown"),
        ({"isolcpus": ["1", "2"]}, [], "one of them"),
        ({"isolcpus": {"1": 2}}, [], "only hugepages"),
    ],
)
def test_a_bad_declaration_is_refused(tokens: dict[str, Any], flags: list[str], said: str) -> None:
    with pytest.raises(kc.CmdlineError, match=said):
        kc.wanted_words(tokens, flags)


def test_an_unknown_parameter_can_be_accepted() -> None:
    assert kc.wanted_words({"kthread_cpus": "0-1"}, accept=["kthread-cpus"]) == {"kthread_cpus": ("kthread_cpus=0-1",)}


def test_a_first_boot_file_is_made_of_the_running_line() -> None:
    live = "initrd=\\EFI\\proxmox\\initrd.img BOOT_IMAGE=/vmlinuz root=ZFS=rpool/ROOT/pve-1 boot=zfs"
    assert kc.boot_file_line(live) == "root=ZFS=rpool/ROOT/pve-1 boot=zfs"
