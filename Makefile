# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
#
# The verbs of ./run, for those whose fingers type make. ARGS are passed on: make test ARGS="tests/unit -k cpu"
verbs := demo test setup lint docs bench rig rig-down rig-test molecule clean help

.PHONY: $(verbs) chaos
.DEFAULT_GOAL := help

$(verbs):
	./run $@ $(ARGS)

chaos:
	./run chaos $(if $(SUITE),SUITE=$(SUITE)) $(if $(SEED),SEED=$(SEED)) $(if $(MINUTES),MINUTES=$(MINUTES)) $(ARGS)
