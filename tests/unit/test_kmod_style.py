# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools import kmod_style
from tools.kvmgt.build import Setting
from tools.kvmgt.source import CHECKPATCH
from tools.vm.cache import cache_root
from tools.vm.errors import RunnerError
from tools.vm.kernels import SERIES, Kernel

FETCHED = sorted((cache_root(os.environ) / "sources").glob(f"kvmgt-{SERIES[0]}.*/{CHECKPATCH}"))
"""The program of the source package that was fetched for kvmgt; that of a newer kernel wants what older ones lack."""


def setting_of(source: Path) -> Setting:
    return Setting(Kernel(source, "6.12"), source, source, sparse=Path("sparse"), log=lambda _message: None)


@pytest.mark.skipif(not FETCHED, reason="no checkpatch.pl is in the cache; `python -m tools.kmod_style` fetches one")
def test_checkpatch_has_nothing_to_say_of_the_sample_driver() -> None:
    kmod_style.check(setting_of(FETCHED[-1].parents[1]))


def test_every_file_of_the_sample_driver_is_shown_and_a_remark_is_an_error(tmp_path: Path) -> None:
    program = tmp_path / CHECKPATCH
    program.parent.mkdir()
    program.write_text('print map { "$_:3: WARNING: bad\\n" } grep { /\\.[ch]$/ } @ARGV; exit 1;\n')
    with pytest.raises(RunnerError) as caught:
        kmod_style.check(setting_of(tmp_path))
    shown = {line.partition(":")[0] for line in str(caught.value).splitlines()}
    assert {str(path) for path in kmod_style.KMOD.rglob("*.[ch]") if ".mod." not in path.name} <= shown
    assert len(kmod_style.files()) > 25
