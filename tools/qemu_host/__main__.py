# SPDX-License-Identifier: MIT
"""``python -m tools.qemu_host save|restore …``: what ``scripts/qemu-save`` and ``scripts/qemu-restore`` run."""

from __future__ import annotations

import sys

from vfio_mig.cli.qemu import run

if __name__ == "__main__":
    run(f"qemu-{sys.argv[1]}", sys.argv[2:])
