# SPDX-License-Identifier: MIT
"""Is a process in the middle of a migration? Its open data fds tell, without a word to the device."""

from __future__ import annotations

import os
import re
from typing import Final

_DATA_FD: Final = re.compile(r"anon_inode:\[?(?:\w+_mig|pds_vfio_lm)\]?")
"""Names of v2 data fds: mlx5vf_mig, hisi_acc_vf_mig, qat_vf_mig, virtiovf_mig, xe_vfio_mig, mtty_mig; pds' own."""


def is_migrating(pid: int) -> bool:
    """Tell whether a process has the data fd of a migration open; False also where it cannot be looked into."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return False
    for name in names:
        try:
            if _DATA_FD.fullmatch(os.readlink(f"{directory}/{name}")):
                return True
        except OSError:
            continue
    return False
