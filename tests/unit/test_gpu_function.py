# SPDX-License-Identifier: MIT
"""The PCI function: configuration space, registers with side effects, aperture, interrupts."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

import pytest

from tests.unit.gpu_rig import BASES, DATA, GMA, Client, Rig, rigged
from tools.gpu import irq, registers, wire
from tools.gpu.errors import RefusedError
from tools.gpu.gpu import MODELS, Gpu
from tools.gpu.mmio import Hook
from tools.gpu.server import CONFIG
from tools.gpu.wire import Command

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ONES: Final = b"\xff" * 8


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rigged() as made:
        yield made


def config(rig: Rig, offset: int, size: int = 4) -> int:
    return int.from_bytes(rig.gpu.read(7, offset, size), "little")


@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_told_by_the_device_id(model: str) -> None:
    gpu = Gpu(model)
    assert gpu.read(7, 0, 4) == b"\x86\x80" + {"skl": 0x1912, "kbl": 0x5912}[model].to_bytes(2, "little")
    assert gpu.read(7, 8, 4) == b"\x06\x00\x00\x03"
    gpu.close()


def test_the_configuration_space_is_4096_bytes_with_nothing_in_the_extended_part(rig: Rig) -> None:
    rig.gpu.write(7, 0x100, ONES)
    assert rig.gpu.read(7, 0x100, 4096 - 0x100) == bytes(4096 - 0x100)


def test_a_conventional_function_has_256_bytes_and_no_pci_express_capability() -> None:
    gpu = Gpu(conventional=True)
    try:
        assert gpu.read(CONFIG, 0, 2) == b"\x86\x80"
        assert gpu.regions[CONFIG].size == 256
        kinds, at = [], gpu.read(CONFIG, 0x34, 1)[0]
        while at:
            kind, at = gpu.read(CONFIG, at, 2)
            kinds.append(kind)
        assert kinds == [5, 1]  # MSI, power management
    finally:
        gpu.close()


def test_the_capabilities_are_pci_express_msi_and_power_management(rig: Rig) -> None:
    assert config(rig, 6, 2) & 0x10
    found, position = [], config(rig, 0x34, 1)
    while position:
        found.append(config(rig, position, 1))
        position = config(rig, position + 1, 1)
    assert found == [0x10, 0x05, 0x01]


def test_8_mib_of_ggtt_and_no_stolen_memory(rig: Rig) -> None:
    gmch = config(rig, 0x50, 2)
    assert (1 << (gmch >> 6 & 3), gmch >> 8) == (8, 0)


@pytest.mark.parametrize(("aperture", "bits"), [(256, 0xF000_000C), (1024, 0xC000_000C)])
def test_bars_tell_their_sizes_and_keep_their_addresses(aperture: int, bits: int) -> None:
    gpu = Gpu(aperture=aperture)
    for offset in range(0x10, 0x28, 4):
        gpu.write(7, offset, ONES[:4])
    found = [int.from_bytes(gpu.read(7, offset, 4), "little") for offset in range(0x10, 0x28, 4)]
    assert found == [0xFF00_0004, 0xFFFF_FFFF, bits, 0xFFFF_FFFF, 0xFFFF_FFC1, 0]
    gpu.write(7, 0x10, b"\x00\x00\x00\xe1")
    assert gpu.read(7, 0x10, 4) == b"\x04\x00\x00\xe1"
    gpu.close()


@pytest.mark.parametrize(
    ("offset", "written", "kept"),
    [
        (0x00, 0xFFFF_FFFF, 0x1912_8086),
        (0x04, 0xFFFF_FFFF, 0x0010_0547),
        (0x08, 0xFFFF_FFFF, 0x0300_0006),
        (0x2C, 0xFFFF_FFFF, 0x2212_8086),
        (0x34, 0xFFFF_FFFF, 0x0000_0070),
        (0x3C, 0xFFFF_FFFF, 0x0000_01FF),
        (0x50, 0xFFFF_FFFF, 0x0000_00C0),
        (0xAC, 0xFFFF_FFFF, 0x0071_D005),
        (0xB0, 0xFEE0_0001, 0xFEE0_0000),
        (0xD4, 0xFFFF_FFFF, 0x0000_0103),
        (0xFC, 0x1234_5678, 0x1234_5678),
    ],
)
def test_only_what_is_writable_is_written(rig: Rig, offset: int, written: int, kept: int) -> None:
    rig.gpu.write(7, offset, written.to_bytes(4, "little"))
    assert config(rig, offset) == kept


def test_every_hook_of_the_table_is_taken_by_some_part_of_the_gpu(rig: Rig) -> None:
    rows = [row for row in registers.table() if isinstance(row.behaviour, Hook)]
    assert len(rows) == 4 * 5 + 3
    for row in rows:
        assert isinstance(row.behaviour, Hook)
        key = (row.behaviour.name, row.offset)
        assert key in rig.gpu.mmio.readers or key in rig.gpu.mmio.writers, row.name
    taken = {*rig.gpu.mmio.readers, *rig.gpu.mmio.writers}
    assert taken == {(row.behaviour.name, row.offset) for row in rows if isinstance(row.behaviour, Hook)}


def test_the_table_has_one_row_per_register_and_says_who_looks_at_it() -> None:
    table = registers.table()
    assert len({row.offset for row in table}) == len(table)
    assert all(row.seen_in and row.name and row.offset % 4 == 0 for row in table)


@pytest.mark.parametrize(("request_", "ack"), [(0xA278, 0xD84), (0xA270, 0xD88), (0xA188, 0x130044)])
def test_forcewake_is_acknowledged(rig: Rig, request_: int, ack: int) -> None:
    rig.write(request_, 0x0001_0001)
    assert rig.read(ack) == 1
    rig.write(request_, 0x0002_0002)
    assert rig.read(ack) == 3
    rig.write(request_, 0xFFFF_0000)
    assert rig.read(ack) == 0


IIRS: Final = [
    0x44308, 0x44318, 0x44328, 0x44338, 0x44408, 0x44418, 0x44428, 0x44448, 0x44468, 0x444E8, 0xC4008, 0x64838,
]  # fmt: skip


@pytest.mark.parametrize("offset", IIRS)
def test_interrupt_identities_are_cleared_by_ones(rig: Rig, offset: int) -> None:
    rig.gpu.mmio.put(offset, 0xFF00FF00)
    rig.write(offset, 0x0F000F00)
    assert rig.read(offset) == 0xF000F000


@pytest.mark.parametrize("offset", [0x4260, 0x4264, 0x426C, 0x4270])
def test_tlbs_are_invalidated_at_once(rig: Rig, offset: int) -> None:
    rig.write(offset, 0xFFFF_FFFF)
    assert rig.read(offset) == 0xFFFF_FFFE


@pytest.mark.parametrize(("command", "data"), [(0x07, 1), (0x21, 1), (0x05, 0), (0xFF, 0)])
def test_the_power_controller_answers_at_once(rig: Rig, command: int, data: int) -> None:
    rig.write(0x138128, 0xDEAD)
    rig.write(0x138124, 1 << 31 | 2 << 8 | command)
    assert (rig.read(0x138124), rig.read(0x138128), rig.read(0x13812C)) == (2 << 8, data, 0)


def test_the_power_controller_does_nothing_unless_it_is_told_to(rig: Rig) -> None:
    rig.write(0x138128, 0xDEAD)
    rig.write(0x138124, 7)
    assert (rig.read(0x138124), rig.read(0x138128)) == (7, 0xDEAD)


def test_all_power_well_registers_show_the_state_of_all_requests(rig: Rig) -> None:
    rig.write(0x45400, 0x8000_0000)
    rig.write(0x45404, 0x0000_0008)
    assert rig.read(0x45400) == 0xC000_0004
    assert rig.read(0x45404) == 0x4000_000C
    assert rig.read(0x45408) == 0x4000_0004
    rig.write(0x45400, 0)
    assert rig.read(0x45408) == 4


@pytest.mark.parametrize("offset", [0x45008, 0x44FE8, 0x46010])
def test_display_buffers_and_pll_follow_their_request(rig: Rig, offset: int) -> None:
    rig.write(offset, 1 << 31 | 1)
    assert rig.read(offset) == 3 << 30 | 1
    assert rig.read(0x6C060) == int(offset == 0x46010)
    rig.write(offset, 1 << 30)
    assert (rig.read(offset), rig.read(0x6C060)) == (0, 0)


def test_an_aux_transfer_times_out(rig: Rig) -> None:
    rig.write(0x64110, 1 << 31 | 4 << 20)
    assert rig.read(0x64110) == 1 << 30 | 1 << 28 | 4 << 20
    rig.write(0x64110, 1 << 30 | 1 << 28 | 1 << 25)
    assert rig.read(0x64110) == 0


@pytest.mark.parametrize(("offset", "value"), [(0xC5108, 3 << 10), (0x42000, 0x8E00_0000)])
def test_what_the_driver_cannot_change_stays(rig: Rig, offset: int, value: int) -> None:
    rig.write(offset, 0xFFFF_FFFF)
    assert rig.read(offset) == value


@pytest.mark.parametrize(("offset", "value"), [(0xC000, 1), (0x8504, 1), (0x9120, 1 << 25), (0x145998, 0x161616)])
def test_what_the_driver_expects_at_the_start_is_there(rig: Rig, offset: int, value: int) -> None:
    assert rig.read(offset) == value


@pytest.mark.parametrize("offset", [0x22358, 0x44070])
def test_timestamps_go_on(rig: Rig, offset: int) -> None:
    rig.time.seconds = 0.5
    assert rig.read(offset) == 6_000_000
    rig.time.seconds = 400.0
    assert rig.read(offset) == 4_800_000_000 & 0xFFFF_FFFF
    assert rig.read(0x2235C) == 1


def test_only_whole_dwords_have_side_effects(rig: Rig) -> None:
    rig.gpu.mmio.put(0x44308, 0xFFFF_FFFF)
    for offset, data in ((0x44308, b"\0"), (0x44309, b"\0\0"), (0x4430A, b"\0\0\0\0"), (0x44300, bytes(16))):
        rig.gpu.write(0, offset, data)
        assert len(rig.gpu.read(0, offset, len(data))) == len(data)
    assert rig.read(0x44308) == 0


def test_two_registers_are_accessed_at_once(rig: Rig) -> None:
    rig.gpu.mmio.put(0x44308, 0xFF)
    rig.gpu.write(0, 0x44308, b"\x0f\0\0\0\x34\x12\0\0")
    assert (rig.read(0x44308), rig.read(0x4430C)) == (0xF0, 0x1234)
    assert rig.gpu.read(0, 0x44308, 8) == b"\xf0\0\0\0\x34\x12\0\0"


def test_ggtt_entries_are_written_by_qwords_and_dwords(rig: Rig) -> None:
    rig.gpu.write(0, (8 << 20) + 8, b"\1\2\3\4\5\6\7\x08")
    rig.gpu.write(0, (8 << 20) + 20, b"\xaa\xbb\xcc\xdd")
    assert rig.gpu.mmio.ggtt[1] == 0x0807060504030201
    assert rig.gpu.mmio.ggtt[2] == 0xDDCCBBAA << 32
    assert rig.gpu.read(0, (8 << 20) + 8, 16) == b"\1\2\3\4\5\6\7\x08\0\0\0\0\xaa\xbb\xcc\xdd"


def test_the_aperture_leads_through_the_ggtt(rig: Rig) -> None:
    rig.gpu.write(2, GMA + DATA, b"\1\2\3\4")
    assert rig.get(DATA) == 0x04030201
    data = os.urandom(0x2100)
    rig.gpu.write(2, GMA + DATA + 0xF80, data)
    assert bytes(rig.memory[DATA + 0xF80 : DATA + 0xF80 + len(data)]) == data
    assert rig.gpu.read(2, GMA + DATA + 0xF80, len(data)) == data


def test_the_aperture_where_nothing_is_mapped_reads_as_ones(rig: Rig) -> None:
    rig.gpu.write(2, 0x3000_0000, b"\1\2\3\4")
    assert rig.gpu.read(2, 0x3000_0000, 4) == b"\xff" * 4
    rig.gpu.mmio.ggtt[0x3000_0000 // 4096] = 0x7000_0000 | 1  # no memory there
    rig.gpu.write(2, 0x3000_0000, b"\1\2\3\4")
    assert rig.gpu.read(2, 0x3000_0000, 4) == b"\xff" * 4


def test_a_trace_tells_every_access_and_lets_no_register_be_mapped() -> None:
    lines: list[str] = []
    gpu = Gpu(trace=lines.append)
    assert gpu.regions[0].areas == [(8 << 20, 8 << 20)]
    gpu.write(0, 0x2030, b"\x10\0\0\0")
    gpu.read(0, 0x9120, 4)
    gpu.read(7, 0, 2)
    gpu.read(2, 0, 4)  # memory, not a register
    assert lines == ["write register 0x2030 00000010", "read  register 0x9120 02000000", "read  config 0x0 8086"]
    gpu.close()


def test_the_io_bar_is_empty(rig: Rig) -> None:
    rig.gpu.write(4, 0, b"\1\2\3\4")
    assert rig.gpu.read(4, 0, 4) == bytes(4)


def raise_user(rig: Rig) -> None:
    rig.run(2 << 23)


def test_interrupts_wait_for_the_master_s_enable_bit(rig: Rig) -> None:
    rig.write(registers.MASTER_IRQ, 0)
    raise_user(rig)
    assert rig.interrupts() == 0
    assert rig.read(registers.MASTER_IRQ) == 2  # bcs0, not enabled
    rig.write(registers.MASTER_IRQ, 1 << 31)
    assert rig.interrupts() == 1
    rig.write(registers.GT_IIR, 0xFFFF_FFFF)
    assert rig.read(registers.MASTER_IRQ) == 1 << 31
    rig.write(registers.MASTER_IRQ, 1 << 31)
    assert rig.interrupts() == 0


def test_a_masked_interrupt_never_was(rig: Rig) -> None:
    rig.write(registers.GT_IMR, 0xFFFF_FFFF)
    raise_user(rig)
    assert (rig.interrupts(), rig.read(registers.GT_IIR)) == (0, 0)


@pytest.mark.parametrize("engine", BASES)
def test_an_engine_masks_its_interrupts_with_bits_as_in_the_gt(rig: Rig, engine: str) -> None:
    layout = next(each for each in registers.ENGINES if each.name == engine)
    rig.write(layout.base + registers.RING_IMR, ~(1 << 8 + layout.shift) & 0xFFFF_FFFF)
    rig.run(2 << 23, engine=engine)
    assert rig.read(registers.GT_IIR + 16 * layout.bank) == 1 << 8 + layout.shift


def test_an_interrupt_that_is_not_enabled_is_only_seen(rig: Rig) -> None:
    rig.write(registers.GT_IER, 0)
    raise_user(rig)
    assert (rig.interrupts(), rig.read(registers.GT_IIR)) == (0, 0x0101_0000)


@pytest.mark.parametrize(("engine", "bank", "bits", "master"), [
    ("rcs0", 0, 0x101, 1), ("bcs0", 0, 0x101_0000, 2), ("vcs0", 1, 0x101, 4), ("vecs0", 3, 0x101, 0x40),
])  # fmt: skip
def test_each_engine_has_its_bits(rig: Rig, engine: str, bank: int, bits: int, master: int) -> None:
    rig.run(2 << 23, engine=engine)
    assert rig.read(registers.GT_IIR + 16 * bank) == bits
    assert rig.read(registers.MASTER_IRQ) == 1 << 31 | master
    assert set(BASES) == set(rig.gpu.engines)


def test_interrupts_are_lost_when_it_is_told_to(rig: Rig) -> None:
    rig.gpu.misbehaviour.lost_interrupts = 2
    raise_user(rig)  # three: active, user, complete
    assert (rig.interrupts(), rig.gpu.interrupts.lost) == (1, 2)


TRIGGER_FD: Final = irq.DATA_EVENTFD | irq.ACTION_TRIGGER


class Line:
    """Interrupts with a client's eventfd."""

    def __init__(self, index: int) -> None:
        self.client: Final = Client(Gpu())
        self.fd: Final = os.eventfd(0, os.EFD_NONBLOCK)
        self.index: Final = index

    def set(self, flags: int, *, start: int = 0, count: int = 1, data: bytes = b"", fds: Sequence[int] = ()) -> int:
        payload = wire.IRQ_SET.pack(20 + len(data), flags, self.index, start, count) + data
        return self.client.ask(Command.DEVICE_SET_IRQS, payload, fds).error

    def connect(self) -> None:
        assert self.set(TRIGGER_FD, fds=[self.fd]) == 0

    def count(self) -> int:
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def fire(self, times: int = 1) -> int:
        for _ in range(times):
            self.client.gpu.interrupts.fire()
        return self.count()

    def close(self) -> None:
        self.client.close()
        self.client.gpu.close()
        os.close(self.fd)


@pytest.fixture
def msi() -> Iterator[Line]:
    made = Line(irq.MSI)
    yield made
    made.close()


@pytest.fixture
def intx() -> Iterator[Line]:
    made = Line(irq.INTX)
    yield made
    made.close()


def test_an_msi_is_sent_each_time(msi: Line) -> None:
    msi.connect()
    assert msi.fire(3) == 3
    assert msi.set(TRIGGER_FD) == 0  # without an eventfd: no more
    assert msi.fire() == 0


def test_a_second_eventfd_replaces_the_first(msi: Line) -> None:
    msi.connect()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    assert msi.set(TRIGGER_FD, fds=[other]) == 0
    assert (msi.fire(), os.eventfd_read(other)) == (0, 1)
    os.close(other)


def test_intx_is_masked_until_it_is_unmasked(intx: Line) -> None:
    intx.connect()
    assert intx.fire(3) == 1
    assert intx.set(irq.DATA_NONE | irq.ACTION_UNMASK) == 0
    assert intx.count() == 1  # the one that came meanwhile
    assert intx.set(irq.DATA_NONE | irq.ACTION_UNMASK) == 0
    assert intx.count() == 0
    assert intx.fire() == 1
    assert intx.set(irq.DATA_BOOL | irq.ACTION_UNMASK, data=b"\1") == 0
    assert intx.set(irq.DATA_NONE | irq.ACTION_MASK) == 0
    assert intx.fire() == 0


def test_msi_goes_before_intx(intx: Line) -> None:
    intx.connect()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    payload = wire.IRQ_SET.pack(20, TRIGGER_FD, irq.MSI, 0, 1)
    assert intx.client.ask(Command.DEVICE_SET_IRQS, payload, [fd]).error == 0
    assert (intx.fire(), os.eventfd_read(fd)) == (0, 1)
    os.close(fd)


def test_the_client_can_trigger_an_interrupt_and_end_all(msi: Line) -> None:
    msi.connect()
    assert msi.set(irq.DATA_NONE | irq.ACTION_TRIGGER) == 0
    assert msi.set(irq.DATA_BOOL | irq.ACTION_TRIGGER, data=b"\1") == 0
    assert msi.set(irq.DATA_BOOL | irq.ACTION_TRIGGER, data=b"\0") == 0
    assert msi.count() == 2
    assert msi.set(irq.DATA_NONE | irq.ACTION_TRIGGER, count=0) == 0
    assert msi.fire() == 0


@pytest.mark.parametrize(
    ("flags", "start", "count", "data"),
    [
        (0, 0, 1, b""),
        (irq.DATA_NONE, 0, 1, b""),
        (irq.ACTION_TRIGGER, 0, 1, b""),
        (irq.DATA_NONE | irq.DATA_BOOL | irq.ACTION_TRIGGER, 0, 1, b""),
        (irq.DATA_NONE | irq.ACTION_MASK | irq.ACTION_TRIGGER, 0, 1, b""),
        (irq.DATA_NONE | irq.ACTION_TRIGGER | 1 << 6, 0, 1, b""),
        (irq.DATA_NONE | irq.ACTION_TRIGGER, 0, 2, b""),
        (irq.DATA_NONE | irq.ACTION_TRIGGER, 2**32 - 1, 1, b""),
        (irq.DATA_NONE | irq.ACTION_TRIGGER, 1, 2**32 - 1, b""),
        (irq.DATA_NONE | irq.ACTION_TRIGGER, 0, 1, b"\1"),
        (irq.DATA_BOOL | irq.ACTION_TRIGGER, 0, 1, b""),
        (irq.DATA_BOOL | irq.ACTION_TRIGGER, 0, 1, b"\1\1"),
        (irq.DATA_NONE | irq.ACTION_MASK, 0, 1, b""),  # MSI cannot be masked
    ],
)
def test_interrupt_settings_that_mean_nothing_are_refused(
    msi: Line, flags: int, start: int, count: int, data: bytes
) -> None:
    msi.connect()
    assert msi.set(flags, start=start, count=count, data=data) == errno.EINVAL
    assert msi.fire() == 1


@pytest.mark.parametrize("index", [2, 3, 4, 5, 2**32 - 1])
def test_there_are_no_other_interrupts(index: int) -> None:
    line = Line(index)
    assert line.set(TRIGGER_FD, fds=[line.fd]) == errno.EINVAL
    line.close()


def test_an_interrupt_is_sent_to_an_eventfd_only(msi: Line) -> None:
    read, write = os.pipe()
    assert msi.set(TRIGGER_FD, fds=[write]) == errno.EINVAL
    assert msi.set(TRIGGER_FD, fds=[msi.fd, msi.fd]) == errno.EINVAL
    assert msi.set(irq.DATA_NONE | irq.ACTION_TRIGGER, fds=[msi.fd]) == errno.EINVAL
    os.close(read)
    os.close(write)


def test_an_eventfd_at_its_limit_does_not_hold_the_gpu_up(msi: Line) -> None:
    os.set_blocking(msi.fd, True)
    msi.connect()
    os.eventfd_write(msi.fd, 2**64 - 2)
    msi.client.gpu.interrupts.fire()
    assert os.eventfd_read(msi.fd) == 2**64 - 2
    os.set_blocking(msi.fd, False)


def test_ranges_that_fault_are_bounded(rig: Rig) -> None:
    for wrong in (("else", 0, 1), ("dma", 1, 1), ("dma", -1, 1), ("dma", 0, 2**64 + 1)):
        with pytest.raises(RefusedError):
            rig.gpu.misbehaviour.add_faults([("dma", 0, 1), wrong])
    assert rig.gpu.misbehaviour.faults == []
    rig.gpu.misbehaviour.add_faults([("dma", 0, 1)] * 64)
    with pytest.raises(RefusedError):
        rig.gpu.misbehaviour.add_faults([("dma", 0, 1)])
