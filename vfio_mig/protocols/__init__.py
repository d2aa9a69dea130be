# SPDX-License-Identifier: MIT
"""How one family of devices is stopped, read and loaded."""
