# SPDX-License-Identifier: MIT
"""The program, with faults at its jobs' steps: ``VFIO_MIG_FAULT=… python -m tools.lab.faults.faulty COMMAND…``."""

from tools.lab.faults.injection import install
from vfio_mig.cli import main

if __name__ == "__main__":
    install()
    main()
