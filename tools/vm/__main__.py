# SPDX-License-Identifier: MIT
"""Entry point of ``python -m tools.vm``; ``scripts/vm`` is how it is meant to be called."""

import sys

from tools.vm.cli import main

sys.exit(main(sys.argv[1:]))
