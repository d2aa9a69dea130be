#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""The module vfio_mig_migrate."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vfio_mig_migrate
short_description: Moves the state of a VFIO device to another device
description:
  - Calls C(vfio-mig migrate) on the host that the state leaves; that one reaches the other host by ssh itself.
  - A device whose state was moved already is left as it is, whatever its target was.
  - If it fails before the target has the whole state, the device goes on, and the task fails with what to do.
extends_documentation_fragment:
  - vfio_mig.fleet.command
  - vfio_mig.fleet.command.copying
options:
  device:
    description: An mdev's UUID, a PCI address or a path, as C(vfio-mig) takes it.
    type: str
    required: true
  target:
    description: A device of the same host, or C(ssh://[USER@]HOST[:PORT]/DEVICE). A process there holds it open.
    type: str
    required: true
  target_memory:
    description: Where the pages of O(memory) go to, as the target's host knows it.
    type: list
    elements: str
    default: []
  start:
    description: Start the target.
    type: bool
    default: true
  rsh:
    description: What reaches another host, called with the host and one line of command.
    type: str
  force:
    description: Also if the state was moved before, and may go on elsewhere.
    type: bool
    default: false
attributes:
  check_mode:
    support: partial
    description: Looks whether there is such a device, and whether its state was moved. The target is not asked.
"""

EXAMPLES = r"""
- name: Move a vGPU and its pages
  vfio_mig.fleet.vfio_mig_migrate:
    device: 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    target: ssh://root@other/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    memory: /dev/shm/guest@0
    target_memory: /dev/shm/guest@0
"""

RETURN = r"""
report:
  description: As C(vfio-mig --json migrate) has it (docs/schemas/migrate.json).
  returned: when it was moved
  type: dict
status:
  description: How the device was before, as C(vfio-mig --json status) has it (docs/schemas/status.json).
  returned: always
  type: dict
error:
  description: What C(vfio-mig --json) says of a failure (docs/schemas/error.json).
  returned: when it failed
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402 -- ansible wants the documentation first
from ansible_collections.vfio_mig.fleet.plugins.module_utils.command import (  # noqa: E402
    COMMON,
    COPYING,
    Command,
    words,
)

OPTIONS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "memory", "target_memory", "all_memory", "live", "rounds", "max_downtime", "strict", "no_start", "rsh", "force",
    )
}  # fmt: skip


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        {
            **COMMON,
            **COPYING,
            "device": {"type": "str", "required": True},
            "target": {"type": "str", "required": True},
            "target_memory": {"type": "list", "elements": "str", "default": []},
            "start": {"type": "bool", "default": True},
            "rsh": {"type": "str"},
        },
        supports_check_mode=True,
    )
    command, given = Command(module), module.params
    status = command.run("status", "--", given["device"])
    moves = given["force"] or not status["moved"]
    if not moves or module.check_mode:
        module.exit_json(changed=moves, status=status)
    options = words({**given, "no_start": not given["start"]}, OPTIONS)
    report = command.run("migrate", *options, "--", given["device"], given["target"], status=status)
    module.exit_json(changed=True, status=status, report=report)


if __name__ == "__main__":
    main()
