# SPDX-License-Identifier: MIT
"""``python -m vfio_mig``: the command line."""

if __name__ == "__main__":
    from vfio_mig.cli import main

    main()
