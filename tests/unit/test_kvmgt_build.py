# SPDX-License-Identifier: MIT
from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools.kvmgt import build, series
from tools.kvmgt.source import GVT, I915
from tools.vm import module
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel

if TYPE_CHECKING:
    from collections.abc import Callable

CODE = "int code(void)\n{\n\treturn 1;\n}\n"
# Names of files that no option maps are for the test in such a section
NAMED = """\
__attribute__((section(".rodata"), used)) static const char name[] = "\\0" __FILE__;
int code(void) { return 1; }
"""
PATCH = """\
Subject: drm/i915/gvt: Return {after}

---
diff --git a/drivers/gpu/drm/i915/gvt/kvmgt.c b/drivers/gpu/drm/i915/gvt/kvmgt.c
--- a/drivers/gpu/drm/i915/gvt/kvmgt.c
+++ b/drivers/gpu/drm/i915/gvt/kvmgt.c
@@ -3,1 +3,1 @@
-\treturn {before};
+\treturn {after};
"""


@functools.cache
def object_of(text: str) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        to = Path(name) / "x.o"
        subprocess.run(["gcc", "-O2", "-x", "c", "-c", "-", "-o", to], input=text, text=True, check=True)
        return to.read_bytes()


def compiled(text: str, to: Path) -> None:
    to.write_bytes(object_of(text))


class Make:
    """Stands for the kernel's make: compiles kvmgt.c alone, and says what make would say."""

    def __init__(self) -> None:
        self.built: list[tuple[str, bool]] = []
        self.says: Callable[[str], str] = lambda _text: ""
        self.checked = 1
        self.options = list[str]()

    def __call__(self, _kernel: Kernel, directory: Path, _what: str, *variables: str) -> str:
        text = (directory / "gvt" / "kvmgt.c").read_text()
        self.options += [word for one in variables for word in one.removeprefix("KCFLAGS=").split()]
        self.built.append((text, "W=1" in variables))
        compiled(text, directory / "kvmgt.ko")
        said = "  CC [M]  /x/gvt/kvmgt.o\n" + "  CHECK   /x/gvt/kvmgt.c\n" * (self.checked if "C=1" in variables else 0)
        return said + (self.says(text) if "W=1" in variables else "")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    result = Make()
    monkeypatch.setattr(module, "make", result)
    return result


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> build.Setting:
    for name in ("SERIES", "MUTATIONS", "OURS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(series, name, tmp_path / name)
    (tmp_path / "SERIES/6.12").mkdir()
    (tmp_path / "SERIES/6.12/0001-two.patch").write_text(PATCH.format(before=1, after=2))
    (tmp_path / "SERIES/6.12/0002-three.patch").write_text(PATCH.format(before=2, after=3))
    (tmp_path / "OURS/ours.c").write_text("/* ours */\n")
    kernel = Kernel(tmp_path / "kernel", "6.12.117+deb12-amd64")
    shipped = kernel.tree / "lib/modules" / kernel.release / "kernel" / I915
    shipped.mkdir(parents=True)
    compiled(CODE, shipped / "kvmgt.ko")
    source = tmp_path / "source"
    (source / GVT).mkdir(parents=True)
    (source / GVT / "kvmgt.c").write_text(CODE)
    (source / GVT / "Makefile").write_text("kvmgt-y := gvt/kvmgt.o gvt/ours.o\n")
    (source / "scripts").mkdir()
    (source / "scripts/checkpatch.pl").write_text("exit 0;\n")
    (tmp_path / "cache/modules").mkdir(parents=True)
    return build.Setting(kernel, source, tmp_path / "cache", Path("/sparse"), log=said.append)


said: list[str] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    said.clear()


def built_modules(setting: build.Setting) -> list[str]:
    return sorted(path.name for path in setting.modules.rglob("*.ko"))


def test_the_series_is_built_when_the_unmodified_driver_is_the_stock_one(setting: build.Setting, make: Make) -> None:
    directory = build.build(setting, [None])
    assert built_modules(setting) == ["kvmgt.ko"]
    assert (directory / "kvmgt.ko").is_file()
    assert make.built[0] == (CODE, False)
    assert make.built[-1] == (CODE.replace("return 1", "return 3"), True)
    assert any("all equal" in line for line in said)


def test_the_module_that_is_given_out_is_not_the_one_with_extra_warnings(setting: build.Setting, make: Make) -> None:
    # W=1 changes the code that the compiler makes
    make.says = lambda _text: ""
    directory = build.build(setting, [None])
    compiled(CODE.replace("return 1", "return 3"), setting.cache / "expected.ko")
    assert (directory / "kvmgt.ko").read_bytes() == (setting.cache / "expected.ko").read_bytes()
    assert [strict for _text, strict in make.built] == [False, True, False, True]


@pytest.mark.usefixtures("make")
def test_where_one_byte_differs_nothing_is_built(setting: build.Setting) -> None:
    (setting.source / GVT / "kvmgt.c").write_text(CODE.replace("1", "9"))
    with pytest.raises(RunnerError, match=r"(?s)gate: kvmgt built from source is not .*\.text: .*built by gcc"):
        build.build(setting, [None])
    assert built_modules(setting) == []


@pytest.mark.usefixtures("make")
def test_the_gate_builds_under_the_name_that_the_stock_module_says(setting: build.Setting, make: Make) -> None:
    """As UBSAN has it; the series and what is checked are built from the source as it is."""
    [stock] = (setting.kernel.tree / "lib/modules").rglob("kvmgt.ko")
    setting.source.joinpath(GVT, "kvmgt.c").write_text(NAMED)
    (setting.kernel.tree / "usr/src/linux-headers-7-common").mkdir(parents=True)
    compiled(f'#line 1 "/build/linux/{GVT}/kvmgt.c"\n{NAMED}', stock)
    build.gate(setting)
    assert make.built == [(f'#line 1 "/build/linux/{GVT}/kvmgt.c"\n{NAMED}', False), (NAMED, True)]
    assert "-fmacro-prefix-map=/build/linux/=" in make.options
    assert f"-fmacro-prefix-map={setting.kernel.tree}/usr/src/linux-headers-7-common/=" in make.options


def test_a_kernel_without_the_driver_is_refused(setting: build.Setting) -> None:
    build.stock_module(setting.kernel).unlink()
    with pytest.raises(RunnerError, match="its packages were built without GVT-g"):
        build.build(setting, [None])


def test_the_gate_is_passed_once(setting: build.Setting, make: Make) -> None:
    build.gate(setting)
    build.gate(setting)
    assert len(make.built) == 2


def test_the_gate_is_shut_again_when_the_source_is_another(setting: build.Setting, make: Make) -> None:
    build.gate(setting)
    other = setting.source.rename(setting.source.with_name("newer"))
    build.gate(build.Setting(setting.kernel, other, setting.cache, setting.sparse, setting.log))
    assert len(make.built) == 4


@pytest.mark.usefixtures("make")
def test_a_source_that_was_changed_after_the_gate_was_passed_finds_it_shut(setting: build.Setting) -> None:
    build.build(setting, [None])
    path = setting.source / GVT / "kvmgt.c"
    path.write_text(path.read_text().replace("return 1", "return 5"))
    with pytest.raises(RunnerError, match="gate: kvmgt built from"):
        build.build(setting, [None])


def test_without_sparse_each_is_built_once(setting: build.Setting, make: Make) -> None:
    plain = build.Setting(setting.kernel, setting.source, setting.cache, None, setting.log)
    make.says = lambda text: "gvt/kvmgt.c:3:2: warning: odd\n" if "return 3" in text else ""
    build.build(plain, [None])
    assert [strict for _text, strict in make.built] == [False, False]
    with pytest.raises(RunnerError, match="warning: odd"):
        build.build(setting, [None])  # whose gate knows warnings


def test_the_stock_module_is_found_where_dkms_has_put_it(setting: build.Setting) -> None:
    stock = build.stock_module(setting.kernel)
    away = setting.kernel.tree / "var/lib/dkms/vfio-mig-kvmgt/original_module" / setting.kernel.release / "x86_64"
    away.mkdir(parents=True)
    (away / "kvmgt.ko.origin").write_text(f"{stock}\n")
    moved = stock.rename(away / "kvmgt.ko")
    assert build.stock_module(setting.kernel) == moved


def test_our_module_says_whose_it_is_and_the_unmodified_one_does_not(
    setting: build.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = list[str | None]()

    class Looking(Make):
        def __call__(self, kernel: Kernel, directory: Path, what: str, *variables: str) -> str:
            stamp = directory / "gvt/vfio_mig_stamp.c"
            stamps.append(stamp.read_text() if stamp.exists() else None)
            assert ("vfio_mig_stamp.o" in (directory / "Makefile").read_text()) is stamp.exists()
            return super().__call__(kernel, directory, what, *variables)

    monkeypatch.setattr(module, "make", Looking())
    source = setting.source.rename(setting.source.with_name("kvmgt-6.12.117-1~deb12u1-1"))
    build.build(build.Setting(setting.kernel, source, setting.cache, None, setting.log), [None])
    assert stamps[0] is None
    assert f'MODULE_VERSION("{build.our_version()}")' in str(stamps[1])
    assert 'MODULE_INFO(vfio_mig_source, "6.12.117-1~deb12u1")' in str(stamps[1])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('CONFIG_CC_VERSION_TEXT="x86_64-linux-gnu-gcc-99 (Debian 1) 1"\n', "x86_64-linux-gnu-gcc-99"),
        ('CONFIG_CC_VERSION_TEXT="gcc-that-is-not-here (Debian 1) 1"\n', "gcc"),
        ('CONFIG_CC_VERSION_TEXT="../x (Debian 1) 1"\n', "gcc"),
        ("", "gcc"),
    ],
)
def test_the_compiler_is_the_one_that_built_the_kernel_if_it_is_here(
    setting: build.Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, expected: str
) -> None:
    program = tmp_path / "bin/x86_64-linux-gnu-gcc-99"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    setting.kernel.headers.mkdir(parents=True)
    (setting.kernel.headers / ".config").write_text(config)
    assert build.compiler_of(setting.kernel) == expected


def test_a_warning_of_ours_is_an_error_and_leaves_no_module(setting: build.Setting, make: Make) -> None:
    make.says = lambda text: "gvt/kvmgt.c:3:2: warning: odd\n" if "return 3" in text else ""
    with pytest.raises(RunnerError, match=r"gave 1 warning\(s\):\ngvt/kvmgt.c:3:2: warning: odd"):
        build.build(setting, [None])
    assert built_modules(setting) == []


def test_a_warning_of_the_distribution_s_is_none_of_ours(setting: build.Setting, make: Make) -> None:
    make.says = lambda text: f"gvt/kvmgt.c:{3 if 'return 1' in text else 7}:2: warning: odd\n"
    build.build(setting, [None])
    assert built_modules(setting) == ["kvmgt.ko"]


def test_an_error_of_sparse_counts_though_it_does_not_end_the_build(setting: build.Setting, make: Make) -> None:
    make.says = lambda text: "gvt/kvmgt.c:3:2: error: bad type\n" if "return 3" in text else ""
    with pytest.raises(RunnerError, match="error: bad type"):
        build.build(setting, [None])


def test_a_build_that_sparse_did_not_look_at_is_an_error(setting: build.Setting, make: Make) -> None:
    make.checked = 0
    with pytest.raises(RunnerError, match="sparse looked at 0 of 1 files"):
        build.build(setting, [None])


def test_a_mutation_is_built_beside_the_series(setting: build.Setting, make: Make) -> None:
    (series.MUTATIONS / "wrong.patch").write_text(PATCH.format(before=3, after=4))
    build.build(setting, [None, "wrong"])
    assert built_modules(setting) == ["kvmgt-wrong.ko", "kvmgt.ko"]
    assert (CODE.replace("return 1", "return 4"), False) in make.built
    assert make.built[-1] == (CODE.replace("return 1", "return 3"), True)


def test_what_is_there_is_not_built_again(setting: build.Setting, make: Make) -> None:
    build.build(setting, [None])
    before = len(make.built)
    build.build(setting, [None])
    assert len(make.built) == before


@pytest.mark.parametrize("name", ["SERIES/6.12/0001-two.patch", "OURS/ours.c"])
def test_a_change_is_built_in_a_place_of_its_own(setting: build.Setting, make: Make, tmp_path: Path, name: str) -> None:
    first = build.build(setting, [None])
    path = tmp_path / name
    path.write_text(path.read_text() + "\n")
    assert build.build(setting, [None]) != first
    assert len(make.built) == 6


def test_a_file_of_ours_never_replaces_one_of_the_driver_s(setting: build.Setting, make: Make) -> None:
    (series.OURS / "kvmgt.c").write_text("")
    with pytest.raises(RunnerError, match=r"kvmgt of 6\.12\.117.* has a file of this name"):
        build.build(setting, [None])
    assert len(make.built) == 2


def test_check_builds_after_every_patch(setting: build.Setting, make: Make) -> None:
    build.check(setting)
    assert make.built[2:] == [(CODE.replace("return 1", f"return {number}"), True) for number in (2, 3)]
    assert [line for line in said if "builds: " in line] == [
        "1/2 builds: drm/i915/gvt: Return 2",
        "2/2 builds: drm/i915/gvt: Return 3",
    ]


@pytest.mark.usefixtures("make")
def test_check_names_what_checkpatch_says(setting: build.Setting) -> None:
    (setting.source / "scripts/checkpatch.pl").write_text('print "x.c:3: WARNING: bad\\n"; exit 1;\n')
    with pytest.raises(RunnerError, match=r"(?s)--strict has 1 remark\(s\):.*x\.c:3: WARNING: bad"):
        build.check(setting)


@pytest.mark.usefixtures("make")
def test_a_checkpatch_that_fails_without_a_word_is_an_error(setting: build.Setting) -> None:
    (setting.source / "scripts/checkpatch.pl").write_text("exit 1;\n")
    with pytest.raises(RunnerError, match="failed with status 1"):
        build.check(setting)


def test_another_kernel_has_another_series(setting: build.Setting, make: Make) -> None:
    with pytest.raises(RunnerError, match=r"no series of patches is for kernel 6\.1; there are some for 6\.12"):
        build.build(
            build.Setting(
                Kernel(setting.kernel.tree, "6.1.0-56-amd64"),
                setting.source, setting.cache, setting.sparse, setting.log,
            ),
            [None],
        )  # fmt: skip
    assert make.built == []
