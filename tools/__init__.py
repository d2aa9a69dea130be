# SPDX-License-Identifier: MIT
"""Programs for developing and testing; no part of the installed package.

================  ===================================================================================
``vm_cli``        ``scripts/vm``: the command line of the VM runner, with what others build for its guests
``vm``            the VM runner
``kmod``          the sample driver, a kernel module for that VM: tools/kmod/README.md
``kmod_style``    shows that driver to the kernel's checkpatch.pl
``gpu``           an Intel gen9 GPU in software, for i915 and kvmgt in that VM: tools/gpu/README.md
``l2``            a guest with a load for a vGPU: tools/l2/README.md
``kvmgt``         the real driver with migration, patched and built: tools/kvmgt/README.md
``progress``      how far ``scripts/test`` is
``lab``           what tests, demos, benches and fault tables share: devices, guests, programs
``demo``          ``scripts/demo``
``qemu_host``     the former place of ``vfio_mig.vm``
``pair``          ``scripts/pair``, a migration between two VMs
``faults``        ``scripts/faults``, each fault on each job
``fuzz``          ``scripts/fuzz``
``bench``         ``scripts/bench``
``gen_uapi``      makes ``vfio_mig/uapi/_generated.py`` of ``cdefs/``
``uapi_diff``     shows how two ``vfio.h`` differ
``docs_site``     ``scripts/docs``: what makes a site of the documentation
``man``           makes ``man/`` of the commands' help
``schemas``       makes docs/schemas of the reports' annotations
``conform_table`` makes the tables of docs/conform.md
``steps_table``   makes the table of docs/scripting.md
================  ===================================================================================
"""
