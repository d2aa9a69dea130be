# SPDX-License-Identifier: MIT
"""Programs for developing and testing; no part of the installed package."""
