# SPDX-License-Identifier: MIT
"""A migration between two hosts: two VMs with different kernels and graphics memory pools, joined by a pipe."""
