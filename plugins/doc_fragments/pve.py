# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How a module reaches Proxmox VE."""

from __future__ import annotations


class ModuleDocFragment:
    """The options of ``argument_spec()`` in the library's ``_pve_client.py``."""

    DOCUMENTATION = r"""
options:
  backend:
    description:
      - How Proxmox VE is reached. V(local) calls C(pvesh) as root on the node that the module runs on; V(https) calls
        the API of O(api_host) with a token or with a ticket.
      - V(auto) is V(https) when O(api_host) is given, and V(local) otherwise.
      - Some keys of a VM belong to C(root@pam) alone, among them C(affinity), C(args), C(hookscript), C(hugepages) and
        C(hostpci) without a mapping. No API token may set them, not even one of C(root@pam) without privilege
        separation. V(local) may, and so may a ticket of C(root@pam) (O(api_user) and O(api_password)).
    type: str
    choices: [auto, https, local]
    default: auto
  node:
    description:
      - Name of the node that is meant. Without it, the only node there is, or the node on which the object is found.
    type: str
  api_host:
    description: Name or address of a node whose API is called.
    type: str
  api_port:
    description: Port of the API.
    type: int
    default: 8006
  api_user:
    description: User with realm, as V(root@pam) or V(ansible@pve).
    type: str
  api_token_id:
    description: Name of the user's API token. V(USER@REALM!NAME), as Proxmox VE shows it, is understood, too.
    type: str
  api_token_secret:
    description: Secret of the token. Without it, the environment variable E(PROXMOX_TOKEN_SECRET) is read.
    type: str
  api_password:
    description:
      - Password of the user, with which a ticket is fetched. Without it, the environment variable E(PROXMOX_PASSWORD)
        is read.
    type: str
  api_ca:
    description: File with the authority that signed the API's certificate, as a copy of C(/etc/pve/pve-root-ca.pem).
    type: path
  validate_certs:
    description: Whether the API's certificate is verified.
    type: bool
    default: true
  timeout:
    description: Seconds that one call may take. Tasks have limits of their own.
    type: int
    default: 60
requirements:
  - proxmoxer == 2.3.0 and requests, in the Python that runs the module, for O(backend=https)
"""
