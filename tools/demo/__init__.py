# SPDX-License-Identifier: MIT
"""The demonstration that ``scripts/demo`` runs inside the VM."""
