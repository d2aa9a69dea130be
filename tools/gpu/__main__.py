# SPDX-License-Identifier: MIT
"""Entry point of ``python -m tools.gpu``."""

import sys

from tools.gpu.cli import end_on_signals, main

end_on_signals()
sys.exit(main(sys.argv[1:]))
