# SPDX-License-Identifier: MIT
"""The checks of the migration protocol v2, one module for each part of the header."""
