#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: maestro_deploy
short_description: Deploy the conductor of a GPU pool
version_added: 0.1.0
description:
  - Writes C(/etc/organism/maestro.conf), C(/etc/organism/policy.toml), the unit C(maestro.service) and the files that
    tell clients where the bus is, and sees that the conductor is enabled, runs and answers.
  - Settings are checked by the schema that the daemon itself uses. A bad one is refused by its name, and nothing
    changes.
  - A running conductor is restarted only when something that it reads at its start has changed, its runtime included.
    That loses no job. State lies on the bus, and a stopping conductor hands its lease over.
author: The organism.proxmox authors (!UNKNOWN)
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description:
      - V(present) deploys, V(absent) stops the conductor and removes its files. Jobs stay on the bus in both cases.
    type: str
    choices: [present, absent]
    default: present
  settings:
    description:
      - Settings of the conductor by the names in C(maestro.conf), for example C(MAX_TEMP_C).
      - Defaults hold for the others.
    type: dict
    default: {}
  types:
    description: Types of job that may run in this pool.
    type: list
    elements: str
    default: [cmd, noop, python]
  operators:
    description: Users who may see and steer the jobs of everyone.
    type: list
    elements: str
    default: [admin]
  limits:
    description:
      - What each user may have, for C(/etc/organism/limits.toml), with the keys C(defaults), C(groups) and C(users).
      - Each holds C(max_queued), C(max_running), C(max_gpu_seconds), C(min_priority), C(max_priority) and C(types) as
        needed, or V(unlimited) for one of them. A group also has its C(users).
    type: dict
    default: {}
  contexts:
    description: Files that tell clients on this host where the bus is and who they are.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The file, for example C(/etc/organism/client.toml).
        type: path
        required: true
      servers:
        description: URLs of the bus.
        type: list
        elements: str
        required: true
      user:
        description: Name that the key was issued for.
        type: str
        required: true
      kind:
        description: Kind of the key.
        type: str
        choices: [submitter, operator]
        default: submitter
      nkey_file:
        description: File with the key's seed.
        type: path
      ca_file:
        description: Certificate authority of the bus. None for a bus without TLS.
        type: path
      shard:
        description: The share of the queue to work with.
        type: str
        default: "0"
      owner:
        description: Account that owns the file.
        type: str
        default: root
      group:
        description: Group of the file.
        type: str
        default: root
      mode:
        description: Mode of the file, octal.
        type: str
        default: "0644"
  health_context:
    description:
      - Context with which the conductor is asked for an answer after the deployment. Without one, that the unit is
        active has to do.
    type: path
  health_timeout:
    description: Seconds to wait for that answer. A standby takes over after C(LEASE_TTL_SEC).
    type: int
    default: 30
"""

EXAMPLES = r"""
- name: Deploy the conductor
  organism.proxmox.maestro_deploy:
    settings:
      NATS_URL: ["tls://bus1.example.org:4222"]
      NKEY_FILE: /etc/organism/keys/conductor-bus1.nk
      CA_FILE: /etc/organism/tls/ca.crt
      MAX_TEMP_C: 75
    types: [cmd]
    contexts:
      - path: /etc/organism/client.toml
        servers: ["tls://bus1.example.org:4222"]
        user: admin
        kind: operator
        nkey_file: /etc/organism/keys/operator-admin.nk
        ca_file: /etc/organism/tls/ca.crt
    health_context: /etc/organism/client.toml

- name: Remove it (jobs stay on the bus)
  organism.proxmox.maestro_deploy:
    state: absent
"""

RETURN = r"""
restarted:
  description: Why the running conductor was restarted, or would be in check mode. Empty when it went on.
  returned: success
  type: list
  elements: str
  sample: ["/etc/organism/maestro.conf changed"]
info:
  description: The conductor's own answer, as C(maestroctl --json info) gives it.
  returned: when O(health_context) is given and not in check mode
  type: dict
  sample: {"ok": true, "version": "0.1.0", "types": ["cmd", "noop", "python"]}
notices:
  description: Settings of earlier versions that no longer do anything.
  returned: success
  type: list
  elements: str
  sample: []
"""

import grp
import json
import pwd
import tempfile

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _ansible, _maestro_deploy, _maestro_settings
from ansible_collections.organism.proxmox.plugins.module_utils._maestro_deploy import DeployRefusedError, File, Plan
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import (
    CommandError,
    Systemctl,
    UnitState,
    booted,
    run_command,
)

OURS = (_maestro_deploy.CONFIG, _maestro_deploy.POLICY, _maestro_deploy.LIMITS, _maestro_deploy.UNIT_FILE)


def wanted_files(module: AnsibleModule) -> tuple[dict[str, File], tuple[str, ...]]:
    """Every file as it shall be, and notices. Raises DeployRefusedError before anything is touched."""
    params = module.params
    config, notices = _maestro_deploy.render_config(params["settings"])
    files = {
        _maestro_deploy.CONFIG: File(config),
        _maestro_deploy.POLICY: File(_maestro_deploy.render_policy(params["types"], params["operators"])),
        _maestro_deploy.LIMITS: File(_maestro_deploy.render_limits(params["limits"])),
        _maestro_deploy.UNIT_FILE: File(_maestro_deploy.UNIT_TEXT),
    }
    for context in params["contexts"]:
        text = _maestro_deploy.render_context(context)
        files[context["path"]] = File(text, int(context["mode"], 8), context["owner"], context["group"])
    return files, notices


def owners(files: dict[str, File]) -> dict[str, tuple[int, int]]:
    """Numbers of the owners' names. Raises DeployRefusedError for an account that does not exist."""
    try:
        return {path: (pwd.getpwnam(f.owner).pw_uid, grp.getgrnam(f.group).gr_gid) for path, f in files.items()}
    except KeyError as error:
        raise DeployRefusedError([f"{error.args[0]}: create the account, or name another owner"]) from None


def check_by_daemon(root: Root, config: str) -> None:
    """Let the installed daemon read the new settings before they take the place of the old ones."""
    if not root.exists(_maestro_deploy.DAEMON):
        raise DeployRefusedError([f"{_maestro_deploy.DAEMON} is not installed: run level 7 on this host first"])
    with tempfile.NamedTemporaryFile("w", prefix="maestro-", suffix=".conf") as candidate:
        candidate.write(config)
        candidate.flush()
        environment = {_maestro_settings.PATH_VARIABLE: candidate.name}
        run_command([_maestro_deploy.DAEMON, "--check-config"], env=environment)


def answer(context: str, timeout: int) -> dict[str, object]:
    """What the conductor says of itself. Raises CommandError when it says nothing within ``timeout`` seconds."""
    words = [_maestro_deploy.CLIENT, "--context", context, "--patience", str(timeout), "--json", "info"]
    return dict(json.loads(run_command(words, timeout=timeout + 30)))


def converge(systemctl: Systemctl, unit: UnitState, plan: Plan) -> None:
    """Bring the unit to run what has been written."""
    if _maestro_deploy.UNIT_FILE in plan.writes or unit.needs_reload:
        systemctl.call("daemon-reload")
    if not unit.enabled:
        systemctl.call("enable", _maestro_deploy.UNIT)
    if plan.restart:
        systemctl.call("restart", _maestro_deploy.UNIT)
    elif not unit.running:
        systemctl.call("start", _maestro_deploy.UNIT)


def deploy(module: AnsibleModule, root: Root, systemctl: Systemctl) -> None:
    """``state: present``."""
    files, notices = wanted_files(module)
    unit = systemctl.state(_maestro_deploy.UNIT) if booted(root) else UnitState(_maestro_deploy.UNIT)
    service = _maestro_deploy.read_service(root, unit)
    plan = _maestro_deploy.plan_present(_maestro_deploy.read_files(root, files), files, service)
    result: dict[str, object] = {"restarted": list(plan.restart), "notices": list(notices)}
    if not module.check_mode:
        if plan.difference:
            ids = owners(files)
            if _maestro_deploy.CONFIG in plan.writes:
                check_by_daemon(root, files[_maestro_deploy.CONFIG].content)
            _maestro_deploy.write_files(root, plan.writes, ids)
            converge(systemctl, unit, plan)
        if module.params["health_context"]:
            result["info"] = answer(module.params["health_context"], module.params["health_timeout"])
    _ansible.finish(module, plan.difference, header=_maestro_deploy.UNIT, **result)


def remove(module: AnsibleModule, root: Root, systemctl: Systemctl) -> None:
    """``state: absent``."""
    paths = [*OURS, *(context["path"] for context in module.params["contexts"])]
    unit = systemctl.state(_maestro_deploy.UNIT) if booted(root) else UnitState(_maestro_deploy.UNIT)
    plan = _maestro_deploy.plan_absent(
        _maestro_deploy.read_files(root, paths), _maestro_deploy.read_service(root, unit)
    )
    if plan.difference and not module.check_mode:
        if unit.load not in ("not-found", ""):
            systemctl.call("disable", _maestro_deploy.UNIT)
            systemctl.call("stop", _maestro_deploy.UNIT)
        _maestro_deploy.remove_files(root, plan.removes)
        systemctl.call("daemon-reload")
    _ansible.finish(module, plan.difference, header=_maestro_deploy.UNIT, restarted=[], notices=[])


def main() -> None:
    context = {
        "path": {"type": "path", "required": True},
        "servers": {"type": "list", "elements": "str", "required": True},
        "user": {"type": "str", "required": True},
        "kind": {"type": "str", "choices": ["submitter", "operator"], "default": "submitter"},
        "nkey_file": {"type": "path", "no_log": False},
        "ca_file": {"type": "path"},
        "shard": {"type": "str", "default": "0"},
        "owner": {"type": "str", "default": "root"},
        "group": {"type": "str", "default": "root"},
        "mode": {"type": "str", "default": "0644"},
    }
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "settings": {"type": "dict", "default": {}},
            "types": {"type": "list", "elements": "str", "default": ["cmd", "noop", "python"]},
            "operators": {"type": "list", "elements": "str", "default": ["admin"]},
            "limits": {"type": "dict", "default": {}},
            "contexts": {"type": "list", "elements": "dict", "default": [], "options": context},
            "health_context": {"type": "path"},
            "health_timeout": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    root, systemctl = Root(), Systemctl()
    try:
        (deploy if module.params["state"] == "present" else remove)(module, root, systemctl)
    except DeployRefusedError as error:
        _ansible.refuse(module, f"the conductor was left as it is: {error}")
    except (CommandError, OSError) as error:
        told = explain(systemctl) if booted(root) else ""
        _ansible.refuse(module, f"{_maestro_deploy.UNIT}: {error}{told}")


def explain(systemctl: Systemctl) -> str:
    """The daemon's last words, which say more than systemd's."""
    try:
        words = systemctl.explain(_maestro_deploy.UNIT)
    except CommandError:
        return ""  # the error itself is reported in any case
    return f"\nIts last words (journalctl -u {_maestro_deploy.UNIT}):\n{words}" if words else ""


if __name__ == "__main__":
    main()
