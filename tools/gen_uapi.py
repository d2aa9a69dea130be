# SPDX-License-Identifier: MIT
"""Make ``vfio_mig/uapi/_generated.py`` and its stub from the headers in ``cdefs/``, and the bindings of two libraries.

Those are ``vfio_mig/dirty/_gmp.py`` and ``_libcrypto.py``; their few functions are declared here.

Usage: python -m tools.gen_uapi [OUTPUT_DIRECTORY]

cffi's out-of-line ABI mode: at run time neither compiler nor parser is needed. The output depends on the headers
alone; a unit test compares it with what is committed.
"""

import re
import sys
from pathlib import Path
from typing import Final

from cffi import FFI

ROOT: Final = Path(__file__).parent.parent
CDEFS: Final = ROOT / "cdefs"
HEADERS: Final = ("vfio_mainline.h", "iommufd.h", "kvm.h", "gvt_rfc.h", "gvt_image.h", "gvt_pvinfo.h")
MODULE: Final = "vfio_mig.uapi._generated"
# GMP's mpn_popcount as its library has it: <gmp.h>, where mp_limb_t, mp_size_t and mp_bitcnt_t are longs. And what
# OpenSSL 3's man page EVP_MAC(3ssl) declares
LIBRARIES: Final = {
    "vfio_mig.dirty._gmp": "unsigned long __gmpn_popcount(const unsigned long *, long);",
    "vfio_mig.dirty._libcrypto": """
        typedef struct evp_mac_st EVP_MAC;
        typedef struct evp_mac_ctx_st EVP_MAC_CTX;
        EVP_MAC *EVP_MAC_fetch(void *libctx, const char *algorithm, const char *properties);
        EVP_MAC_CTX *EVP_MAC_CTX_new(EVP_MAC *mac);
        void EVP_MAC_CTX_free(EVP_MAC_CTX *ctx);
        int EVP_MAC_init(EVP_MAC_CTX *ctx, const unsigned char *key, size_t keylen, const void *params);
        int EVP_MAC_update(EVP_MAC_CTX *ctx, const unsigned char *data, size_t datalen);
        int EVP_MAC_final(EVP_MAC_CTX *ctx, unsigned char *out, size_t *outl, size_t outsize);
    """,
}

TYPES: Final = """
typedef uint8_t __u8;
typedef uint16_t __u16;
typedef uint32_t __u32;
typedef uint64_t __u64;
typedef int32_t __s32;
"""
# What only a C compiler needs; every other directive must be one that cffi reads, or fail there
COMPILER_LINE: Final = re.compile(r"#include <linux/types\.h>|#ifndef VFIO_MIG_\w+_H|#define VFIO_MIG_\w+_H|#endif")
DEFINE: Final = re.compile(r"#define (\w+) (?:0x[0-9a-fA-F]+|\d+)$", re.MULTILINE)
STRUCT: Final = re.compile(r"^struct (\w+) \{$(.*?)^\};$", re.MULTILINE | re.DOTALL)
FIELD: Final = re.compile(r"^\t(struct \w+|\w+) (\w+)(\[\w*\])?;", re.MULTILINE)


def without_compiler_lines(text: str) -> str:
    """Drop guards and includes; nothing else."""
    return "\n".join(line for line in text.splitlines() if not COMPILER_LINE.fullmatch(line.strip())) + "\n"


def declarations(cdefs: Path = CDEFS) -> str:
    """Return all headers as one text for cffi."""
    return "".join(without_compiler_lines((cdefs / name).read_text(encoding="ascii")) for name in HEADERS)


def write_module(text: str, directory: Path) -> None:
    """Let cffi write the module."""
    _emit(MODULE, TYPES + text, directory)


def write_libraries(directory: Path) -> None:
    """Let cffi write the bindings of GMP and libcrypto."""
    for module, text in LIBRARIES.items():
        _emit(module, text, directory)


def _emit(module: str, text: str, directory: Path) -> None:
    ffi = FFI()
    ffi.cdef(text)
    ffi.set_source(module, None)
    ffi.emit_python_code(str(directory / (module.rpartition(".")[2] + ".py")))


def _field_type(kind: str, array: str | None) -> str:
    if kind.startswith("struct "):
        name = kind.removeprefix("struct ")
        return f"Array[{name}]" if array else name
    return "Array[int]" if array else "int"


def _stub_struct(name: str, body: str) -> str:
    fields = [f"    {field}: {_field_type(kind, array)}" for kind, field, array in FIELD.findall(body)]
    return f"class {name}(CData):\n" + "\n".join(fields) + "\n"


STUB_HEAD: Final = """# SPDX-License-Identifier: MIT
# Made by tools/gen_uapi.py from cdefs/*.h; do not edit.
from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar, overload

T = TypeVar("T")

class CData: ...

class Array(CData, Generic[T]):
    def __getitem__(self, index: int) -> T: ...
    def __setitem__(self, index: int, value: T) -> None: ...
    def __len__(self) -> int: ...

"""


def _lines(items: list[str]) -> str:
    """One per line, so that a review sees what has changed."""
    return "\n        " + ",\n        ".join(items) + ",\n    "


def write_stub(text: str, directory: Path) -> None:
    """Write the types that mypy sees: a class per struct, an overload of new() for each."""
    structs = STRUCT.findall(text)
    constants = DEFINE.findall(text)
    new = [
        f'    @overload\n    def new(\n        self, cdecl: Literal["struct {name} *"], '
        f"init: Mapping[str, Any] = ..., /\n    ) -> {name}: ..."
        for name, _ in structs
    ]
    names = [f'"struct {name}"' for name, _ in structs]
    quoted = [f'"{name}"' for name in constants]
    ffi = [
        "class _FFI:",
        *new,
        '    @overload\n    def new(self, cdecl: Literal["int *"], init: int = ..., /) -> Array[int]: ...',
        f"    def sizeof(self, cdecl: CData | Literal[{_lines(names)}], /) -> int: ...",
        f"    def offsetof(self, cdecl: Literal[{_lines(names)}], field: str, /) -> int: ...",
        f"    def integer_const(self, name: Literal[{_lines(quoted)}], /) -> int: ...",
        "    def buffer(self, cdata: CData, size: int = ..., /) -> bytearray: ...",
        "\nffi: _FFI",
    ]
    body = "\n".join(_stub_struct(name, fields) for name, fields in structs)
    (directory / "_generated.pyi").write_text(STUB_HEAD + body + "\n" + "\n".join(ffi) + "\n", encoding="ascii")


def main() -> None:
    """Write all files."""
    package = ROOT / "vfio_mig"
    uapi, dirty = (Path(sys.argv[1]),) * 2 if len(sys.argv) > 1 else (package / "uapi", package / "dirty")
    text = declarations()
    write_module(text, uapi)
    write_stub(text, uapi)
    write_libraries(dirty)


if __name__ == "__main__":
    main()
