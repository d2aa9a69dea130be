# SPDX-License-Identifier: MIT
"""A migration between two hosts: two VMs with different kernels and graphics memory pools, joined by a pipe.

``__main__`` is the host's part, ``sides`` what runs in the VMs.
"""
