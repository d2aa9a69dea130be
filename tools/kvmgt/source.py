# SPDX-License-Identifier: MIT
"""The source that the distribution built its kvmgt from, fetched into the cache.

kvmgt.ko is linked against i915.ko, whose structures it uses through i915's own headers. The header packages have
none of these, so they come from the source package of the very version that the kernel was built from. Of its 1.4 GB
only what a build of kvmgt reads is kept, and the program that checks patches.
"""

import lzma
import re
import shutil
import subprocess
import tarfile
from pathlib import Path, PurePosixPath
from typing import Final

from tools.vm import newest
from tools.vm.apt import Apt, HostApt
from tools.vm.cache import populated
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel, Log
from tools.vm.mtty import debian_version

I915: Final = PurePosixPath("drivers/gpu/drm/i915")
GVT: Final = I915 / "gvt"
CHECKPATCH: Final = PurePosixPath("scripts/checkpatch.pl")

_NEEDED: Final = re.compile(
    r"linux-source-[^/]+/(?P<name>"
    r"drivers/gpu/drm/i915/(?:[\w./-]+\.h|gvt/[\w-]+\.c|gvt/Makefile)"
    r"|scripts/(?:checkpatch\.pl|spelling\.txt|const_structs\.checkpatch))"
)
_TARBALL: Final = re.compile(r"(?:.*/)?linux-source-[^/]*\.tar\.[a-z0-9]+")
_BANNER_BYTES: Final = 1 << 16
_RECIPE: Final = 1  # to be raised when other files are kept
_CACHED: Final = "kvmgt-"
_ONCE: Final = "apt-once"  # lists of 200 MB, which a host that builds once in a while does not keep
_SPARSE: Final = "sparse"


def series_of(release: str) -> str:
    """Return the first two numbers of a release.

    >>> series_of("6.12.117+deb12-amd64"), series_of("6.1.0-56-amd64")
    ('6.12', '6.1')
    """
    found = re.match(r"\d+\.\d+(?!\d)", release)
    if found is None:
        raise RunnerError(f"{release} does not begin with a kernel's version")
    return found[0]


def package_of(kernel: Kernel) -> tuple[str, str]:
    """Return name and version of the source package that *kernel*'s image says it was built from."""
    with kernel.image.open("rb") as file:
        version = debian_version(file.read(_BANNER_BYTES))
    if version is None:
        message = f"{kernel.image} does not say from which of Debian's source packages it was built"
        raise RunnerError(f"{message}, so there is no source that certainly fits its i915")
    return f"linux-source-{series_of(kernel.release)}", version


def _keep(tarball: tarfile.TarFile, directory: Path) -> int:
    """Write what a build needs below *directory*; return the number of files."""
    kept = 0
    for member in tarball:
        wanted = _NEEDED.fullmatch(member.name)
        if wanted is None or not member.isfile() or ".." in PurePosixPath(member.name).parts:
            continue
        content = tarball.extractfile(member)
        if content is not None:
            path = directory / wanted["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
            kept += 1
    return kept


def _check(directory: Path, origin: str, kept: int) -> None:
    for name in (GVT / "Makefile", GVT / "kvmgt.c", CHECKPATCH):
        if not (directory / name).is_file():
            raise RunnerError(f"{origin} has no {name} ({kept} files were taken)")


def extract(package: Path, directory: Path) -> None:
    """Unpack of a source package, a tarball in a tarball, what a build needs; neither is written to the disk."""
    command: list[str | Path] = ["dpkg-deb", "--fsys-tarfile", package]
    kept = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as dpkg:
        try:
            with tarfile.open(fileobj=dpkg.stdout, mode="r|") as outer:
                for member in outer:
                    if _TARBALL.fullmatch(member.name):
                        with tarfile.open(fileobj=outer.extractfile(member), mode="r|*") as inner:
                            kept = _keep(inner, directory)
                        break
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise RunnerError(f"{package.name} cannot be read: {error}") from None
        finally:
            dpkg.kill()  # what follows in the package is nobody's business
    _check(directory, package.name, kept)


def extract_installed(tarball: Path, directory: Path) -> None:
    """Unpack what a build needs of the tarball that an installed source package has put there."""
    try:
        with tarfile.open(tarball, mode="r|*") as inner:
            kept = _keep(inner, directory)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise RunnerError(f"{tarball} cannot be read: {error}") from None
    _check(directory, str(tarball), kept)


def installed_tarball(name: str, version: str, root: Path = Path("/")) -> Path | None:
    """Return the tarball of the source package *name* if exactly *version* of it is installed on this host."""
    done = subprocess.run(
        ["dpkg-query", f"--root={root}", "-W", "-f", "${db:Status-Status} ${Version}", name],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0 or done.stdout != f"installed {version}":
        return None
    return next(iter(sorted((root / "usr/src").glob(f"{name}.tar.*"))), None)


def _download(apt: Apt, package: str, directory: Path) -> Path:
    try:
        apt.download([package], directory)
    except RunnerError:
        # Lists may be missing, or older than the mirror; once more with what it says now.
        apt.update()
        apt.download([package], directory)
    found = sorted(directory.glob("*.deb"))
    if len(found) != 1:
        raise RunnerError(f"the download of {package} left {len(found)} packages")
    return found[0]


def _sources(kernel: Kernel, cache: Path) -> list[Apt]:
    """Return whom to ask for a source package: of a kernel that is installed here first the host's own lists."""
    if suite := newest.suite_of(kernel, cache):
        return [suite]
    if kernel.is_installed:
        return [HostApt(cache / _ONCE), Apt(cache / _ONCE)]
    return [Apt(cache / "apt")]


def _fill(kernel: Kernel, cache: Path, work: Path, log: Log, apt: Apt | None) -> None:
    name, version = package_of(kernel)
    package = f"{name}={version}"
    if kernel.is_installed and (tarball := installed_tarball(name, version)):
        log(f"taking {GVT} from {tarball}")
        extract_installed(tarball, work)
        return
    log(f"fetching {package}, 150 MB, for {GVT}")
    downloads = work / "download"
    downloads.mkdir()
    failure = ""
    for one in [apt] if apt else _sources(kernel, cache):
        try:
            found = _download(one, package, downloads)
            break
        except RunnerError as error:
            failure = str(error)
    else:
        where = (
            f"the newest kernel of the distribution still has it; apt-get install {name} where {version} can be had"
            if kernel.is_installed
            else f"a kernel newer than the one in {cache} may still have it"
        )
        raise RunnerError(f"{failure}\n({where})")
    extract(found, work)
    shutil.rmtree(downloads)
    shutil.rmtree(cache / _ONCE, ignore_errors=True)


def fetch(kernel: Kernel, cache: Path, log: Log, apt: Apt | None = None) -> Path:
    """Return the directory with kvmgt's source as *kernel* has it, from the cache if it is there.

    :param apt: the package sources; by default those that the kernel came from.
    :raises RunnerError: the kernel does not name its source, or no package source has that version any more.
    """
    final = cache / "sources" / f"{_CACHED}{package_of(kernel)[1]}-{_RECIPE}"
    with populated(final) as work:
        if work is not None:
            _fill(kernel, cache, work, log, apt)
    return final


def version_of_source(directory: Path) -> str:
    """Return the version of the source package that :func:`fetch` has made *directory* of."""
    return directory.name.removeprefix(_CACHED).removesuffix(f"-{_RECIPE}")


def fetch_sparse(cache: Path, log: Log, apt: Apt | None = None) -> Path:
    """Return the program sparse: the host's own if there is one, else from its package, unpacked in the cache."""
    if own := shutil.which(_SPARSE):
        return Path(own)
    final = cache / "tools" / _SPARSE
    with populated(final) as work:
        if work is not None:
            log(f"fetching {_SPARSE}")
            package = _download(apt or Apt(cache / "apt"), _SPARSE, work)
            subprocess.run(["dpkg", "-x", package, work], check=True)
            package.unlink()
            if not (work / "usr/bin" / _SPARSE).is_file():
                raise RunnerError(f"{package.name} has no usr/bin/{_SPARSE}")
    return final / "usr/bin" / _SPARSE
