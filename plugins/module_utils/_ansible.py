# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one file of the library that knows Ansible: it turns differences and refusals into module results.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ._difference import Difference


class Refused(Exception):
    """A wanted state that must not be applied; the text names the object, the reason and the way out."""


def finish(module: AnsibleModule, difference: Difference, *, header: str = "", **result: Any) -> NoReturn:
    """Leave with ``changed``, ``msg`` and (when asked for) ``diff`` from one difference."""
    if module._diff:
        result["diff"] = difference.as_diff(header)
    module.exit_json(changed=difference.changed, msg=result.pop("msg", difference.message), **result)
    raise SystemExit  # exit_json never returns; this tells the type checker


def refuse(module: AnsibleModule, reason: str, **result: Any) -> NoReturn:
    """Fail before anything has changed."""
    module.fail_json(msg=reason, **result)
    raise SystemExit  # fail_json never returns
