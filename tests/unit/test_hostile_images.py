# SPDX-License-Identifier: MIT
"""Images that anybody may have made: every command says what is in them, or refuses them, and never breaks."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.saved_images import HEADER, Memory, js, run, text, write
from tools.fuzz import corpus
from vfio_mig.errors import ImageError, VfioMigError

PAGE = 4096
ROOT = Path(__file__).parents[2]


def commands(path: Path, other: Path, memory: Path, into: Path) -> list[list[str | Path]]:
    return [
        ["inspect", path],
        ["--json", "inspect", path],
        ["inspect", path, "--section", "image.header"],
        ["inspect", path, "--section", "image.statistics"],
        ["inspect", path, "--section", "state", "--hex"],
        ["verify", path],
        ["--json", "verify", path],
        ["diff", path, other],
        ["diff", other, path],
        ["--json", "diff", path, other],
        ["extract", path, into],
        ["pack", into, into.with_suffix(".vfm")],
        ["pages", path, "--memory", f"{memory}@0"],
        ["check", path, "no-such-device"],
        ["restore", "no-such-device", path],
    ]


@pytest.mark.parametrize("number", range(len(corpus.odd_headers())))
def test_an_odd_header_breaks_no_command(number: int, tmp_path: Path) -> None:
    path = write(tmp_path / "image", b"state", header=json.loads(corpus.odd_headers()[number]))
    other, memory = write(tmp_path / "other", b"stats"), tmp_path / "memory"
    memory.write_bytes(bytes(PAGE))
    for words in commands(path, other, memory, tmp_path / "parts"):
        result = run(*words)
        assert result.exception is None or isinstance(result.exception, VfioMigError), words
        if words[0] not in {"check", "restore"}:
            assert result.exit_code == 0, words


def test_many_statistics_are_cut_and_stay_an_object(tmp_path: Path) -> None:
    header = {**HEADER, "many": {str(number): number for number in range(1500)}, "list": list(range(1500))}
    report = js("inspect", write(tmp_path / "image", b"state", header=header))
    assert (len(report["header"]["many"]), report["header"]["many"]["…"]) == (1001, "500 more")
    assert (len(report["header"]["list"]), report["header"]["list"][-1]) == (1001, "… 500 more")


def test_what_looks_like_a_list_of_ours_is_shown_as_it_is(tmp_path: Path) -> None:
    header = {**HEADER, "x": {"count": "z", "listed": [{"a": 1}]}, "y": {"count": 1, "listed": 7}}
    shown = text("inspect", write(tmp_path / "image", b"state", header=header), "--section", "image.header")
    assert "    count z" in shown.splitlines()
    assert "  y: count 1  listed 7" in shown.splitlines()


def test_ranges_that_overlap_are_refused_by_every_command(tmp_path: Path) -> None:
    path, memory = tmp_path / "image", tmp_path / "memory"
    members = [*corpus.GOOD_MEMBERS[:1], ("zero/0000", struct.pack("<5Q", 2, 0, 2 * PAGE, PAGE, 2 * PAGE))]
    path.write_bytes(corpus.tar_of(members, corpus.signed(corpus.manifest_of(corpus.entries_for(members)))))
    memory.write_bytes(b"\1" * (4 * PAGE))
    for words in commands(path, path, memory, tmp_path / "parts"):
        result = run(*words)
        if words[0] in {"check", "restore", "pack"}:  # without a device; nothing was extracted
            continue
        assert isinstance(result.exception, ImageError), words
        assert "zero/0000: ranges overlap at 0x1000" in str(result.exception)
    assert memory.read_bytes() == b"\1" * (4 * PAGE)


EMPTY: list[list[Any]] = [
    ["inspect", "{file}"],
    ["inspect", "{file}", "--section", "state", "--hex"],
    ["verify", "{file}"],
    ["verify", "{file}", "--raw"],
    ["extract", "{file}", "{new}"],
    ["diff", "{file}", "{good}"],
    ["diff", "{good}", "{file}"],
    ["check", "{file}", "00000000-0000-0000-0000-000000000000"],
    ["check", "{file}", "00000000-0000-0000-0000-000000000000", "--raw"],
    ["pages", "{file}", "--memory", "{memory}@0"],
    ["pack", "{file}", "{new}"],
]


@pytest.mark.parametrize("words", EMPTY, ids=" ".join)
def test_an_empty_file_is_no_image_for_any_command(words: list[str], tmp_path: Path) -> None:
    file, good, memory = tmp_path / "empty", write(tmp_path / "good", b"state"), tmp_path / "memory"
    file.write_bytes(b"")
    memory.write_bytes(bytes(PAGE))
    result = run(*(word.format(file=file, good=good, memory=memory, new=tmp_path / "new") for word in words))
    assert isinstance(result.exception, ImageError), words
    assert result.exception.exit_code == 6
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"# Read me first\n" * 40, "not a vfio-mig image: its member header at 0x0 is damaged or of another program"),
        (b"# Read me\n", "not a vfio-mig image: cut off at byte 10; a bare state needs --raw"),
        (b"QEVM\0\0\0\3" + bytes(600), "not a vfio-mig image: it is a QEMU migration stream; 'vfio-mig inspect' looks"),
        (
            b"LibvirtQemudSave" + bytes(600),
            "not a vfio-mig image: it is a VM saved by libvirt; 'vfio-mig inspect'",
        ),
        (b"\x1f\x8b\x08\0", "not a vfio-mig image: it is compressed with gzip; unpack it first: gzip -dc FILE > OTHER"),
        (b"\x28\xb5\x2f\xfd", "not a vfio-mig image: it is compressed with zstd; unpack it first: zstd -dc"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "pages", "check"])
def test_what_is_no_image_is_told_what_it_is(command: str, content: bytes, what: str, tmp_path: Path) -> None:
    path, memory = tmp_path / "file", tmp_path / "memory"
    path.write_bytes(content)
    memory.write_bytes(bytes(PAGE))
    more: dict[str, list[str]] = {
        "pages": ["--memory", f"{memory}@0"],
        "check": ["00000000-0000-0000-0000-000000000000"],
    }
    result = run(command, path, *more.get(command, []))
    assert isinstance(result.exception, ImageError)
    assert what in str(result.exception)


def test_an_image_of_many_zero_pages_asks_for_no_more_work_than_memory_is_large(tmp_path: Path) -> None:
    """A range of 2^63 bytes is one range."""
    memory: Memory = [(0, 1 << 63)]
    header = {**HEADER, "protocol": "other"}
    path = write(tmp_path / "image", b"state", memory, header=header)
    assert js("verify", path)["pages"] == (1 << 63) // PAGE
    assert js("diff", path, write(tmp_path / "other", b"state", header=header))["counts"] == {
        "pages": (1 << 63) // PAGE
    }


def test_a_pipe_that_brings_an_image_in_small_pieces_is_one(tmp_path: Path) -> None:
    """Its first read may have fewer bytes than tell an image from something else."""
    path = write(tmp_path / "image", b"state", header={**HEADER, "protocol": "other"})
    script = f"(head -c 3; sleep 0.3; cat) <{path} | {sys.executable} -m vfio_mig"
    for words, code in (("verify -", 0), ("inspect -", 0), ("check - 00000000-0000-0000-0000-000000000000", 3)):
        done = subprocess.run(["sh", "-c", f"{script} {words}"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, "not a vfio-mig image" in done.stderr) == (code, False), done.stderr
