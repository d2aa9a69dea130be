# SPDX-License-Identifier: MIT
"""GVT-g's driver kvmgt with migration, built for a stock kernel: ``scripts/kvmgt``; tools/kvmgt/README.md.

``source`` (the distribution's source), ``elf`` (is it the stock module?), ``series`` (the patches), ``build``, ``cli``.
"""
