# SPDX-License-Identifier: MIT
"""What the options of the modules have in common, for ansible-doc."""

from __future__ import annotations


class ModuleDocFragment:
    """Of every module, and of those that copy a device's state and memory."""

    DOCUMENTATION = r"""
options:
  executable:
    description: The program, as a path or a name that is looked up on the managed host.
    type: path
    default: vfio-mig
requirements:
  - C(vfio-mig) on the managed host
author:
  - the vfio_mig project
"""

    COPYING = r"""
options:
  memory:
    description:
      - The guest's memory, C(FILE@GPA[:SIZE]) for each piece. Without it the state alone is copied.
    type: list
    elements: str
    default: []
  all_memory:
    description: Copy every page of O(memory), and not only those that the device may have written.
    type: bool
    default: false
  live:
    description: Read what can be read of the state while the device runs, and copy pages in rounds.
    type: bool
    default: false
  rounds:
    description: Rounds of copying before the stop, at most.
    type: int
  max_downtime:
    description: Stop the device as soon as the last round is expected to take no longer, in milliseconds.
    type: float
  strict:
    description: Fail if pages that the device may have written are not in O(memory).
    type: bool
    default: false
"""
