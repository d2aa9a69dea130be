# SPDX-License-Identifier: MIT
"""Builders of what a driver or a QEMU saves, by the rules of its format, and the seeds of targets that look inside."""

from __future__ import annotations

import struct
from typing import Final

from tools.fuzz import corpus

# Streams of protocol v2 ----------------------------------------------------------------------------------------------


def mtty(ports: int = 2, flags: int = 0, minor: int = 0) -> bytes:
    """Return a stream of the kernel's sample: LCR 3 and SCR 0x5a in port 0, SCR 0xa5 in port 1."""
    head = struct.pack("<QIIII", 0x7E9D09898C3E2C4E, 1, minor, ports, flags)
    registers = [b"\0\0\0\3\0\0\0\x5a", b"\0\0\0\0\0\0\0\xa5"]
    return head + b"".join(registers[number % 2] + bytes(25) + b"\x10" + bytes(2) for number in range(ports))


def gvt_sample(image: bytes, filler: int = 16, pages: int = 0, total: int | None = None) -> bytes:
    """Return a stream of our sample driver; the filler is not what the driver would compute."""
    size = 64 + filler + pages * (16 + 4080) + 16 + len(image)
    promised = size if total is None else total
    head = struct.pack("<QII16sQQQQ", 0x32765F747667, 1, pages > 0, b"GVTg_V4_8", promised, filler, 7, 0)
    records = [struct.pack("<IIQ", 1, 4080, number) + bytes(4080) for number in range(pages)]
    last = struct.pack("<IIQ", 2, len(image), pages) + image
    return head + b"\x5a" * filler + b"".join(records) + last


def mlx5(*sizes: int) -> bytes:
    """Return a stream of mlx5: the size of the rest, then firmware data."""
    return b"".join(
        struct.pack("<QII", size, int(tag == 1), tag) + bytes(size)
        for size, tag in [(8, 1), *((size, 0) for size in sizes)]
    )


def xe(*packets: tuple[int, int]) -> bytes:
    """Return a stream of xe: type and bytes of each packet behind the descriptor, a trailer last."""
    return b"".join(
        struct.pack("<BBBBIQQ", 1, kind, 0, 0, 0, 0, size) + bytes(size) for kind, size in [(1, 8), *packets, (2, 0)]
    )


def qat() -> bytes:
    """Return the beginning of a stream of qat."""
    return struct.pack("<IIHHI", 0xADF5CAEA, 1, 16, 5, 4096) + bytes(64)


def hisi(magic: int = 0xAACCFEEDDECADEDE) -> bytes:
    """Return the beginning of a stream of hisi_acc."""
    return struct.pack("<Q", magic) + bytes(32)


# QEMU ----------------------------------------------------------------------------------------------------------------

MARK: Final = 0xFFFFFFFFEF100000
END, CONFIG, SETUP, DATA = (MARK + number for number in range(1, 5))
RAM_SIZE, RAM_PAGE, RAM_EOS, RAM_CONTINUE, RAM_ZERO = 0x04, 0x08, 0x10, 0x20, 0x02


def be64(*words: int) -> bytes:
    """Return big-endian words."""
    return struct.pack(f">{len(words)}Q", *words)


def named(name: bytes) -> bytes:
    """Return a name as QEMU writes it."""
    return bytes([len(name)]) + name


def begin(number: int, name: bytes, content: bytes, *, full: bool = False, footer: bool = True) -> bytes:
    """Return a section with a name: SECTION_START, or SECTION_FULL."""
    version = 4 if name == b"ram" else 1
    head = struct.pack(">BI", 4 if full else 1, number) + named(name) + struct.pack(">II", 0, version)
    return head + content + (struct.pack(">BI", 0x7E, number) if footer else b"")


def part(number: int, content: bytes, *, last: bool = False, footer: bool = True) -> bytes:
    """Return SECTION_PART or SECTION_END."""
    return (
        struct.pack(">BI", 3 if last else 2, number) + content + (struct.pack(">BI", 0x7E, number) if footer else b"")
    )


def ram_blocks(size: int = 0x2000) -> bytes:
    """Return what `ram` begins with."""
    return be64(size | RAM_SIZE) + named(b"pc.ram") + be64(size) + be64(RAM_EOS)


def ram_pages() -> bytes:
    """Return a page with content and one that is zero."""
    page = be64(RAM_PAGE) + named(b"pc.ram") + b"\x7e" * 4096
    return page + be64(0x1000 | RAM_ZERO | RAM_CONTINUE) + b"\0" + be64(RAM_EOS)


def frame(content: bytes) -> bytes:
    """Return a piece of a device's state."""
    return be64(DATA, len(content)) + content


PCI_CONFIG: Final = struct.pack("<HHHH", 0x8086, 0x1912, 6, 0).ljust(256, b"\0")
DEVICE_CONFIG: Final = struct.pack(">I", 2) + PCI_CONFIG + bytes(16)


def qemu_stream(
    *states: list[bytes], config: bytes = DEVICE_CONFIG, footer: bool = True, tail: bytes | None = None
) -> bytes:
    """Return a stream with `ram`, a foreign device, and a VFIO device for each list of pieces of state.

    :param footer: whether sections have one, as in every machine type since QEMU 2.4.
    :param tail: what stands behind the sections, instead of the end and a description.
    """
    first = 7
    out = [b"QEVM", struct.pack(">I", 3), b"\7", struct.pack(">I", 10), b"pc-q35-7.2"]
    out.append(begin(2, b"ram", ram_blocks(), footer=footer))
    for number, _ in enumerate(states, first):
        name = b"0000:00:%02x.0/vfio" % number
        out.append(begin(number, name, be64(SETUP, END), footer=footer))
    out.append(part(2, ram_pages(), footer=footer))
    for number, pieces in enumerate(states, first):
        out += [part(number, frame(piece) + be64(END), footer=footer) for piece in pieces[:-1]]
    out.append(part(2, be64(RAM_EOS), last=True, footer=footer))
    for number, pieces in enumerate(states, first):
        rest = b"".join(map(frame, pieces[-1:]))
        out.append(part(number, rest + be64(END), last=True, footer=footer))
    if footer:  # without one nothing can be behind a device whose layout is not known
        out.append(begin(0x20, b"timer", bytes(24) + b"\x7e\0\0\0\x20\xff", full=True))
    for number, _ in enumerate(states, first):
        name = b"0000:00:%02x.0/vfio" % number
        out.append(begin(number, name, be64(CONFIG) + config + be64(END), full=True, footer=footer))
    description = b'{"page_size": 4096}'
    end = b"\0\6" + struct.pack(">I", len(description)) + description
    return b"".join([*out, end if tail is None else tail])


QEMU_WORDS: Final = (*(be64(MARK + number) for number in range(1, 6)), b"\x04vfio", b"\x7e\0\0\0\7", b"\2\0\0\0\7")


def qemu_seeds() -> list[bytes]:
    """Return whole streams, broken ones, and such as make a parser search; without magic number and version."""
    return [one[8:] for one in _qemu_streams()]


def _qemu_streams() -> list[bytes]:
    whole = qemu_stream([mtty()[:24], mtty()[24:]])
    small = b"QEVM" + struct.pack(">I", 3)
    vfio = begin(7, b"vfio", be64(SETUP, END))
    return [
        whole,
        qemu_stream([mtty()], [qat()]),
        qemu_stream([mtty()], footer=False),
        qemu_stream([mtty()], tail=b"\x09 not a section" + part(7, frame(b"more") + be64(END))),
        qemu_stream([mtty()], config=b"short"),
        whole[:-30],
        whole[: len(whole) // 2],
        b"QEVM",
        small,
        small + b"\0",
        small + vfio,
        small + vfio + part(7, be64(DATA, 1 << 63)),
        small + vfio + part(7, be64(DATA, 0) * 20 + be64(CONFIG)),
        small + vfio + part(8, b""),
        small + b"\7\xff\xff\xff\xff",
        small + b"\7\0\0\0\0\5\4abcd",
        small + b"\x08\0\1\xff\xff",
        small + b"\6\xff\xff\xff\xff",
        small + begin(2, b"ram", be64(0x2004) + named(b"x") + be64(0x3000)),
        small + begin(2, b"ram", be64(0x40) + named(b"x") + b"\1\xff\xff"),
        small + b"\xfe" + begin(7, b"a/vfio", be64(SETUP, END)) + part(7, frame(b"late") + be64(END)),
        small + b"\xfe" + be64(DATA) * 8,
        small + begin(3, b"\x7e" * 9, b"\x7e\0\0\0\3" * 9, footer=False),
    ]


def state_seeds() -> list[bytes]:
    """Return bare states of many drivers, short, as the whole image of a GVT-g vGPU is large."""
    head = corpus.head(corpus.HEAD_SIZE)
    return [
        mtty(),
        mtty(1),
        mtty()[:40],
        mtty(ports=200)[:100],
        mlx5(5, 0, 9),
        mlx5(1 << 10)[:-1],
        xe((3, 16), (6, 0)),
        xe((9, 3))[:-3],
        qat(),
        qat()[:10],
        hisi(),
        hisi(0xCDCDCDCDFEEDAACC)[:8],
        struct.pack("<QII", 5, 0, 0) + bytes(5),
        struct.pack("<QII", 1 << 60, 0, 0) + bytes(5),
        gvt_sample(head),
        gvt_sample(b"no image", filler=0, pages=2),
        gvt_sample(b"", filler=3, total=5),
        gvt_sample(b"x")[:-3],
        gvt_sample(b"")[:50],
        struct.pack("<QII16sQQQQ", 0x32765F747667, 9, 9, b"\xff\n", 0, (1 << 64) - 1, 0, 1),
        b"",
        b"\0" * 100,
        b"garbage",
        *corpus.image_seeds(),
    ]
