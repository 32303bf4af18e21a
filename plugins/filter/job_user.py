# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The user that a GPU's jobs run as."""

from __future__ import annotations

from collections.abc import Callable

from ansible_collections.organism.proxmox.plugins.module_utils import _worker_settings

DOCUMENTATION = r"""
name: job_user
short_description: Name the user that the jobs of a GPU run as
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - What the worker of a GPU makes of its setting C(JOB_USER), so that the user can be created before.
  - V(%i) is the id of the GPU, or eight digits of its digest where no user can have such a name.
options:
  _input:
    description: The id of the GPU.
    type: str
    required: true
  pattern:
    description: The setting C(JOB_USER).
    type: str
    required: true
seealso:
  - module: organism.proxmox.gpu_worker
"""

EXAMPLES = r"""
user: "{{ 'gpu0' | organism.proxmox.job_user('organism-job-%i') }}"
# => organism-job-gpu0
"""

RETURN = r"""
_value:
  description: The user's name.
  type: str
"""


def job_user(gpu: str, pattern: str) -> str:
    return _worker_settings.job_user(pattern, gpu)


class FilterModule:
    """Filters of this file, by the name that a template uses."""

    def filters(self) -> dict[str, Callable[..., str]]:
        return {"job_user": job_user}
