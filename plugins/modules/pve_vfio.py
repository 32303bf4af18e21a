#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: pve_vfio
short_description: Give cards of a host to vfio-pci, for virtual machines, and back
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Chooses GPUs by address, id, class or driver, takes the other functions of the same card (sound, USB-C) and the rest
    of each IOMMU group along, and binds just these to C(vfio-pci), now where nothing uses them, and at each boot.
  - Each function is named by its address and identity in a udev rule that sets C(driver_override) before any driver is
    loaded, in the initramfs too. Other cards of the same kind stay with the host, and so does what comes to such an
    address after a change of hardware.
  - Refuses, before anything has changed, a group that holds a disk in use, a network port in use (default route,
    bridge, bond, addresses, or just up), the chipset, or the only console, and lists the members of the group.
  - Drivers in use are not torn away. With O(bind=auto) a card that has a driver waits for a reboot, which is told in
    RV(pending) and left in C(/run/organism/reboot-required.d/vfio), for the role P(organism.proxmox.reboot#role).
  - What was there before is recorded, and V(absent) brings it back, with C(driver_override) as empty as it was.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  devices:
    description:
      - What to take. In one entry all that is given must hold, and each entry must find something.
      - What was taken earlier and is not found any more by these entries is given back.
    type: list
    elements: dict
    default: []
    suboptions:
      address:
        description: A PCI address (V(0000:03:00.0)), or a slot (V(0000:03:00)) for all its functions.
        type: str
      id:
        description: Vendor and device (V(1002:67df)), or the vendor alone (V(1002)), which means display controllers.
        type: str
      class:
        description: V(display), V(vga), V(3d), or the beginning of a class in hexadecimal (V(0300)).
        type: str
      driver:
        description: The driver that the card has, or had before it was taken (V(amdgpu)).
        type: str
      function:
        description:
          - V(physical) functions, V(virtual) ones (SR-IOV), or V(any). An address is taken as it is.
        type: str
        choices: [physical, virtual, any]
        default: physical
  exclude:
    description: Addresses or slots that stay with the host.
    type: list
    elements: str
    default: []
  cards:
    description: How many GPUs there must be. Another number is refused, since a card may be dead or badly seated.
    type: int
  state:
    description: With V(absent) everything is given back. O(devices) is not needed then.
    type: str
    choices: [present, absent]
    default: present
  mode:
    description:
      - V(address) takes just what was chosen.
      - V(ids) sets the option C(ids=) of C(vfio-pci), which takes every device of the same vendor and device id. It is
        refused when that would catch a device that was not chosen.
    type: str
    choices: [address, ids]
    default: address
  bind:
    description:
      - When functions change hands. V(auto) is now for groups in which nothing has a driver, and at the next boot for
        the others. What is given back goes back now.
      - V(now) takes them from their drivers. Refused while a process uses one.
      - V(boot) changes nothing of the running host.
    type: str
    choices: [auto, now, boot]
    default: auto
  disable_vga:
    description: Take the cards out of legacy VGA arbitration, which is good for guests with OVMF alone.
    type: bool
    default: false
  reset_method:
    description:
      - The only way in which the kernel may reset the cards (V(bus), V(flr), V(pm), V(device_specific)), for cards that
        do not survive the one that it takes first. It has to be among those that the kernel knows for the card.
      - V(device_specific) comes with modules such as C(vendor-reset), which is not installed by anything here.
    type: str
    choices: [bus, flr, af_flr, pm, device_specific, acpi]
  give_console:
    description: Take the card of the only console, too, after which the host has no screen.
    type: bool
    default: false
notes:
  - The kernel parameters of an IOMMU are set by M(organism.proxmox.kernel_cmdline), see the role
    P(organism.proxmox.gpu_passthrough#role).
  - An ACS override is never set. It makes the kernel believe in a separation that the hardware does not have.
  - A function that Proxmox VE itself binds to C(vfio-pci) at the start of a VM stays there when the VM stops.
seealso:
  - module: organism.proxmox.iommu_preflight
  - module: organism.proxmox.gpu_reset_probe
  - module: organism.proxmox.kernel_cmdline
"""

EXAMPLES = r"""
- name: All of AMD's cards but the one with the screen
  organism.proxmox.pve_vfio:
    devices:
      - {id: "1002", class: display}
    exclude: ["0000:0b:00"]
    cards: 12

- name: One card by its place
  organism.proxmox.pve_vfio:
    devices:
      - address: "0000:03:00"

- name: The virtual functions of an Intel card
  organism.proxmox.pve_vfio:
    devices:
      - {id: "8086:e212", function: virtual}

- name: Give all of them back
  organism.proxmox.pve_vfio:
    state: absent
"""

RETURN = r"""
functions:
  description: The functions that are taken, as they are now (in check mode, as they were).
  type: list
  elements: dict
  returned: success
  contains:
    address:
      description: The PCI address.
      type: str
      sample: "0000:03:00.0"
    id:
      description: Vendor and device.
      type: str
      sample: 1002:67df
    subsystem_id:
      description: Vendor and device of the board, as PCI mappings want them.
      type: str
      sample: 1da2:e366
    model:
      description: The name from pci.ids, or the id.
      type: str
      sample: Ellesmere [Radeon RX 470/480/570/570X/580/580X/590]
    class:
      description: Six hexadecimal digits.
      type: str
      sample: "030000"
    gpu:
      description: Whether it is a display controller.
      type: bool
    reason:
      description: V(selected), V(companion) (of the same card) or V(group) (of the same IOMMU group).
      type: str
      sample: selected
    group:
      description: The IOMMU group.
      type: int
      sample: 17
    own_group:
      description: Whether nothing but its own card (and bridges) is in the group.
      type: bool
    driver:
      description: The driver of now, if any.
      type: str
      sample: vfio-pci
    driver_override:
      description: What is set there, empty for nothing.
      type: str
      sample: vfio-pci
    driver_before:
      description: The driver before it was taken, if any.
      type: str
      sample: amdgpu
    reset:
      description: The ways to reset it that the kernel would try. See M(organism.proxmox.gpu_reset_probe).
      type: list
      elements: str
      sample: [bus]
    bound:
      description: Whether it belongs to C(vfio-pci) now.
      type: bool
gpus:
  description: The addresses of the GPUs among them.
  type: list
  elements: str
  returned: success
  sample: ["0000:03:00.0", "0000:04:00.0"]
reboot_required:
  description: Does anything wait for a reboot?
  type: bool
  returned: success
pending:
  description: What waits for a reboot, in sentences.
  type: list
  elements: str
  returned: success
  sample: ["0000:03:00.0 has amdgpu, and vfio-pci from the next boot on"]
refreshed:
  description: Commands that wrote the initramfs anew.
  type: list
  elements: str
  returned: success
  sample: [update-initramfs -u -k all]
kept_by_others:
  description: What is not taken back, because somebody else has changed it since, as it is now.
  type: dict
  returned: success
  sample: {}
"""

from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import (
    _iommu,
    _vfio_apply,
    _vfio_files,
    _vfio_plan,
    _vfio_select,
)
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierState, EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, run_command

RESET_METHODS = ["bus", "flr", "af_flr", "pm", "device_specific", "acpi"]
"""Names in drivers/pci/pci.c (pci_reset_fn_methods)."""


def hands(root: Root) -> _vfio_apply.Hands:
    """What touches the host; packing an initramfs takes minutes."""
    return _vfio_apply.Hands(root, lambda argv: run_command(argv, timeout=_vfio_apply.INITRAMFS_SECONDS))


def wish_of(params: dict[str, Any]) -> _vfio_plan.Wish:
    """Raises SelectError."""
    if params["state"] == "absent":
        return _vfio_plan.Wish(bind=params["bind"])
    if not params["devices"]:
        raise _vfio_select.SelectError("devices is empty: name cards, or say state absent to give all of them back")
    return _vfio_plan.Wish(
        tuple(_vfio_select.selector(entry) for entry in params["devices"]),
        tuple(_iommu.normal(address) for address in params["exclude"]),
        params["mode"],
        params["bind"],
        params["disable_vga"],
        params["give_console"],
        params["cards"],
        params["reset_method"] or "",
    )


def converge(module: AnsibleModule, root: Root) -> NoReturn:
    """Plan, refuse or carry out, and say how it is."""
    wish = wish_of(module.params)
    earlier = EarlierState(_vfio_plan.CAPABILITY, root)
    facts = _vfio_plan.gather(root, earlier)
    plan = _vfio_plan.make_plan(root, earlier, facts, wish)
    done = _vfio_apply.Outcome(plan.waiting)
    if not module.check_mode:
        done = _vfio_apply.apply(hands(root), earlier, plan)
    rows = _vfio_apply.rows(root, facts, plan)
    finish(
        module,
        plan.difference,
        header="cards for virtual machines",
        functions=rows,
        gpus=[row["address"] for row in rows if row["gpu"]],
        reboot_required=bool(done.waiting),
        pending=done.waiting,
        refreshed=done.ran,
        kept_by_others=plan.kept_by_others,
    )


def main() -> None:
    entry = {
        "address": {"type": "str"},
        "id": {"type": "str"},
        "class": {"type": "str"},
        "driver": {"type": "str"},
        "function": {"type": "str", "choices": list(_vfio_select.FUNCTIONS), "default": _vfio_select.PHYSICAL},
    }
    module = AnsibleModule(
        argument_spec={
            "devices": {"type": "list", "elements": "dict", "default": [], "options": entry},
            "exclude": {"type": "list", "elements": "str", "default": []},
            "cards": {"type": "int"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "mode": {"type": "str", "choices": [_vfio_files.ADDRESS_MODE, _vfio_files.IDS_MODE], "default": "address"},
            "bind": {"type": "str", "choices": list(_vfio_plan.BINDS), "default": _vfio_plan.AUTO},
            "disable_vga": {"type": "bool", "default": False},
            "reset_method": {"type": "str", "choices": RESET_METHODS},
            "give_console": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        converge(module, Root())
    except (
        _vfio_plan.VfioRefused,
        _vfio_apply.VfioError,
        EarlierStateError,
        CommandError,
        ValueError,
        OSError,
    ) as error:
        refuse(module, f"cards for virtual machines: {error}")


if __name__ == "__main__":
    main()
