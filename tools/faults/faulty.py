# SPDX-License-Identifier: MIT
"""The program, with faults at its jobs' steps: ``VFIO_MIG_FAULT=… python -m tools.faults.faulty COMMAND…``."""

from tools.faults.injection import install
from vfio_mig.cli import main

if __name__ == "__main__":
    install()
    main()
