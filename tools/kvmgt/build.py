# SPDX-License-Identifier: MIT
"""Building kvmgt out of tree: unmodified, to be compared with the distribution's, and with the series.

Everything is built in the cache, from a copy of the source. The unmodified build comes first and is a gate: where its
code is not the stock module's, byte by byte, nothing else is built (:mod:`tools.kvmgt.elf` says why).
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.kvmgt import elf, mail, series
from tools.kvmgt.series import Patch
from tools.kvmgt.source import CHECKPATCH, GVT, I915, series_of, version_of_source
from tools.vm import module
from tools.vm.cache import locked, populated, write_whole
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel, Log

NAME: Final = "kvmgt"
_CHECKOUT: Final = Path(__file__).resolve().parents[2]
_CDEFS: Final = _CHECKOUT / "cdefs"
_RECIPE: Final = b"3"  # to be raised when something else is built, or compared, from the same sources
_CHECKED: Final = re.compile(r"^  CHECK   ", re.MULTILINE)
_COMPILED: Final = re.compile(r"^  CC \[M\]  \S*/gvt/\w+\.o", re.MULTILINE)
_PLACE: Final = re.compile(r":\d+(?::\d+)?: ")
_SPARSE_ERROR: Final = re.compile(r":\d+:\d+: error: ")

# Kbuild's own Makefile in the source builds all of i915. `-DI915` is what it sets there; the last but one directory is
# where TRACE_INCLUDE_PATH of trace.h starts from. Whole paths, as newer kernels' $(src) is a dot, which names in the
# module would then begin with.
_MAKEFILE: Final = """\
subdir-ccflags-y += -DI915 -I{root}/{i915} -I{root}/{i915}/../.. -I{root}/cdefs
obj-m := kvmgt.o
include $(src)/gvt/Makefile
"""
# Beside the driver and in no series: who looks at a module, or at /sys/module/kvmgt, sees whose it is.
_STAMP: Final = "vfio_mig_stamp"
_STAMP_TEXT: Final = """\
// SPDX-License-Identifier: MIT
#include <linux/module.h>
MODULE_VERSION("{version}");
MODULE_INFO({field}, "{source}");
"""
SOURCE_FIELD: Final = "vfio_mig_source"
"""What modinfo calls the source package that a module of ours was made from."""
_VERSION: Final = re.compile(r'^__version__ = "([^"\n]+)"$', re.MULTILINE)
_CONFIGURED: Final = re.compile(r'^CONFIG_CC_VERSION_TEXT="([^"\n]*)"$', re.MULTILINE)
_DKMS_ARCHIVE: Final = "var/lib/dkms/vfio-mig-kvmgt/original_module"


def warnings_in(log: str) -> list[str]:
    """Return the warnings of compiler, modpost and sparse, and sparse's errors, which do not fail a build."""
    errors = [line for line in log.splitlines() if _SPARSE_ERROR.search(line)]
    return module.warnings_in(log) + errors


def new_warnings(log: str, known: Sequence[str]) -> list[str]:
    r"""Return the warnings that are not among *known*; where in a file something is does not matter.

    >>> new_warnings("a.c:1:2: warning: odd\nb.c:5: warning: bad", ["a.c:7:2: warning: odd"])
    ['b.c:5: warning: bad']
    """
    left = [_PLACE.sub(": ", line) for line in known]
    found = []
    for line in warnings_in(log):
        same = _PLACE.sub(": ", line)
        if same in left:
            left.remove(same)
        else:
            found.append(line)
    return found


def our_version() -> str:
    """Return this project's version, which modules carry."""
    found = _VERSION.search((_CHECKOUT / "vfio_mig/version.py").read_text("utf-8"))
    if found is None:
        raise RunnerError(f"{_CHECKOUT}/vfio_mig/version.py has no version")
    return found[1]


def stock_module(kernel: Kernel) -> Path:
    """Return the distribution's own kvmgt; where dkms has put it away for one of ours, from there."""
    found = sorted((kernel.tree / "lib/modules" / kernel.release / "kernel" / I915).glob(f"{NAME}.ko*"))
    if not found:
        archived = (kernel.tree / _DKMS_ARCHIVE / kernel.release).glob(f"*/{NAME}.ko*")
        found = sorted(path for path in archived if path.suffix != ".origin")
    if len(found) != 1:
        raise RunnerError(f"kernel {kernel.release} has no {NAME}: its packages were built without GVT-g")
    return found[0]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a build works with.

    :param source: the unmodified source, as :mod:`tools.kvmgt.source` fetched it.
    :param sparse: the program; without it nothing is built again for more warnings.
    :param log: is told what takes long, and what was found.
    """

    kernel: Kernel
    source: Path
    cache: Path
    sparse: Path | None
    log: Log

    @property
    def modules(self) -> Path:
        """The directory that built modules are kept in."""
        return self.cache / "modules"


@dataclass(frozen=True, slots=True)
class Tree:
    """A copy of the source that is built in."""

    setting: Setting
    root: Path

    @classmethod
    def make(cls, setting: Setting, root: Path) -> "Tree":
        """Copy the unmodified source to *root*."""
        shutil.copytree(setting.source / "drivers", root / "drivers")
        shutil.copytree(_CDEFS, root / "cdefs")
        (root / I915 / "Makefile").write_text(_MAKEFILE.format(root=root, i915=I915))
        return cls(setting, root)

    def add_ours(self) -> None:
        """Copy our files beside kvmgt's own; patches of the series have them built."""
        ours = [*series.OURS.glob("*.[ch]"), *(series.SERIES / series_of(self.setting.kernel.release)).glob("*.h")]
        for path in sorted(ours):
            target = self.root / GVT / path.name
            if target.exists():
                raise RunnerError(f"{path}: kvmgt of {self.setting.kernel.release} has a file of this name")
            shutil.copyfile(path, target)
        stamp = _STAMP_TEXT.format(
            version=our_version(), field=SOURCE_FIELD, source=version_of_source(self.setting.source)
        )
        (self.root / GVT / f"{_STAMP}.c").write_text(stamp, "utf-8")
        with (self.root / I915 / "Makefile").open("a", encoding="utf-8") as makefile:
            makefile.write(f"kvmgt-y += gvt/{_STAMP}.o\n")

    def name_below(self, directory: str) -> None:
        """Have the compiler believe that the source is below *directory*, for names that no option of its maps.

        UBSAN's are such names. Line numbers stay what they are.
        """
        for path in (self.root / GVT).glob("*.c"):
            path.write_text(f'#line 1 "{directory}{GVT}/{path.name}"\n{path.read_text("utf-8")}', "utf-8")

    def name_as_it_is(self) -> None:
        """Undo :meth:`name_below`."""
        for path in (self.root / GVT).glob("*.c"):
            first, rest = path.read_text("utf-8").split("\n", 1)
            path.write_text(rest if first.startswith("#line 1 ") else f"{first}\n{rest}", "utf-8")

    def compile(self, what: str, *, checks: bool, below: str = "") -> str:
        """Build kvmgt.ko; return make's log.

        Without debugging information, which is 14 MB and no code. No path of this machine is in the module: what is
        below *root*, and the kernel's headers, are named as they are in the kernel's source.

        :param below: what was given to :meth:`name_below`.

        :param checks: with W=1 and sparse. That module is not to be used: some of W=1's options change the code.
        """
        options = ["W=1", "C=1", f"CHECK={self.setting.sparse}"] if checks else []
        headers = self.setting.kernel.common_headers
        mapped = " ".join(
            f"-fmacro-prefix-map={place}="
            for place in (f"{self.root}/", *([f"{headers}/"] if headers else []), below)
            if place
        )
        log = module.make(
            self.setting.kernel, self.root / I915, what, *options,
            "CONFIG_DEBUG_INFO=", "CONFIG_DRM_I915_GVT=y", f"KCFLAGS={mapped}",
            f"CC={compiler_of(self.setting.kernel)}",
        )  # fmt: skip
        log = log.replace(f"{self.root}/", "")
        checked, compiled = len(_CHECKED.findall(log)), len(_COMPILED.findall(log))
        if checks and checked < compiled:
            raise RunnerError(f"building {what}: sparse looked at {checked} of {compiled} files:\n{log}")
        return log

    @property
    def built(self) -> Path:
        """Where the module is after a build."""
        return self.root / I915 / f"{NAME}.ko"


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def configured_compiler(kernel: Kernel) -> str:
    """Return what the kernel's configuration says of the compiler that built it; empty where it says nothing."""
    config = kernel.headers / ".config"
    found = _CONFIGURED.search(config.read_text("utf-8", "replace")) if config.is_file() else None
    return found[1] if found else ""


def compiler_of(kernel: Kernel) -> str:
    """Return the compiler to call: of the name that built the kernel if this host has it, else gcc."""
    name = configured_compiler(kernel).partition(" ")[0]
    return name if kernel.tools is None and re.fullmatch(r"[\w.+-]+", name) and shutil.which(name) else "gcc"


def _compiler(kernel: Kernel) -> str:
    gcc = compiler_of(kernel) if kernel.tools is None else kernel.tools / "gcc"
    done = subprocess.run([gcc, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return done.stdout


def _recipe(setting: Setting) -> list[bytes]:
    """Return what decides how things are built, other than the sources."""
    return [_RECIPE, b"" if setting.sparse is None else b"checked", _compiler(setting.kernel).encode()]


def stock_key(setting: Setting) -> str:
    """Return a name that changes with all that the gate depends on, every byte of the source among it."""
    kernel = setting.kernel
    files = sorted(path for path in (setting.source / "drivers").rglob("*") if path.is_file())
    contents = [part for path in files for part in (os.fsencode(path.relative_to(setting.source)), path.read_bytes())]
    whose = [os.fsencode(kernel.tree), kernel.release.encode(), setting.source.name.encode()]
    return _digest(*whose, stock_module(kernel).read_bytes(), *_recipe(setting), *contents)


def series_key(setting: Setting, checkout_files: Sequence[Path]) -> str:
    """Return a name that changes with all that the patched module depends on."""
    contents = [part for path in checkout_files for part in (path.name.encode(), path.read_bytes())]
    return _digest(stock_key(setting).encode(), our_version().encode(), *contents)


def files_of(name: str) -> list[Path]:
    """List what the build for kernel series *name* reads of this checkout, in a fixed order."""
    return sorted(
        path
        for directory in (series.OURS, series.SERIES / name, series.MUTATIONS, _CDEFS)
        for path in directory.glob("*")
        if path.suffix in {".c", ".h", ".patch"}
    )


def gate(setting: Setting) -> list[str]:
    """Build kvmgt unmodified and compare it with the stock module.

    :returns: the warnings of that build, which are the distribution's and not ours.
    :raises RunnerError: it is not the same code; the message says what differs.
    """
    release = setting.kernel.release
    stock = stock_module(setting.kernel)
    final = setting.modules / f"{NAME}-stock-{stock_key(setting)}"
    with populated(final) as work:
        if work is not None:
            what = f"the unmodified {NAME} for {release}"
            setting.log(f"building {what}")
            tree = Tree.make(setting, work / "tree")
            verdict = _compare(setting, stock, tree, what)
            warnings = warnings_in(tree.compile(what, checks=True)) if setting.sparse is not None else []
            write_whole(work / "warnings", "".join(f"{line}\n" for line in warnings))
            write_whole(work / "gate", f"{verdict}\n")
            shutil.rmtree(work / "tree")
    setting.log(f"gate: the unmodified build is {stock.name} of {release}: {(final / 'gate').read_text().strip()}")
    return (final / "warnings").read_text().splitlines()


def _compare(setting: Setting, stock: Path, tree: Tree, what: str) -> str:
    """Build *tree* as the distribution did, and return how much was compared; RunnerError with what differs."""
    theirs = elf.read(stock)
    below = elf.built_below(theirs, f"{GVT}/{NAME}.c") or ""
    if below:
        tree.name_below(below)
    tree.compile(what, checks=False, below=below)
    tree.name_as_it_is()
    ours = elf.read(tree.built)
    if different := elf.differences(theirs, ours):
        first = f"gate: {NAME} built from {setting.source.name} is not {stock}; nothing is built on it:"
        compiler = f"built by {_compiler(setting.kernel).splitlines()[0]}"
        if configured := configured_compiler(setting.kernel):
            compiler += f"; the kernel by {configured}"
        raise RunnerError("\n  ".join([first, *different, compiler]))
    size = sum(len(part) for part in ours.sections.values() if isinstance(part, bytes))
    relocations = sum(map(len, ours.relocations.values()))
    return f"{len(ours.sections)} sections, {size} bytes, {relocations} relocations, all equal"


def _compile_clean(tree: Tree, what: str, known: Sequence[str]) -> None:
    output = tree.compile(what, checks=True)
    if found := new_warnings(output, known):
        raise RunnerError("\n".join([f"building {what} gave {len(found)} warning(s):", *found]))


def _apply(patch: Patch, tree: Tree) -> None:
    if moved := patch.apply(tree.root):
        tree.setting.log(f"{patch.path.name}: made for another version of the source:\n{moved}")


def file_name(mutation: str | None) -> str:
    """Return the name of a built module in its directory.

    >>> file_name(None), file_name("g2h_gtt")
    ('kvmgt.ko', 'kvmgt-g2h_gtt.ko')
    """
    return f"{NAME}.ko" if mutation is None else f"{NAME}-{mutation}.ko"


def _build_missing(setting: Setting, missing: Sequence[str | None], directory: Path, known: list[str]) -> None:
    """Build in one tree, so that of a mutation only the file that it changes is compiled."""
    patches = series.load(series_of(setting.kernel.release))
    directory.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=setting.modules) as work:
        tree = Tree.make(setting, Path(work) / "tree")
        tree.add_ours()
        for patch in patches:
            _apply(patch, tree)
        for mutation in missing:
            target = directory / file_name(mutation)
            what = f"{target.name} for {setting.kernel.release}"
            setting.log(f"building {what}, {len(patches)} patches")
            wrong = None if mutation is None else series.mutation(mutation)
            if wrong is not None:
                _apply(wrong, tree)
            tree.compile(what, checks=False)
            built = tree.built.rename(Path(work) / target.name)
            if wrong is None:
                if setting.sparse is not None:
                    _compile_clean(tree, what, known)
            else:
                wrong.apply(tree.root, reverse=True)
            built.replace(target)


def build(setting: Setting, mutations: Sequence[str | None]) -> Path:
    """Make sure that the named builds exist (None is the series itself); return the directory that holds them.

    :raises RunnerError: the gate is shut, a patch does not fit, the build failed or gave a warning that the
        unmodified one does not give.
    """
    name = series_of(setting.kernel.release)
    series.load(name)  # or say at once that there is none
    directory = setting.modules / f"{NAME}-{series_key(setting, files_of(name))}"
    known = gate(setting)
    with locked(setting.modules / f".{directory.name}.lock"):
        missing = [mutation for mutation in mutations if not (directory / file_name(mutation)).exists()]
        if missing:
            # The series last: with its extra warnings the objects are other ones.
            _build_missing(setting, sorted(missing, key=lambda one: one is None), directory, known)
    return directory


def check(setting: Setting) -> None:
    """Build after every patch of the series in its form for the kernel's lists, and show each to checkpatch.pl.

    Nothing is there but what the patches so far have brought.

    :raises RunnerError: what does not build, warns, or does not follow the kernel's style.
    """
    release = setting.kernel.release
    name = series_of(release)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=setting.modules) as work:
        mails = mail.write(setting.source, name, Path(work) / "mails", version_of_source(setting.source))[1:]
        style(setting, mails, [])
        known = gate(setting)
        tree = Tree.make(setting, Path(work) / "tree")
        shutil.rmtree(tree.root / "cdefs")
        (tree.root / "cdefs").mkdir()  # or a compiler that looks there warns
        for number, (sent, patch) in enumerate(zip(mails, series.load(name), strict=True), 1):
            _apply(series.Patch(sent, patch.title, patch.targets), tree)
            _compile_clean(tree, f"{NAME} for {release} after {patch.path.name}", known)
            setting.log(f"{number}/{len(mails)} builds: {patch.title}")


def style(setting: Setting, patches: Sequence[Path], files: Sequence[Path]) -> None:
    """Show patches and files to the kernel's own checkpatch.pl, with --strict.

    Nobody signs these patches off, for they are not sent to the kernel from here.
    """
    command = ["perl", str(setting.source / CHECKPATCH), "--strict", "--no-tree", "--no-signoff", "--terse", "--quiet"]
    # "Added files, does MAINTAINERS need updating?" and the like ask about a tree that there is not.
    command += ["--ignore", "FILE_PATH_CHANGES,COMMIT_LOG_LONG_LINE", "--max-line-length=100"]
    found = []
    for switch, paths in (([], patches), (["--file"], files)):
        if paths:
            done = subprocess.run(
                [*command, *switch, *map(str, paths)], stdin=subprocess.DEVNULL, capture_output=True,
                text=True, errors="replace", check=False,
            )  # fmt: skip
            found += [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            found = [line for line in found if not line.startswith("total: ")]
            if done.returncode != 0 and not found:
                raise RunnerError(f"{CHECKPATCH} failed with status {done.returncode}")
    if found:
        raise RunnerError("\n".join([f"{CHECKPATCH} --strict has {len(found)} remark(s):", *found]))
    setting.log(f"{CHECKPATCH} --strict: {len(patches)} patches and {len(files)} files are clean")
