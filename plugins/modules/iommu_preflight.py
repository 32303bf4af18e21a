#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: iommu_preflight
short_description: Can a host give its cards to virtual machines, and what shares an IOMMU group
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Looks at firmware, kernel, command line, interrupt remapping, C(vfio-pci), leftovers of recipes, and the IOMMU group
    of each display controller with what the host needs of it. Changes nothing.
  - An ACS override is told when somebody has set it, and explained, and never proposed.
  - The command C(organism-iommu) shows the same on the host.
extends_documentation_fragment:
  - organism.proxmox.attributes
attributes:
  diff_mode:
    support: none
    details: It changes nothing.
options:
  require:
    description: Fail with all reasons when the host cannot give any card away.
    type: bool
    default: false
seealso:
  - module: organism.proxmox.pve_vfio
"""

EXAMPLES = r"""
- name: Look at the groups
  organism.proxmox.iommu_preflight:
  register: iommu

- name: Show them
  ansible.builtin.debug:
    msg: "{{ iommu.table }}"
"""

RETURN = r"""
ready:
  description: Whether nothing stands against giving cards away.
  type: bool
  returned: always
active:
  description: Whether the running kernel has IOMMU groups.
  type: bool
  returned: always
records:
  description: One record a check.
  type: list
  elements: dict
  returned: always
  contains:
    check:
      description: What was looked at.
      type: str
      sample: firmware
    status:
      description: V(ok), V(warn) or V(fail).
      type: str
      sample: ok
    detail:
      description: What was found.
      type: str
      sample: Intel VT-d (DMAR)
    next:
      description: What to do about it; empty where nothing has to be done.
      type: str
      sample: ""
cards:
  description: The display controllers.
  type: list
  elements: dict
  returned: always
  contains:
    address:
      description: The PCI address.
      type: str
      sample: "0000:03:00.0"
    id:
      description: Vendor and device.
      type: str
      sample: 1002:67df
    model:
      description: The name from pci.ids, or the id.
      type: str
      sample: Ellesmere [Radeon RX 470/480/570/570X/580/580X/590]
    driver:
      description: The driver of now, if any.
      type: str
      sample: amdgpu
    group:
      description: The IOMMU group, if any.
      type: int
      sample: 17
    beside:
      description: Members of the group that are no part of the card.
      type: list
      elements: str
      sample: []
    reset:
      description: The ways to reset it that the kernel would try.
      type: list
      elements: str
      sample: [bus]
    console:
      description: Whether the firmware shows its screen on it.
      type: bool
    verdict:
      description: V(own group), V(shared group) or V(must stay).
      type: str
      sample: own group
    reasons:
      description: Why it has to stay, or what would go with it.
      type: list
      elements: str
      sample: []
groups:
  description: The addresses in each group.
  type: dict
  returned: always
  sample: {"17": ["0000:03:00.0", "0000:03:00.1"]}
tokens:
  description: The kernel parameters that this processor's IOMMU wants.
  type: dict
  returned: always
  sample: {intel_iommu: "on", iommu: pt}
table:
  description: The same for people, a line each.
  type: list
  elements: str
  returned: always
  sample: ["ok    firmware  Intel VT-d (DMAR)"]
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _iommu_preflight, _preflight
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import refuse
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root


def main() -> None:
    module = AnsibleModule(argument_spec={"require": {"type": "bool", "default": False}}, supports_check_mode=True)
    report = _iommu_preflight.report(Root())
    lines = [*_preflight.table(report.records), *_iommu_preflight.card_lines(report.cards)]
    shown = {**report.as_dict(), "table": lines}
    if module.params["require"] and not report.ready:
        refuse(module, f"no card can be given away: {_preflight.failures(report.records)}", **shown)
    module.exit_json(changed=False, msg="ready" if report.ready else _preflight.failures(report.records), **shown)


if __name__ == "__main__":
    main()
