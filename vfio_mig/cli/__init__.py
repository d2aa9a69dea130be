# SPDX-License-Identifier: MIT
"""The command line: parses, calls one job, prints. No ioctls here."""

from vfio_mig.cli.main import main

__all__ = ["main"]
