# SPDX-License-Identifier: MIT
"""The subset of POSIX tar that archives are made of: one exact header per name and size, nothing to interpret.

A header is a function of name, size and time. The reader builds it again from what it has read and compares all
512 bytes, so a header that any other program wrote, or in which a bit has flipped, is refused.
"""

from typing import Final

from vfio_mig.errors import ImageError

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
SIZE_MAX: Final = 0o77777777777
_NAME_MAX: Final = 100


def header(name: str, size: int, mtime: int) -> bytes:
    """Return the 512-byte ustar header of a regular file of *size* bytes, mode 0600, owned by root."""
    encoded = name.encode("ascii")
    if len(encoded) > _NAME_MAX or not 0 <= size <= SIZE_MAX or not 0 <= mtime <= SIZE_MAX:
        raise ValueError(f"no tar member: {name!r}, {size} bytes, time {mtime}")
    block = bytearray(BLOCK)
    block[: len(encoded)] = encoded
    block[100:124] = b"0000600\0" + b"0000000\0" * 2  # mode, owner, group
    block[124:148] = b"%011o\0%011o\0" % (size, mtime)
    block[148:157] = b" " * 8 + b"0"  # the checksum counts itself as blanks; a regular file
    block[257:265] = b"ustar\x0000"
    block[265:269] = block[297:301] = b"root"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> int:
    """Return how many zero bytes follow *size* bytes of content."""
    return -size % BLOCK


def parse_header(block: bytes, offset: int) -> tuple[str, int, int]:
    """Return name, size (bytes) and time of a header that :func:`header` made.

    :param offset: where the block is, for the message.
    :raises ImageError: the block is anything else.
    """
    try:
        name = block[:_NAME_MAX].rstrip(b"\0").decode("ascii")
        size, mtime = int(block[124:135], 8), int(block[136:147], 8)
        good = header(name, size, mtime) == block
    except ValueError:
        good, name, size, mtime = False, "", 0, 0
    if not good:
        raise ImageError(f"member header at {offset:#x} is damaged or of another program")
    return name, size, mtime
