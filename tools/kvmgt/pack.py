# SPDX-License-Identifier: MIT
"""What of this project builds kvmgt, and its headers for programs: ``python3 tools/kvmgt/pack.py DIRECTORY INCLUDE``.

It imports nothing of ours, as it runs while the package is built.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parents[2]
_FILES: Final = (
    "LICENSE",
    "tools/__init__.py",
    "tools/kvmgt/README.md",
    "tools/kvmgt/cover.txt",
    *(f"tools/vm/{name}.py" for name in ("__init__", "apt", "cache", "errors", "kernels", "module", "mtty", "newest")),
    "tools/vm/suites.py",
    "vfio_mig/version.py",
)
_PATTERNS: Final = ("tools/kvmgt/*.py", "tools/kvmgt/gvt/*.[ch]", "tools/kvmgt/series/*/*.*", "cdefs/gvt_*.h")
HEADERS: Final = (
    CHECKOUT / "cdefs/gvt_rfc.h",
    CHECKOUT / "cdefs/gvt_image.h",
    CHECKOUT / "tools/kvmgt/uapi/gvt_migration.h",
)
"""What is to be in ``/usr/include/vfio-mig``."""


def files() -> Iterator[Path]:
    """Yield what is to be copied, relative to the checkout."""
    yield from map(Path, _FILES)
    for pattern in _PATTERNS:
        yield from sorted(path.relative_to(CHECKOUT) for path in CHECKOUT.glob(pattern))


def pack(directory: Path) -> None:
    """Copy it to *directory*."""
    for path in files():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CHECKOUT / path, directory / path)


def pack_headers(directory: Path) -> None:
    """Copy the headers to *directory*."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in HEADERS:
        shutil.copyfile(path, directory / path.name)


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
    pack_headers(Path(sys.argv[2]))
