# SPDX-License-Identifier: MIT
"""The series in its form for the kernel's lists, of made-up patches and of the real ones' texts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.kvmgt import mail, series
from tools.kvmgt.source import GVT
from tools.vm.errors import RunnerError

REAL = Path(series.SERIES)
MAKEFILE = """\
Subject: drm/i915/gvt: Have a file of ours built

It does something.

---
diff --git a/{gvt}/Makefile b/{gvt}/Makefile
--- a/{gvt}/Makefile
+++ b/{gvt}/Makefile
@@ -1,1 +1,2 @@
 kvmgt-y := gvt/kvmgt.o
+kvmgt-y += gvt/ours.o
"""
CODE = """\
Subject: drm/i915/gvt: Change what is there

---
diff --git a/{gvt}/kvmgt.c b/{gvt}/kvmgt.c
--- a/{gvt}/kvmgt.c
+++ b/{gvt}/kvmgt.c
@@ -1,1 +1,1 @@
-int one;
+int two;
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SERIES", "OURS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(series, name, tmp_path / name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    there = tmp_path / "SERIES/6.12"
    there.mkdir()
    (there / "0001-change.patch").write_text(CODE.format(gvt=GVT))
    (there / "0002-built.patch").write_text(MAKEFILE.format(gvt=GVT))
    (there / "compat.h").write_text("/* compat */\n")
    (tmp_path / "OURS/ours.c").write_text('#include "ours.h"\n')
    (tmp_path / "OURS/ours.h").write_text('#include "compat.h"\n#include "gvt_rfc.h"\n#include "gvt.h"\n')
    made = tmp_path / "source" / GVT
    made.mkdir(parents=True)
    (made / "Makefile").write_text("kvmgt-y := gvt/kvmgt.o\n")
    (made / "kvmgt.c").write_text("int one;\n")
    return tmp_path / "source"


def test_each_file_of_ours_comes_with_the_patch_that_has_it_built(source: Path, tmp_path: Path) -> None:
    cover, first, second = mail.write(source, "6.12", tmp_path / "mails", "Linux 6.12.117 (6.12.117-1)")
    assert [path.name[:5] for path in (cover, first, second)] == ["0000-", "0001-", "0002-"]
    assert "Subject: [RFC PATCH 1/2] drm/i915/gvt: Change what is there\n" in first.read_text()
    added = re.findall(r"^ create mode 100644 (\S+)$", second.read_text(), re.MULTILINE)
    assert added == [f"{GVT}/{name}" for name in ("compat.h", "gvt_rfc.h", "ours.c", "ours.h")]
    assert " create mode" not in first.read_text()
    assert "It does something." in second.read_text()
    assert not any("Signed-off-by" in path.read_text() for path in (cover, first, second))


def test_the_letter_says_for_which_kernel_it_is_and_has_no_hole(source: Path, tmp_path: Path) -> None:
    cover = mail.write(source, "6.12", tmp_path / "mails", "Linux 6.12.117 (6.12.117-1)")[0].read_text()
    assert "Subject: [RFC PATCH 0/2] drm/i915/gvt: live migration of vGPUs\n" in cover
    assert "\nLinux 6.12.117 (6.12.117-1).\n" in cover
    assert "***" not in cover
    assert "@" not in cover.partition("\n\n")[2]
    assert "never" in cover
    assert max(map(len, mail.COVER.read_text().splitlines())) <= 80


def test_git_takes_what_was_written(source: Path, tmp_path: Path) -> None:
    mails = mail.write(source, "6.12", tmp_path / "mails", "Linux 6.12")[1:]
    tree = tmp_path / "tree"
    shutil.copytree(source, tree)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "base"], ["am", "-q", *map(str, mails)]):
        subprocess.run(["git", "-C", tree, "-c", "user.name=x", "-c", "user.email=x@x.invalid", *command], check=True)
    assert (tree / GVT / "kvmgt.c").read_text() == "int two;\n"
    assert (tree / GVT / "ours.c").is_file()


def test_a_file_that_no_patch_has_built_is_an_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "OURS/idle.c").write_text("")
    with pytest.raises(RunnerError, match=r"no patch of series 6\.12 has idle\.c built"):
        mail.write(source, "6.12", tmp_path / "mails", "Linux 6.12")


def test_a_directory_with_other_patches_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "0001-mine.patch").write_text("mine")
    with pytest.raises(RunnerError, match="has patches already"):
        mail.write(source, "6.12", tmp_path, "Linux 6.12")


@pytest.mark.parametrize("name", sorted(path.name for path in REAL.iterdir() if path.is_dir()))
def test_every_patch_has_a_text_that_fits_a_mail(name: str) -> None:
    for patch in series.load(name, REAL):
        head, found, _ = patch.path.read_text("utf-8").partition("\n---\n")
        assert found, patch.path
        _title, text = head.split("\n\n", 1)
        assert text.strip(), patch.path
        assert max(map(len, text.splitlines())) <= 75, patch.path
