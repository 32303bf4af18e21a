#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Steers packets: queues, flow tables, coalescing, offloads and disciplines of physical ports."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nic_steering
short_description: Which CPUs handle a network port's packets, and with which queues
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Sets channels, packet steering (RPS, RFS, XPS), interrupt coalescing, offloads and the queueing discipline of
    physical ports. A bridge, bond, VLAN or macvlan is followed down to its ports, V(auto) from the default route.
  - What a driver or kernel does not have is told in RV(unsupported) with its reason. A value that is taken and reads
    back as another one is a failure. Values that are right are not set again, as setting channels resets a card.
  - CPUs that are isolated (C(isolcpus), C(nohz_full)) are left out of RPS masks and named, as the kernel refuses them.
  - The wish is kept in C(/etc/organism/steer.json), by which C(organism-steer) sets it at boot and holds it when links
    and queues change. All wishes there are applied together, so new queues are steered by whichever wish steers them.
extends_documentation_fragment:
  - organism.proxmox.attributes
attributes:
  check_mode:
    support: full
    details:
      - Some drivers tell only when it is set that they lack a coalescing value or cannot switch an offload. Check mode
        predicts that change, and a real run reports it in RV(unsupported).
options:
  name:
    description:
      - Name of the wish. Several can stand side by side, each with its own record of earlier state, so that packet
        steering and the driver's settings can come and go by themselves. They must not differ about one setting.
    type: str
    default: nic
  state:
    description:
      - With V(absent) this wish's settings return to what they were, except those that somebody else has changed since,
        which are named in RV(kept_by_others).
    type: str
    choices: [present, absent]
    default: present
  interfaces:
    description:
      - Interfaces whose physical ports are steered; V(auto) is that of the default route as it is now. It is kept by
        its name, since at boot steering may come before routes.
    type: list
    elements: str
    default: [auto]
  io_cpus:
    description: The I/O zone as a CPU list. Without it, that of the CPU plan (M(organism.proxmox.cpu_plan)).
    type: str
  channels:
    description:
      - Number of combined channels (or of receive and of transmit channels, where the driver has no combined ones), at
        most what the driver has. V(auto) is one for each I/O CPU, V(keep) leaves them alone.
    type: str
    default: keep
  rps:
    description: Let the I/O CPUs share the work of each receive queue (C(rps_cpus)).
    type: bool
    default: false
  xps:
    description: Let the I/O CPUs use each transmit queue (C(xps_cpus)). A port with one queue has none.
    type: bool
    default: false
  flow_entries:
    description: Entries of each receive queue's flow table (C(rps_flow_cnt)), a power of two; V(0) leaves it alone.
    type: int
    default: 0
  coalesce:
    description: Interrupt coalescing; what is not named is left alone. Adaptive modes are switched off before times.
    type: dict
    default: {}
    suboptions:
      adaptive_rx:
        description: Let the driver choose for receiving.
        type: bool
      adaptive_tx:
        description: Let the driver choose for sending.
        type: bool
      rx_usecs:
        description: Microseconds that a received packet may wait for its interrupt.
        type: int
      tx_usecs:
        description: Microseconds that a sent packet may wait for its interrupt.
        type: int
      rx_frames:
        description: Packets that may be received before an interrupt.
        type: int
      tx_frames:
        description: Packets that may be sent before an interrupt.
        type: int
  offloads:
    description: Offloads to switch; what is not named is left alone.
    type: dict
    default: {}
    suboptions:
      gro:
        description: Generic receive offload.
        type: bool
      gso:
        description: Generic segmentation offload.
        type: bool
      tso:
        description: TCP segmentation offload.
        type: bool
      lro:
        description: Large receive offload.
        type: bool
  qdisc:
    description:
      - Queueing discipline, such as V(fq), at the root or, with several transmit queues, at each of them. Empty leaves
        it alone. One that somebody has set up on purpose (a shaper) is left alone too, and named in RV(unsupported).
    type: str
    default: ""
  drift_check:
    description: Seconds after which C(organism-steer) looks without having heard of a change.
    type: int
    default: 600
seealso:
  - module: organism.proxmox.irq_affinity
  - module: organism.proxmox.cpu_plan
"""

EXAMPLES = r"""
- name: Let the I/O CPUs handle the packets of the default route's ports
  organism.proxmox.nic_steering:
    name: packets
    rps: true
    xps: true
    flow_entries: 4096

- name: One queue for each I/O CPU, and a fair queueing discipline
  organism.proxmox.nic_steering:
    interfaces: [vmbr0]
    channels: auto
    qdisc: fq

- name: No interrupt waits for another packet
  organism.proxmox.nic_steering:
    name: lowlat
    coalesce: {adaptive_rx: false, adaptive_tx: false, rx_usecs: 0, tx_usecs: 0}

- name: Take packet steering back
  organism.proxmox.nic_steering:
    name: packets
    state: absent
"""

RETURN = r"""
ports:
  description: The physical ports that are steered.
  type: list
  elements: dict
  returned: when O(state=present)
  sample: [{name: eno1, driver: igb, address: "0000:03:00.0", rx_queues: 2, tx_queues: 2}]
settings:
  description: Each value that this or another wish holds, as it was, as it should be, and as it was read back.
  type: list
  elements: dict
  returned: when O(state=present)
  sample: [{port: eno1, setting: rps/rx-0, before: "", wanted: "1,7", after: "1,7", ok: true}]
unsupported:
  description: What a driver or kernel does not have, with the reason.
  type: list
  elements: dict
  returned: when O(state=present)
  sample: [{port: eno1, what: xps, reason: "it has one transmit queue, so there is nothing to choose"}]
kept_by_others:
  description: Values that are not restored because somebody else has changed them, as they are now.
  type: dict
  returned: always
  sample: {"nic:eno1/rps/rx-0": "2"}
keeper:
  description: Whether anything is left for C(organism-steer) to hold.
  type: bool
  returned: always
  sample: true
"""

import re
from typing import NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import (
    _netdev,
    _nic_apply,
    _nic_plan,
    _steer_config,
    _steer_pass,
    _steer_zones,
)
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Difference
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._nic import NicError, Nics
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError

SECTION = "nic"


def channels(module: AnsibleModule) -> int:
    """The number, -1 for one a CPU, 0 for none of ours."""
    words = {"auto": -1, "keep": 0}
    given: str = module.params["channels"]
    if given in words:
        return words[given]
    if not re.fullmatch(r"[1-9]\d{0,3}", given):
        refuse(module, f"channels must be auto, keep or a number from 1, not {given!r}")
    return int(given)


def wish_of(module: AnsibleModule, root: Root) -> _nic_plan.NicWish:
    """The arguments as a wish."""
    params = module.params
    zones = _steer_zones.zones(root, {"io": params["io_cpus"]}, ("io",), check=module.check_mode)
    return _nic_plan.NicWish(
        interfaces=_netdev.named(root, params["interfaces"]),
        cpus=zones["io"],
        channels=channels(module),
        rps=params["rps"],
        xps=params["xps"],
        flow_entries=params["flow_entries"],
        coalesce={key: int(value) for key, value in params["coalesce"].items() if value is not None},
        offloads={key: value for key, value in params["offloads"].items() if value is not None},
        qdisc=params["qdisc"],
    )


def present(module: AnsibleModule, root: Root) -> NoReturn:
    """All wishes held, this one among them."""
    name: str = module.params["name"]
    if module.params["drift_check"] < 1:
        refuse(module, f"drift_check must be 1 second or more, not {module.params['drift_check']}")
    wish = wish_of(module, root)
    with _steer_config.held(root, really=not module.check_mode):
        before = _steer_config.load(root).get(SECTION, {})
        wishes = {**_steer_pass.nic_wishes(before), name: wish}
        section = {
            "wishes": {each: held.as_dict() for each, held in wishes.items()},
            "drift_check": module.params["drift_check"],
        }
        others = set(wishes) - {name}
        outcome = _nic_apply.steer(Nics(root), wishes, check=module.check_mode, lenient=others)
        if not module.check_mode and before != section:
            _steer_config.write_section(root, SECTION, section)
    what = f"{_steer_config.PATH} ({SECTION} {name})"
    outcome.difference.add(what, before.get("wishes", {}).get(name), wish.as_dict())
    outcome.difference.add(
        f"{_steer_config.PATH} ({SECTION} drift_check)", before.get("drift_check"), section["drift_check"]
    )
    finish(
        module,
        outcome.difference,
        header="network ports",
        ports=[
            {
                "name": port.name,
                "driver": port.driver,
                "address": port.address,
                "rx_queues": port.rx,
                "tx_queues": port.tx,
            }
            for port in outcome.ports.values()
        ],
        settings=outcome.settings,
        unsupported=[entry.as_dict() for entry in outcome.unsupported],
        kept_by_others=outcome.kept,
        keeper=True,
    )


def absent(module: AnsibleModule, root: Root) -> NoReturn:
    """This wish taken back; the keeper is told first, so that it does not undo this."""
    name: str = module.params["name"]
    difference = Difference()
    with _steer_config.held(root, really=not module.check_mode):
        sections = _steer_config.load(root)
        before = sections.get(SECTION, {})
        wishes = _steer_pass.nic_wishes(before)
        others = {each: held for each, held in wishes.items() if each != name}
        difference.add(
            f"{_steer_config.PATH} ({SECTION} {name})", wishes[name].as_dict() if name in wishes else None, None
        )
        if name in wishes and not module.check_mode:
            rest = {**before, "wishes": {each: held.as_dict() for each, held in others.items()}}
            _steer_config.write_section(root, SECTION, rest if others else None)
        outcome = _nic_apply.restore(Nics(root), name, others, check=module.check_mode)
    outcome.difference.merge(difference)
    keeper = bool(others) or bool(set(sections) - {SECTION})
    finish(module, outcome.difference, header="network ports", kept_by_others=outcome.kept, keeper=keeper)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "default": _nic_apply.DEFAULT_NAME},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "interfaces": {"type": "list", "elements": "str", "default": ["auto"]},
            "io_cpus": {"type": "str"},
            "channels": {"type": "str", "default": "keep"},
            "rps": {"type": "bool", "default": False},
            "xps": {"type": "bool", "default": False},
            "flow_entries": {"type": "int", "default": 0},
            "coalesce": {
                "type": "dict",
                "default": {},
                "options": {
                    "adaptive_rx": {"type": "bool"},
                    "adaptive_tx": {"type": "bool"},
                    "rx_usecs": {"type": "int"},
                    "tx_usecs": {"type": "int"},
                    "rx_frames": {"type": "int"},
                    "tx_frames": {"type": "int"},
                },
            },
            "offloads": {
                "type": "dict",
                "default": {},
                "options": {
                    "gro": {"type": "bool"},
                    "gso": {"type": "bool"},
                    "tso": {"type": "bool"},
                    "lro": {"type": "bool"},
                },
            },
            "qdisc": {"type": "str", "default": ""},
            "drift_check": {"type": "int", "default": _steer_config.DRIFT_CHECK},
        },
        supports_check_mode=True,
    )
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", module.params["name"]):
        refuse(module, f"a wish's name is lower case letters, digits, - and _, not {module.params['name']!r}")
    try:
        if module.params["state"] == "present":
            present(module, Root())
        absent(module, Root())
    except (ValueError, NicError, CommandError, EarlierStateError, OSError) as error:
        refuse(module, f"network ports: {error}")


if __name__ == "__main__":
    main()
