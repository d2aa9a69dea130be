# SPDX-License-Identifier: MIT
"""Entry point of ``python -m tools.gpu``."""

import sys

from tools.gpu.cli import main

sys.exit(main(sys.argv[1:]))
