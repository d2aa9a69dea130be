# SPDX-License-Identifier: MIT
from typing import Any

class _FFI:
    NULL: object
    error: type[Exception]
    def dlopen(self, name: str, /) -> Any: ...
    def new(self, cdecl: str, /) -> object: ...
    def from_buffer(self, cdecl: str, data: bytes | bytearray | memoryview, /) -> Any: ...

ffi: _FFI
