# SPDX-License-Identifier: MIT
"""Names of ``vfio_mig.vm.qmp``."""

from vfio_mig.vm.qmp import Qmp

__all__ = ["Qmp"]
