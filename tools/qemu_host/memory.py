# SPDX-License-Identifier: MIT
"""Names of ``vfio_mig.vm.memory``."""

from vfio_mig.vm.memory import find_memory, locate, parse_flat_view, parse_hva, parse_maps, path_of

__all__ = ["find_memory", "locate", "parse_flat_view", "parse_hva", "parse_maps", "path_of"]
