# SPDX-License-Identifier: MIT
from collections.abc import Callable
from typing import Any

class _Library:
    def __getattr__(self, name: str) -> Callable[[Any, int], int]: ...

class _FFI:
    error: type[Exception]
    def dlopen(self, name: str, /) -> _Library: ...
    def from_buffer(self, cdecl: str, data: bytes | memoryview, /) -> object: ...
    def sizeof(self, cdecl: str, /) -> int: ...

ffi: _FFI
