# SPDX-License-Identifier: MIT
"""The VM runner behind ``scripts/vm``.

One file per concern: ``cache`` (where everything is kept), ``kernels`` (fetching and unpacking), ``module``
(building the sample driver), ``kvm`` (is it usable?), ``guest`` (the scripts that run inside), ``machine``
(starting and watching QEMU), ``kernlog`` (did the kernel complain?), ``cli``.
"""
