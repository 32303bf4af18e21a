# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shell completion for ./run: the verbs, then file names (pytest's arguments are mostly those)."""

from __future__ import annotations

BASH = """\
_organism_run() {
  local word=${COMP_WORDS[COMP_CWORD]}
  if [[ $COMP_CWORD -eq 1 ]]; then
    mapfile -t COMPREPLY < <(compgen -W '@VERBS@' -- "$word")
  else
    case ${COMP_WORDS[1]} in
      lint) mapfile -t COMPREPLY < <(compgen -W '--fix' -- "$word") ;;
      clean) mapfile -t COMPREPLY < <(compgen -W '--keep-cache' -- "$word") ;;
      completion) mapfile -t COMPREPLY < <(compgen -W 'bash zsh' -- "$word") ;;
      lab) mapfile -t COMPREPLY < <(compgen -W 'up down status ssh play' -- "$word") ;;
      rig) mapfile -t COMPREPLY < <(compgen -W '@RIG@' -- "$word") ;;
      rig-down) mapfile -t COMPREPLY < <(compgen -W '--name --purge' -- "$word") ;;
      chaos) mapfile -t COMPREPLY < <(compgen -W 'SUITE=guard SUITE=jobs SUITE=ram SEED= MINUTES=' -- "$word") ;;
      bench) mapfile -t COMPREPLY < <(compgen -W '@BENCH@' -- "$word") ;;
      molecule) mapfile -t COMPREPLY < <(compgen -W '@MOLECULE@ -s default rig' -- "$word") ;;
      test | rig-test) mapfile -t COMPREPLY < <(compgen -f -- "$word") ;;
    esac
  fi
}
complete -F _organism_run ./run
"""

ZSH = """\
_organism_run() {
  if (( CURRENT == 2 )); then
    compadd -- @VERBS@
  else
    case ${words[2]} in
      lint) compadd -- --fix ;;
      clean) compadd -- --keep-cache ;;
      completion) compadd -- bash zsh ;;
      lab) compadd -- up down status ssh play ;;
      rig) compadd -- @RIG@ ;;
      rig-down) compadd -- --name --purge ;;
      chaos) compadd -- SUITE=guard SUITE=jobs SUITE=ram SEED= MINUTES= ;;
      bench) compadd -- @BENCH@ ;;
      molecule) compadd -- @MOLECULE@ -s default rig ;;
      test | rig-test) _files ;;
    esac
  fi
}
compdef _organism_run ./run
"""
