#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""The module vfio_mig_save."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vfio_mig_save
short_description: Saves the state of a VFIO device into a file on its host
description:
  - Calls C(vfio-mig save). The device is left stopped, unless O(leave_running).
  - If the file is there already and C(vfio-mig verify) finds it whole, nothing is done. A file that is not whole is
    an error, unless O(force) replaces it.
extends_documentation_fragment:
  - vfio_mig.fleet.command
  - vfio_mig.fleet.command.copying
options:
  device:
    description: An mdev's UUID, a PCI address or a path, as C(vfio-mig) takes it.
    type: str
    required: true
  path:
    description: The file, on the managed host.
    type: path
    required: true
  leave_running:
    description: Let the device go on as it was found once everything is read.
    type: bool
    default: false
  force:
    description:
      - Save whether the file is there or not, and replace it; also a state that C(migrate) has moved to another device.
      - Then every run changes something.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Looks whether the file is there and whole, and whether there is such a device.
"""

EXAMPLES = r"""
- name: Save a vGPU and its pages, and let it go on
  vfio_mig.fleet.vfio_mig_save:
    device: 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    path: /var/backups/gpu.vfm
    memory: /dev/shm/guest@0
    leave_running: true
"""

RETURN = r"""
report:
  description: As C(vfio-mig --json save) has it (docs/schemas/save.json).
  returned: when it was saved
  type: dict
verified:
  description: As C(vfio-mig --json verify) has it (docs/schemas/verify.json).
  returned: when the file was there already
  type: dict
"""

import os  # noqa: E402 -- ansible wants the documentation first

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.vfio_mig.fleet.plugins.module_utils.command import (  # noqa: E402
    COMMON,
    COPYING,
    Command,
    words,
)

OPTIONS = {
    name: f"--{name.replace('_', '-')}"
    for name in ("memory", "all_memory", "live", "rounds", "max_downtime", "strict", "leave_running", "force")
}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        {
            **COMMON,
            **COPYING,
            "device": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "leave_running": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    command, given = Command(module), module.params
    if os.path.lexists(given["path"]) and not given["force"]:
        module.exit_json(changed=False, verified=command.run("verify", "--", given["path"]))
    if module.check_mode:
        command.run("status", "--", given["device"])
        module.exit_json(changed=True)
    report = command.run("save", *words(given, OPTIONS), "--", given["device"], given["path"])
    module.exit_json(changed=True, report=report)


if __name__ == "__main__":
    main()
