# SPDX-License-Identifier: MIT
"""Stop, save and restore VFIO devices without a VMM in the way."""

__version__ = "0.1.0.dev0"
