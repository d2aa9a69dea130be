# SPDX-License-Identifier: MIT
"""Finding devices in sysfs, opening and borrowing them, creating and removing mdevs."""
