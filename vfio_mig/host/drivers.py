# SPDX-License-Identifier: MIT
"""What is known of VFIO drivers by their names, and which driver a PCI function ought to have."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vfio_mig.host.devices import HostDevice

MIGRATES_SINCE: Final[dict[str, tuple[int, int] | None]] = {
    "hisi_acc_vfio_pci": (5, 18),
    "mlx5_vfio_pci": (5, 18),
    "mtty": (6, 7),
    "pds_vfio_pci": (6, 6),
    "qat_vfio_pci": (6, 10),
    "virtio_vfio_pci": (6, 13),
    "xe_vfio_pci": (6, 19),
    "nvgrace_gpu_vfio_pci": None,
    "vfio_pci": None,
    "vfio_platform": None,
    "vfio_amba": None,
    "vfio_fsl_mc": None,
    "vfio_cdx": None,
    "vfio_ap_mdev": None,
    "vfio_ccw_mdev": None,
}
"""The mainline driver of a name, with ``_`` for ``-``: the Linux release since which it has the migration protocol v2,
sets ``mig_ops`` (drivers/vfio, samples/vfio-mdev; up to 6.19), None for never. A device's firmware may lack it."""
GENERIC: Final = "vfio_pci"


def normal(driver: str) -> str:
    """Return a driver's name as its module is called."""
    return driver.replace("-", "_")


def is_vfio_driver(driver: str) -> bool:
    """Tell whether a driver makes VFIO devices of what it is bound to, by its name."""
    return "vfio" in normal(driver).split("_")


def migrates(driver: str, release: str = "") -> bool | None:
    """Tell whether a driver's devices have the migration protocol v2.

    :param release: of the kernel, as uname has it; by default of the running one.
    :returns: None when it is not known: of other drivers, and of one that is older than its migration, as that may have
        been added to it.
    """
    name = normal(driver)
    if name not in MIGRATES_SINCE:
        return None
    since = MIGRATES_SINCE[name]
    numbers = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    if since is None:
        return False
    return True if numbers and (int(numbers[1]), int(numbers[2])) >= since else None


def variant_of(modalias: str, aliases: str) -> str | None:
    """Return the module that fits a PCI function best of those for VFIO, None when only the generic one does.

    :param modalias: the function's, ``pci:v000015B3d0000101E…``.
    :param aliases: path of ``modules.alias``: ``alias vfio_pci:v000015B3d0000101Esv*… mlx5_vfio_pci``.
    """
    from fnmatch import fnmatchcase

    bus, colon, rest = modalias.partition(":")
    if bus != "pci" or not colon:
        return None
    best: tuple[int, str] | None = None
    try:
        with open(aliases, encoding="ascii", errors="replace") as file:
            for line in file:
                words = line.split()
                if len(words) == 3 and words[1].startswith("vfio_pci:"):  # noqa: PLR2004 -- alias PATTERN MODULE
                    pattern = words[1].removeprefix("vfio_pci:")
                    found = (pattern.count("*"), words[2])  # the fewer, the closer: as libvirt chooses
                    if fnmatchcase(rest, pattern) and (best is None or found < best):
                        best = found
    except OSError:
        return None
    return None if best is None or best[1] == GENERIC else best[1]


def better_driver(device: HostDevice, root: str = "/") -> str | None:
    """Return the VFIO driver of this kernel's that fits a PCI function better than its own, None when there is none."""
    try:
        with open(os.path.join(device.sysfs, "modalias"), encoding="ascii", errors="replace") as file:
            modalias = file.read(4096).strip()
    except OSError:
        return None
    variant = variant_of(modalias, os.path.join(root, "lib/modules", os.uname().release, "modules.alias"))
    return None if variant == normal(device.driver) else variant
