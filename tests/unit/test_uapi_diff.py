# SPDX-License-Identifier: MIT
"""The tool that compares two headers."""

from pathlib import Path

import pytest

from tools.uapi_diff import main

MAINLINE = "#define VFIO_A 1\n#define VFIO_B (1 << 3)\n#define OTHER 1\n"
RFC = """
#define VFIO_B 9
#define VFIO_DEVICE_FLAGS_MIGRATABLE (1 << 5)
#define VFIO_DEVICE_PCI_STATUS_SET _IO(VFIO_TYPE, VFIO_BASE + 14)
#define VFIO_DEVICE_PCI_GET_DIRTY_BITMAP _IO(VFIO_TYPE, VFIO_BASE + 15)
#define VFIO_DEVICE_PCI_STOP 1
#define VFIO_DEVICE_PCI_START 2
enum { VFIO_PCI_DEVICE_STATE_REGION_INDEX = 9, VFIO_PCI_NUM_REGIONS };
#define OTHER 2
"""


@pytest.fixture
def headers(tmp_path: Path) -> tuple[str, str]:
    old, new = tmp_path / "old.h", tmp_path / "new.h"
    old.write_text(MAINLINE)
    new.write_text(RFC)
    return str(old), str(new)


def test_each_difference_is_one_line(headers: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(headers) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:2] == ["- VFIO_A 0x1", "! VFIO_B 0x8 0x9"]
    assert "+ VFIO_DEVICE_PCI_STATUS_SET 0x3b72" in lines
    assert not any("OTHER" in line for line in lines)
    assert "old.h: not for --uapi-header: does not define VFIO_DEVICE_FLAGS_MIGRATABLE" in err
    assert "new.h: has all that --uapi-header needs" in err


def test_all_shows_every_name(headers: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*headers, "--all"]) == 1
    assert "! OTHER 0x1 0x2" in capsys.readouterr().out


def test_equal_headers_give_no_line_and_success(headers: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([headers[0], headers[0]]) == 0
    assert capsys.readouterr().out == ""


def test_a_header_that_cannot_be_read_is_one_line(headers: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([headers[0], "/no/such.h"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "uapi_diff: /no/such.h: cannot open the header: ENOENT (No such file or directory)\n"
