# SPDX-License-Identifier: MIT
"""GVT-g's driver kvmgt with migration, built for a stock kernel: ``scripts/kvmgt``; tools/kvmgt/README.md.

``source`` (the distribution's source), ``elf`` (is it the stock module?), ``series`` (the patches), ``build``,
``installed`` (among a kernel's modules), ``secure_boot`` (whose key signs it), ``pack`` (what the package has),
``mail`` (the series for the kernel's lists), ``cli``.
"""
