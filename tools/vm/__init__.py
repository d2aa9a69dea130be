# SPDX-License-Identifier: MIT
"""The VM runner behind ``scripts/vm``.

One file per concern: ``cache`` (where everything is kept), ``apt`` (the host's package sources), ``suites`` (newer
ones of the distribution), ``qemu`` (which one), ``kernels`` (fetching and unpacking), ``newest`` (the newest kernel
and its compiler), ``custom`` (building a kernel of our own), ``module`` (building the sample driver), ``mtty`` (the
kernel's own sample), ``gvt`` (the emulated GPU and its host driver), ``link`` (a network cable to another VM),
``libvirt`` (a daemon of it), ``kvm`` (is it usable?), ``guest`` (the scripts that run inside), ``machine``
(starting and watching QEMU), ``feed`` (standard input's way in), ``kernlog`` (did the kernel complain?), ``errors``.
:mod:`tools.vm_cli` is the command line.
"""
