# SPDX-License-Identifier: MIT
"""What befalls jobs.

=============  ============================================================
``injection``  makes a job fail at a step, by ``VFIO_MIG_FAULT``
``faulty``     the program with that: ``python -m tools.lab.faults.faulty``
``cells``      the table: each job, each fault, its exit code
``stage``      two held vGPUs on which the cells are played
=============  ============================================================
"""
