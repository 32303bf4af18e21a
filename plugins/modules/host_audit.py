#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: host_audit
short_description: Is what was set up on a host in force, now and after a boot?
version_added: 0.1.0
description:
  - Reads what each capability has recorded in C(/var/lib/organism/earlier), and compares it with the running host and
    with what will be set at the next boot. Looks at the levels, the CPU plan and pending reboots, too.
  - What cannot be judged (an interrupt that the kernel manages itself, a device that has gone, a record of an unknown
    kind) is skipped with the reason, and never counts as passed.
  - Changes nothing.
author: The organism.proxmox authors (!UNKNOWN)
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  fail:
    description: Fail when something is missing. The checks are returned all the same.
    type: bool
    default: true
  facts:
    description: Also return what a report shows beside the checks (RV(host)).
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Require that everything is in force
  organism.proxmox.host_audit:

- name: Look, and go on whatever is found
  organism.proxmox.host_audit:
    fail: false
  register: audit
"""

RETURN = r"""
audit:
  description: The report, with the keys that C(organism-audit --json) and C(organism-validate --json) have.
  returned: success or failed
  type: dict
  contains:
    ok:
      description: Nothing failed, and something passed.
      type: bool
    passed:
      description: Number of checks that passed.
      type: int
    failed:
      description: Number of checks that failed.
      type: int
    skipped:
      description: Number of checks that could not be made.
      type: int
    checks:
      description: The checks. C(ok) is none for a skipped one, C(next) says what to do about a failed one.
      type: list
      elements: dict
      sample:
        - check: host.now
          subject: memory /proc/sys/vm/swappiness
          ok: false
          seconds: 0.0
          detail: is 60, wanted 10
          next: ansible-playbook organism.proxmox.site --tags memory
host:
  description:
    - C(audit), C(facts), C(plan), C(levels), C(pending) and C(bench) of the host, for a report.
  returned: with O(facts=true)
  type: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _check, _host_audit, _host_facts
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Difference
from ansible_collections.organism.proxmox.plugins.module_utils._host_audit_parts import judges


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "fail": {"type": "bool", "default": True},
            "facts": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    host = _host_audit.Host()
    try:
        checks = _host_audit.audit(host, judges())
    except _host_audit.AuditError as error:
        refuse(module, str(error))
    result: dict[str, Any] = {"audit": _check.as_dict(checks)}
    if module.params["facts"]:
        result["host"] = {**_host_facts.gather(host.root, host.run), "audit": result["audit"]}
    message = _host_audit.summary(checks)
    bad = [f"{each.check} {each.subject}: {each.detail} ({each.next})" for each in checks if each.ok is False]
    if module.params["fail"] and not _check.passed(checks):
        refuse(module, f"{message}. {'; '.join(bad) or 'nothing is set up here'}", **result)
    finish(module, Difference(), msg=message, **result)


if __name__ == "__main__":
    main()
