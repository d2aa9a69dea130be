#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""The module vfio_mig_info."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vfio_mig_info
short_description: Tells which VFIO devices a host has, and what is known of one
description:
  - Without O(device) it lists the host's devices and the types of mdevs that can be made, as C(vfio-mig list) and
    C(vfio-mig mdev types) do.
  - With O(device) it tells what C(vfio-mig status) does of that one. No closed device is opened.
extends_documentation_fragment:
  - vfio_mig.fleet.command
options:
  device:
    description: An mdev's UUID, a PCI address or a path, as C(vfio-mig) takes it.
    type: str
attributes:
  check_mode:
    support: full
    description: Nothing is ever changed.
"""

EXAMPLES = r"""
- name: Which devices are there
  vfio_mig.fleet.vfio_mig_info:
  register: here

- name: Who has this one open
  vfio_mig.fleet.vfio_mig_info:
    device: 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
"""

RETURN = r"""
devices:
  description: The devices, as C(vfio-mig --json list) has them (docs/schemas/list.json).
  returned: without O(device)
  type: list
  elements: dict
types:
  description: The types of mdevs, as C(vfio-mig --json mdev types) has them (docs/schemas/mdev-types.json).
  returned: without O(device)
  type: list
  elements: dict
status:
  description: As C(vfio-mig --json status) has it (docs/schemas/status.json).
  returned: with O(device)
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402 -- ansible wants the documentation first
from ansible_collections.vfio_mig.fleet.plugins.module_utils.command import COMMON, Command  # noqa: E402


def main() -> None:
    """Run the module."""
    module = AnsibleModule({**COMMON, "device": {"type": "str"}}, supports_check_mode=True)
    command = Command(module)
    device = module.params["device"]
    if device is None:
        module.exit_json(changed=False, devices=command.run("list"), types=command.run("mdev", "types"))
    module.exit_json(changed=False, status=command.run("status", "--", device))


if __name__ == "__main__":
    main()
