# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A file of our own for GRUB: ``/etc/default/grub.d/organism-<capability>.cfg``, and what GRUB's settings come to.

grub-mkconfig sources /etc/default/grub and then grub.d/*.cfg with ``set -e``, and pastes GRUB_CMDLINE_LINUX and
GRUB_CMDLINE_LINUX_DEFAULT, in this order, into grub.cfg, where GRUB's own script parser reads them (quotes and
backslashes protect). So the file takes its parameters out of both and adds its own at the end.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ._kernel_cmdline import members
from ._root import Root
from ._systemd import CommandError, Runner, run_command

DEFAULTS = "/etc/default/grub"
FOLDER = "/etc/default/grub.d"

_TEMPLATE = """\
# Kernel parameters of organism.proxmox, capability {capability}. update-grub reads this file.
# Take it back with the module kernel_cmdline, capability={capability}, state=absent.
# shellcheck shell=sh disable=SC2034
organism_without() (
    rest="$1 "
    kept='' word='' bare='' quote='' escaped=''
    while [ -n "$rest" ]; do
        char=${{rest%"${{rest#?}}"}}
        rest=${{rest#?}}
        if [ -n "$escaped" ]; then
            escaped='' word=$word$char bare=$bare$char
            continue
        fi
        case $quote$char in
            \\\\ | \\"\\\\) escaped=1 word=$word$char ;;
            "'" | '"') quote=$char word=$word$char ;;
            "''" | '""') quote='' word=$word$char ;;
            [[:space:]])
                case $bare in
                    {patterns}) ;;
                    *) [ -z "$word" ] || kept="$kept${{kept:+ }}$word" ;;
                esac
                word='' bare=''
                ;;
            *) word=$word$char bare=$bare$char ;;
        esac
    done
    printf '%s' "$kept${{word:+${{kept:+ }}$word}}"
)
GRUB_CMDLINE_LINUX=$(organism_without "${{GRUB_CMDLINE_LINUX-}}")
GRUB_CMDLINE_LINUX_DEFAULT=$(organism_without "${{GRUB_CMDLINE_LINUX_DEFAULT-}}")
{append}unset -f organism_without
"""

# Each file's own output is kept apart from the answer; the answer is two words ended by NUL.
_EVALUATE = (
    'set -e; for file in "$@"; do { . "$file"; } >&2; done; '
    'printf \'%s\\0%s\\0\' "${GRUB_CMDLINE_LINUX-}" "${GRUB_CMDLINE_LINUX_DEFAULT-}"'
)


def path(capability: str) -> str:
    return f"{FOLDER}/organism-{capability}.cfg"


def render(capability: str, wanted: Mapping[str, Sequence[str]]) -> str:
    """The file's text: parameters of these groups out, the words in. The words have no character that a shell reads.

    Groups are sorted: whoever wants the same writes the same, in whatever order they were declared.
    """
    wanted = {group: wanted[group] for group in sorted(wanted)}
    keys = [key for group in wanted for key in members(group)]
    patterns = " | ".join(f"{name} | {name}=*" for name in (key.replace("_", "[-_]") for key in keys))
    words = " ".join(word for group in wanted.values() for word in group)
    append = ""
    if words:
        append = f'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT${{GRUB_CMDLINE_LINUX_DEFAULT:+ }}{words}"\n'
    return _TEMPLATE.format(capability=capability, patterns=patterns, append=append)


def evaluate(root: Root, replaced: Mapping[str, str | None] | None = None, run: Runner = run_command) -> str:
    """The command line that GRUB's settings come to (without what grub-mkconfig adds: root, ro).

    ``replaced``: files of grub.d with another text than on disk (None: not there), to see the effect before the change.
    Raises CommandError, with what the shell said, for settings that update-grub could not read either.
    """
    replaced = replaced or {}
    files: dict[str, str | None] = dict.fromkeys(root.glob(f"{FOLDER}/*.cfg")) | dict(replaced)
    with tempfile.TemporaryDirectory(prefix="organism-grub-") as folder:
        order = [str(root.path(DEFAULTS))] if root.exists(DEFAULTS) else []
        for number, name in enumerate(sorted(files)):
            text = files[name]
            if name in replaced and text is None:
                continue
            if name in replaced:
                stand_in = Path(folder, f"{number}.cfg")
                stand_in.write_text(str(text), encoding="utf-8")
                order.append(str(stand_in))
            else:
                order.append(str(root.path(name)))
        answer = run(["sh", "-c", _EVALUATE, "sh", *order])
    values = answer.split("\0")
    if len(values) != 3:
        raise CommandError(f"{DEFAULTS} and {FOLDER}/*.cfg end the shell that reads them; update-grub cannot work")
    return " ".join(value for value in values[:2] if value)
