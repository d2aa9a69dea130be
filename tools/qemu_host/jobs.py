# SPDX-License-Identifier: MIT
"""Names of ``vfio_mig.vm.jobs``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio_mig.vm.jobs import memory_maps, owner, restore_vgpu, save_vgpu
from vfio_mig.vm.machine import vfio_devices

if TYPE_CHECKING:
    from vfio_mig.vm.qmp import Qmp

__all__ = ["memory_maps", "owner", "restore_vgpu", "save_vgpu"]


def _vfio_devices(qmp: Qmp) -> list[str]:
    """Name the VM's VFIO devices that QEMU can name."""
    return [one.name for one in vfio_devices(qmp) if one.name]
