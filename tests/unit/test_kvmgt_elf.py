# SPDX-License-Identifier: MIT
import lzma
import subprocess
from pathlib import Path

import pytest

from tools.kvmgt import elf
from tools.kvmgt.elf import Module
from tools.vm.errors import RunnerError

SOURCE = """\
int other(int);
static const char text[] __attribute__((used)) = "text";
int room[4];
__attribute__((section(".modinfo"))) const char info[] = "license=MIT\\0intree=Y\\0name=x";
int code(int a) { return other(a) + CONSTANT; }
"""


def compiled(directory: Path, name: str = "a", source: str = SOURCE, constant: int = 1) -> Path:
    (directory / f"{name}.c").write_text(source)
    command = ["gcc", "-O2", "-fno-pie", "-c", f"-DCONSTANT={constant}", f"{name}.c", "-o", f"{name}.ko"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / f"{name}.ko"


def different(directory: Path, source: str, constant: int = 1) -> list[str]:
    return elf.differences(elf.read(compiled(directory)), elf.read(compiled(directory, "b", source, constant)))


def test_the_same_code_has_no_differences(tmp_path: Path) -> None:
    assert different(tmp_path, SOURCE) == []


def test_that_a_module_is_out_of_tree_is_no_difference(tmp_path: Path) -> None:
    assert different(tmp_path, SOURCE.replace(r"intree=Y\0", "")) == []


def test_another_licence_is_one(tmp_path: Path) -> None:
    [line] = different(tmp_path, SOURCE.replace("license=MIT", "license=GPL"))
    assert line.startswith(".modinfo: ")


def test_one_byte_of_code_is_named(tmp_path: Path) -> None:
    [line] = different(tmp_path, SOURCE, constant=2)
    assert line.startswith(".text: ")
    assert "not the same from 0x" in line


def test_a_call_of_another_function_is_named(tmp_path: Path) -> None:
    [line] = different(tmp_path, SOURCE.replace("other", "elsewhere"))
    assert line.startswith(".text: a relocation is 0x")
    assert "other" in line
    assert "elsewhere" in line


TYPES = '__attribute__((section(".BTF_ids"), used)) const unsigned types[] = {%s};\n'
TABLE = '__attribute__((section("__patchable_function_entries"), used)) void *table[] = {%s};\n'


def of_source(directory: Path, name: str, more: str) -> Module:
    return elf.read(compiled(directory, name, SOURCE + more))


def test_numbers_of_types_may_be_missing_and_not_wrong(tmp_path: Path) -> None:
    stock = of_source(tmp_path, "a", TYPES % "1, 2")
    assert elf.differences(stock, of_source(tmp_path, "b", TYPES % "0, 0")) == []
    assert elf.differences(stock, of_source(tmp_path, "c", TYPES % "1, 3")) == [
        ".BTF_ids: 8 bytes in both, not the same from 0x4 on"
    ]
    assert elf.differences(stock, of_source(tmp_path, "d", TYPES % "0, 0, 0")) == [
        ".BTF_ids: 8 bytes in the stock module, 12 in the one that was built"
    ]


def test_where_functions_begin_is_the_same_in_any_order(tmp_path: Path) -> None:
    stock = of_source(tmp_path, "a", TABLE % "code, other")
    assert elf.differences(stock, of_source(tmp_path, "b", TABLE % "other, code")) == []
    [line] = elf.differences(stock, of_source(tmp_path, "c", TABLE % "code, code"))
    assert line.startswith("__patchable_function_entries: a relocation is ")


def test_a_module_may_say_below_what_it_was_compiled() -> None:
    text = b"\0drivers/x/a.c\0/build/linux 7/drivers/x/a.c\0"
    assert elf.built_below(Module({".rodata": text}, {}), "drivers/x/a.c") == "/build/linux 7/"
    assert elf.built_below(Module({".rodata": text}, {}), "drivers/x/b.c") is None
    assert elf.built_below(Module({}, {}), "drivers/x/a.c") is None


def test_data_without_contents_count_by_their_size(tmp_path: Path) -> None:
    [line] = different(tmp_path, SOURCE.replace("room[4]", "room[5]"))
    assert line == ".bss: 16 bytes in the stock module, 20 in the one that was built"


def test_a_section_that_only_one_has_is_named() -> None:
    assert elf.differences(Module({".text": b""}, {}), Module({".text": b"", ".new": b""}, {})) == [
        ".new: only in the module that was built"
    ]
    assert elf.differences(Module({".old": 8}, {}), Module({}, {})) == [".old: only in the stock module"]


def test_more_relocations_are_counted() -> None:
    one = (0, 2, "f", 0, -4)
    assert elf.differences(Module({}, {".text": [one]}), Module({}, {".text": [one, one]})) == [
        ".text: 1 relocations in the stock module, 2 in the one that was built"
    ]


def test_the_build_id_is_no_difference() -> None:
    assert elf.differences(Module({".note.gnu.build-id": b"a"}, {}), Module({".note.gnu.build-id": b"b"}, {})) == []


def test_a_compressed_module_is_read(tmp_path: Path) -> None:
    plain = compiled(tmp_path)
    (tmp_path / "a.ko.xz").write_bytes(lzma.compress(plain.read_bytes()))
    assert elf.read(tmp_path / "a.ko.xz") == elf.read(plain)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"no module" * 100])
def test_what_is_no_module_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.ko").write_bytes(content)
    with pytest.raises(RunnerError, match=r"x\.ko is not a kernel module"):
        elf.read(tmp_path / "x.ko")


def test_a_module_cut_off_is_refused(tmp_path: Path) -> None:
    whole = compiled(tmp_path).read_bytes()
    for length in range(64, len(whole), 37):
        (tmp_path / "x.ko").write_bytes(whole[:length])
        with pytest.raises(RunnerError, match=r"x\.ko is not a kernel module"):
            elf.read(tmp_path / "x.ko")


def test_a_broken_compression_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ko.xz").write_bytes(b"no xz")
    with pytest.raises(RunnerError, match="cannot be unpacked"):
        elf.read(tmp_path / "x.ko.xz")
