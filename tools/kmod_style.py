# SPDX-License-Identifier: MIT
"""``python -m tools.kmod_style [KERNEL]``: show the sample driver to the kernel's checkpatch.pl, with --strict.

The program is of the source package that KERNEL (6.12, 6.1 or newest) was built from, which is fetched into the cache.
"""

import os
import sys
from pathlib import Path
from typing import Final

from tools.kvmgt import build, source
from tools.vm import kernels, newest
from tools.vm.cache import cache_root
from tools.vm.errors import EXIT_RUNNER, RunnerError

KMOD: Final = Path(__file__).resolve().parent / "kmod"


def files() -> list[Path]:
    """Return the driver's C files, without what a build by hand has left."""
    return sorted(path for path in KMOD.rglob("*.[ch]") if not path.name.endswith(".mod.c"))


def check(setting: build.Setting) -> None:
    """Show the driver to the checkpatch.pl of *setting*'s source.

    :raises RunnerError: with all that it has to say.
    """
    build.style(setting, [], files())


def _say(message: str) -> None:
    print(f"kmod_style: {message}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Fetch what is missing and check; return the exit code."""
    cache = cache_root(os.environ)
    try:
        kernel = newest.find(arguments[0] if arguments else kernels.SERIES[0], cache, _say)
        check(build.Setting(kernel, source.fetch(kernel, cache, _say), cache, sparse=Path("sparse"), log=_say))
    except (RunnerError, OSError) as error:
        _say(str(error))
        return EXIT_RUNNER
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
