# SPDX-License-Identifier: MIT
"""A keyed hash of each page: Poly1305 of OpenSSL's libcrypto, or Python's BLAKE2b, which takes more than twice as long.

The key is chance, and neither it nor a hash leaves this process. So nobody can write two pages that look the same: with
Poly1305 (RFC 8439) any two different pages of 4096 bytes do so for at most one key in 2^95. That it takes a new key for
each message holds where somebody sees what comes out.

Every Debian has libcrypto, because Python's own hashlib is linked with it.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    _Hash = Callable[[bytes, Sequence[memoryview]], bytes]

SIZE: Final = 16
"""Bytes of a page's hash."""
_KEY: Final = 32
"""Bytes of a Poly1305 key (RFC 8439, 2.5)."""
_LIBRARY: Final = "libcrypto.so.3"
"""OpenSSL from 3.0 on (2021): Debian package libssl3, in Debian 13 libssl3t64."""


class PageHash:
    """Hashes pages with a key of its own; may be used by several threads."""

    def __init__(self) -> None:
        self._key = os.urandom(_KEY)
        mac = _poly1305()
        self._hash: _Hash = _by_blake2b if mac is None else mac

    def of_pages(self, views: Sequence[memoryview]) -> bytes:
        """Return the hashes of whole pages, SIZE bytes each, one behind the other."""
        return self._hash(self._key, views)


def _by_blake2b(key: bytes, views: Sequence[memoryview]) -> bytes:
    pages = (view[at : at + PAGE] for view in views for at in range(0, len(view), PAGE))
    return b"".join(hashlib.blake2b(page, digest_size=SIZE, key=key).digest() for page in pages)


@cache
def _poly1305() -> _Hash | None:
    """Return what hashes by libcrypto; None where it is missing, or has no Poly1305."""
    from vfio_mig.dirty._libcrypto import ffi

    try:
        lib = ffi.dlopen(_LIBRARY)
        algorithm = lib.EVP_MAC_fetch(ffi.NULL, b"POLY1305", ffi.NULL)
    except (OSError, AttributeError, ffi.error):
        return None
    if not algorithm:
        return None

    def by_poly1305(key: bytes, views: Sequence[memoryview]) -> bytes:
        hashes = bytearray(sum(map(len, views)) // PAGE * SIZE)
        _hash_all(lib, algorithm, key, views, hashes)
        return bytes(hashes)

    try:
        by_poly1305(bytes(_KEY), [memoryview(bytes(PAGE))])
    except MemoryError:  # it has it, and does not take what we ask for
        return None
    return by_poly1305


def _hash_all(lib: Any, algorithm: object, key: bytes, views: Sequence[memoryview], hashes: bytearray) -> None:
    """Fill *hashes*; a context of its own, so that threads do not meet in it."""
    from vfio_mig.dirty._libcrypto import ffi

    null = ffi.NULL
    begin, update, end = lib.EVP_MAC_init, lib.EVP_MAC_update, lib.EVP_MAC_final
    out, size = ffi.from_buffer("unsigned char[]", hashes) + 0, ffi.new("size_t *")
    context = lib.EVP_MAC_CTX_new(algorithm)
    try:
        for view in views:
            content = ffi.from_buffer("unsigned char[]", view)
            for at in range(0, len(view), PAGE):
                if (
                    begin(context, key, _KEY, null) != 1
                    or update(context, content + at, PAGE) != 1
                    or end(context, out, size, SIZE) != 1
                ):
                    raise MemoryError("libcrypto could not hash a page")
                out += SIZE
    finally:
        lib.EVP_MAC_CTX_free(context)
