# SPDX-License-Identifier: MIT
"""The former place of ``vfio_mig.vm``: ``jobs``, ``memory`` and ``qmp`` keep its names for scripts that import them."""
