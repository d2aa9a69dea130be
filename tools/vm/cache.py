# SPDX-License-Identifier: MIT
"""The directory that holds kernels, modules and the traces of runs.

What is in it is whole or not there: every entry is made under a temporary name and renamed, so a killed
download or build is only garbage that the next one removes.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = ".partial-"


def cache_root(environ: Mapping[str, str]) -> Path:
    """Return the cache directory that this environment asks for (it may not exist yet)."""
    if own := environ.get("VFIO_MIG_CACHE"):
        return Path(own).absolute()
    base = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or str(Path.home()), ".cache")  # noqa: PTH118
    return Path(base).absolute() / "vfio_mig"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on *path*, a file made for that; waits for other holders, released by death too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def populated(final: Path) -> Iterator[Path | None]:
    """Give a directory to fill that becomes *final* only when the block ends without an error.

    Gives None when *final* is there already. One process fills, the others wait for it.
    """
    with locked(final.parent / f".{final.name}.lock"):
        if final.is_dir():
            yield None
            return
        # The lock is ours, so whatever carries this name was left by a process that died.
        for stale in final.parent.glob(f"{_PARTIAL}{final.name}-*"):
            shutil.rmtree(stale)
        work = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{final.name}-", dir=final.parent))
        try:
            yield work
            work.chmod(0o755)  # mkdtemp's 0700 would hide it from a guest that is not root here
            work.rename(final)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def write_whole(path: Path, text: str) -> None:
    """Replace *path* by *text* in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "w") as file:  # noqa: PTH123 -- it is a descriptor
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise
