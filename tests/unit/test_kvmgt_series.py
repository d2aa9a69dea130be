# SPDX-License-Identifier: MIT
from pathlib import Path

import pytest

from tools.kvmgt import series
from tools.kvmgt.source import GVT
from tools.vm.errors import RunnerError

ROOT = Path(__file__).parents[2]
GOOD = """\
Subject: drm/i915/gvt: Do a thing

Because of this.

---
diff --git a/drivers/gpu/drm/i915/gvt/gtt.c b/drivers/gpu/drm/i915/gvt/gtt.c
--- a/drivers/gpu/drm/i915/gvt/gtt.c
+++ b/drivers/gpu/drm/i915/gvt/gtt.c
@@ -1,2 +1,3 @@
 one
+two
 three
"""
NAMES = sorted(path.name for path in series.SERIES.iterdir())
TITLES = [
    "Retrieve the guest gm base address from PVINFO",
    "Apply g2h adjust for GTT mmio access",
    "Apply g2h adjustment during fence mmio access",
    "Patch the gma in gpu commands during command parser",
    "Align the guest gm aperture start offset for live migration",
    "Introduce new VFIO ioctl for mdev device dirty page sync",
    "Introduce new VFIO ioctl for device status control",
    "Add support to VFIO region VFIO_PCI_DEVICE_STATE_REGION_INDEX",
    "Add new flag VFIO_DEVICE_FLAGS_MIGRATABLE",
]


def write(directory: Path, name: str, text: str = GOOD) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)
    return directory / name


def tree(directory: Path, text: str = "one\nthree\n") -> Path:
    (directory / GVT).mkdir(parents=True)
    (directory / GVT / "gtt.c").write_text(text)
    return directory


def test_a_patch_is_read_with_its_title_and_what_it_changes(tmp_path: Path) -> None:
    patch = series.read(write(tmp_path, "0001-x.patch"))
    assert patch.title == "drm/i915/gvt: Do a thing"
    assert patch.targets == ("drivers/gpu/drm/i915/gvt/gtt.c",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Subject: drm/i915/gvt: ", "Subject: ", "first line must be"),
        ("+++ b/drivers/gpu/drm/i915/gvt/gtt.c", "", "changes nothing"),
        ("+++ b/drivers/gpu/drm/i915/gvt/gtt.c", "+++ b/drivers/gpu/drm/i915/i915_drv.h", "is not below"),
        ("+++ b/drivers/gpu/drm/i915/gvt/gtt.c", "+++ b/drivers/gpu/drm/i915/gvt/../i915_drv.h", "is not below"),
    ],
    ids=["untitled", "empty", "of i915", "with dots"],
)
def test_what_is_no_patch_of_kvmgt_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        series.read(write(tmp_path, "0001-x.patch", GOOD.replace(old, new)))


def test_a_series_comes_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for name in ("0002-b.patch", "0001-a.patch"):
        write(tmp_path / "6.12", name)
    assert [patch.path.name for patch in series.load("6.12", tmp_path)] == ["0001-a.patch", "0002-b.patch"]


@pytest.mark.parametrize("names", [["0002-a.patch"], ["0001-a.patch", "0003-b.patch"], ["1-a.patch"], []])
def test_a_series_with_a_gap_is_refused(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "6.12").mkdir()
    for name in names:
        write(tmp_path / "6.12", name)
    with pytest.raises(RunnerError, match=r"is to be called|has no patches"):
        series.load("6.12", tmp_path)


def test_a_kernel_without_a_series_is_told_which_there_are(tmp_path: Path) -> None:
    write(tmp_path / "6.12", "0001-a.patch")
    with pytest.raises(RunnerError, match=r"for kernel 5\.10; there are some for 6\.12"):
        series.load("5.10", tmp_path)


def test_a_patch_is_applied(tmp_path: Path) -> None:
    patch = series.read(write(tmp_path, "0001-x.patch"))
    assert patch.apply(tree(tmp_path / "tree")) == ""
    assert (tmp_path / "tree" / GVT / "gtt.c").read_text() == "one\ntwo\nthree\n"


def test_a_hunk_elsewhere_is_reported(tmp_path: Path) -> None:
    patch = series.read(write(tmp_path, "0001-x.patch"))
    assert "offset 1 line" in patch.apply(tree(tmp_path / "tree", "new\none\nthree\n"))


def test_a_hunk_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    patch = series.read(write(tmp_path, "0001-x.patch"))
    with pytest.raises(RunnerError, match=r"0001-x\.patch cannot be applied:\n(?s:.*)FAILED"):
        patch.apply(tree(tmp_path / "tree", "one\nfour\n"))


def test_a_hunk_that_would_fit_in_two_other_places_is_refused(tmp_path: Path) -> None:
    patch = series.read(write(tmp_path, "0001-x.patch"))
    twice = "new\none\nthree\nother\none\nthree\n"
    with pytest.raises(RunnerError, match=r"another version of .*gtt\.c: what it has at line 1 is now at 2, 5"):
        patch.apply(tree(tmp_path / "tree", twice))
    assert (tmp_path / "tree" / GVT / "gtt.c").read_text() == twice


def test_a_hunk_where_the_patch_has_it_may_fit_elsewhere_too(tmp_path: Path) -> None:
    patch = series.read(write(tmp_path, "0001-x.patch"))
    assert patch.apply(tree(tmp_path / "tree", "one\nthree\none\nthree\n")) == ""
    assert (tmp_path / "tree" / GVT / "gtt.c").read_text() == "one\ntwo\nthree\none\nthree\n"


def test_a_patch_can_be_undone(tmp_path: Path) -> None:
    patch = series.read(write(tmp_path, "0001-x.patch"))
    there = tree(tmp_path / "tree")
    patch.apply(there)
    patch.apply(there, reverse=True)
    assert (there / GVT / "gtt.c").read_text() == "one\nthree\n"


def test_a_mutation_is_found_by_its_name(tmp_path: Path) -> None:
    write(tmp_path, "g2h_gtt.patch")
    assert series.mutation_names(tmp_path) == ["g2h_gtt"]
    assert series.mutation("g2h_gtt", tmp_path).title == "drm/i915/gvt: Do a thing"
    with pytest.raises(RunnerError, match="no mutation is called other; there are g2h_gtt"):
        series.mutation("other", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_our_series_has_the_seed_s_patches_in_an_order_that_works(name: str) -> None:
    titles = [patch.title.removeprefix("drm/i915/gvt: ") for patch in series.load(name)]
    assert [title for title in titles if title in TITLES] == TITLES


@pytest.mark.parametrize("name", NAMES)
def test_our_patches_have_no_more_of_the_kernel_s_source_than_is_needed(name: str) -> None:
    for patch in series.load(name):
        context = 0
        for line in patch.path.read_text("utf-8").partition("\n---\n")[2].splitlines():
            context = context + 1 if line.startswith(" ") else 0
            # one line before a change, one behind it, both of them between two changes
            assert context <= 2, f"{patch.path}: {line}"


def test_our_files_have_the_driver_s_own_licence() -> None:
    for path in series.OURS.glob("*.[ch]"):
        assert path.read_text("utf-8").splitlines()[0].strip("/* ") == "SPDX-License-Identifier: MIT"
