# SPDX-License-Identifier: MIT
"""Hashes of pages: those of libcrypto are Poly1305, and without it BLAKE2b does the same service."""

from __future__ import annotations

import hashlib

import pytest

from vfio_mig.dirty import pagehash
from vfio_mig.dirty.pagehash import SIZE, PageHash
from vfio_mig.ranges import PAGE

PAGES = [bytes(PAGE), b"\xff" * PAGE, *(hashlib.shake_128(bytes([seed])).digest(PAGE) for seed in (1, 2))]


def poly1305(key: bytes, message: bytes) -> bytes:
    """RFC 8439, 2.5.1, as it is written there."""
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    s = int.from_bytes(key[16:], "little")
    sum_ = 0
    for at in range(0, len(message), 16):
        sum_ = (sum_ + int.from_bytes(message[at : at + 16] + b"\x01", "little")) * r % ((1 << 130) - 5)
    return ((sum_ + s) & ((1 << 128) - 1)).to_bytes(16, "little")


def test_the_reference_is_the_rfc_s() -> None:
    key = bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
    tag = poly1305(key, b"Cryptographic Forum Research Group")
    assert tag == bytes.fromhex("a8061dc1305136c6c22b8baf0c0127a9")


def test_libcrypto_hashes_each_page_of_each_piece_by_itself() -> None:
    by_libcrypto = pagehash._poly1305()
    assert by_libcrypto is not None, "every Debian has libssl3"
    key = hashlib.sha256(b"key").digest()
    views = [memoryview(PAGES[0] + PAGES[1]), memoryview(b""), memoryview(PAGES[2]), memoryview(PAGES[3])]
    assert by_libcrypto(key, views) == b"".join(poly1305(key, page) for page in PAGES)
    assert by_libcrypto(key, []) == b""


@pytest.mark.parametrize("name", ["libcrypto-of-nobody.so.3", "libc.so.6"])  # not there; there, without the functions
def test_a_host_without_libcrypto_hashes_by_python(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(pagehash, "_LIBRARY", name)
    monkeypatch.setattr(pagehash, "_poly1305", pagehash._poly1305.__wrapped__)
    hashing = PageHash()
    assert hashing.of_pages([memoryview(PAGES[2] + PAGES[3]), memoryview(PAGES[0])]) == b"".join(
        hashlib.blake2b(page, digest_size=SIZE, key=hashing._key).digest() for page in (PAGES[2], PAGES[3], PAGES[0])
    )


@pytest.mark.parametrize("without", [False, True])
def test_pages_that_differ_anywhere_differ_and_so_do_the_keys(monkeypatch: pytest.MonkeyPatch, without: bool) -> None:
    if without:
        monkeypatch.setattr(pagehash, "_poly1305", lambda: None)
    one, other = PageHash(), PageHash()
    view = memoryview(bytearray(PAGES[2]))
    before = one.of_pages([view])
    assert before == one.of_pages([memoryview(PAGES[2])])
    assert before != other.of_pages([view])
    for at in (0, 1, 15, 16, 2048, PAGE - 1):
        view[at] ^= 1
        assert one.of_pages([view]) != before
        view[at] ^= 1
