# SPDX-License-Identifier: MIT
"""Entry point of ``python -m tools.kvmgt``; ``scripts/kvmgt`` is how it is meant to be called."""

import sys

from tools.kvmgt.cli import main

sys.exit(main(sys.argv[1:]))
