# SPDX-License-Identifier: MIT
"""What an open device is taken for, how its regions are read, and what the RFC's protocol sends to it."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import made_up_protocol
from vfio_mig import uapi
from vfio_mig.device import CAPS_MAX, REPLY_MAX, Device, Region
from vfio_mig.errors import DeviceError, UnsupportedError, UsageError
from vfio_mig.host.devices import HostDevice
from vfio_mig.jobs import check
from vfio_mig.jobs.engine import session
from vfio_mig.protocols import registry
from vfio_mig.protocols.flags import mainline_flags
from vfio_mig.protocols.gvt_rfc import DIRTY_PAGES_MAX, GvtRfc
from vfio_mig.protocols.mainline_v2 import MainlineV2
from vfio_mig.protocols.registry import detect, explain, spoken
from vfio_mig.uapi import Request, vfio_request
from vfio_mig.uapi.profile import BUILT_IN, DEFAULT_PROFILE, KVMGT_PROFILE, RfcProfile

if TYPE_CHECKING:
    from pathlib import Path

    from vfio_mig.uapi._generated import CData

SIZE: Final = 0x900000
CAPS, RW, RWM = 8, 3, 7
STATE_INDEX: Final = 9
PROBE: Final = 1 << 18  # VFIO_DEVICE_FEATURE_PROBE
SPARSE, TYPE = 1, 2
# No two numbers as shipped
OTHER_PROFILE: Final = RfcProfile(
    migratable_flag=0x40,
    state_index=11,
    num_regions=12,
    status_set=vfio_request("VFIO_DEVICE_PCI_STATUS_SET", 20),
    get_dirty=vfio_request("VFIO_DEVICE_PCI_GET_DIRTY_BITMAP", 21),
    stop=4,
    start=8,
    image_max=SIZE * 2,
    source="other",
)


def reply(*caps: tuple[int, bytes], flags: int = RW, size: int = SIZE, offset: int = 9 << 40) -> bytes:
    """What GET_REGION_INFO writes: the region, then its capabilities, each right after the one before."""
    chain, at = b"", 32
    for number, (cap_id, body) in enumerate(caps):
        following = at + 8 + len(body) if number + 1 < len(caps) else 0
        chain += struct.pack("=HHI", cap_id, 1, following) + body
        at += 8 + len(body)
    if caps:
        flags |= CAPS
    return struct.pack("=IIIIQQ", 32 + len(chain), flags, 0, 32 if caps else 0, size, offset) + chain


def type_cap(kind: int, subtype: int) -> tuple[int, bytes]:
    return TYPE, struct.pack("=II", kind, subtype)


def sparse_cap(*areas: tuple[int, int], count: int | None = None) -> tuple[int, bytes]:
    body = struct.pack("=II", len(areas) if count is None else count, 0)
    return SPARSE, body + b"".join(struct.pack("=QQ", *area) for area in areas)


class FakeDevice(Device):
    """Answers as a kernel does, and keeps what it was asked.

    :param feature: flags of mainline's migration feature, None when there is none.
    :param silent: ioctls return 0 and write nothing, as old kvmgt does for those it does not know.
    """

    def __init__(
        self,
        *,
        flags: int = 0x22,
        num_regions: int = 10,
        replies: dict[int, bytes] | None = None,
        feature: int | None = None,
        silent: tuple[Request, ...] = (),
    ) -> None:
        super().__init__("fake", -1)
        self.flags = flags
        self.num_regions = num_regions
        self.replies = {STATE_INDEX: reply()} if replies is None else replies
        self.feature = feature
        self.silent = silent
        self.requests: list[Request] = []
        self.asked_regions: list[bytes] = []

    def call(self, request: Request, arg: CData | bytearray | int = 0) -> int:
        self.requests.append(request)
        answer: Any = arg
        if request in self.silent:
            return 0
        if request == uapi.DEVICE_GET_INFO:
            answer.flags, answer.num_regions, answer.num_irqs = self.flags, self.num_regions, 5
            return 0
        if request == uapi.DEVICE_GET_REGION_INFO:
            self.asked_regions.append(bytes(answer))
            return self._region_info(answer)
        if request == uapi.DEVICE_FEATURE and self.feature is not None:
            argsz, flags = struct.unpack_from("=II", answer)
            if flags & PROBE:
                raise DeviceError("no log", device=self.name, errno=errno.ENOTTY)
            assert (argsz, len(answer)) == (16, 16)
            assert flags in {0x10001, 0x10002}  # both GET: nothing is changed by detection
            struct.pack_into(*("=Q", answer, 8, self.feature) if flags == 0x10001 else ("=Ii", answer, 8, 2, -1))
            return 0
        raise DeviceError(f"{request.name} failed", device=self.name, errno=errno.ENOTTY)

    def _region_info(self, answer: bytearray) -> int:
        found = self.replies.get(struct.unpack_from("=I", answer, 8)[0])
        if found is None:
            raise DeviceError("no region", device=self.name, errno=errno.EINVAL)
        if len(answer) < len(found):
            # too short for the capabilities: the kernel says how many bytes it wants
            answer[:32] = struct.pack("=IIII", len(found), *struct.unpack_from("=II", found, 4), 0) + found[16:32]
        else:
            answer[: len(found)] = found
        return 0

    @property
    def asked_indexes(self) -> list[int]:
        return [struct.unpack_from("=I", asked, 8)[0] for asked in self.asked_regions]


HARMLESS: Final = {uapi.DEVICE_GET_INFO, uapi.DEVICE_GET_REGION_INFO, uapi.DEVICE_FEATURE}


def failing(device: FakeDevice, profile: RfcProfile = DEFAULT_PROFILE) -> list[str]:
    """Names of the checks that fail; detect() agrees with explain(), and neither sends a request of the RFC."""
    checks = explain(device, profile)
    failed = [check for check in checks if not check.ok]
    if [check.name for check in checks] == ["mainline-migration"]:
        protocol = detect(device, profile)
        assert isinstance(protocol, MainlineV2)
        assert protocol.flags == device.feature
    elif failed:
        with pytest.raises(UnsupportedError) as caught:
            detect(device, profile)
        assert caught.value.problem == f"cannot be migrated: {failed[0].name}: {failed[0].text}"
        assert caught.value.device == "fake"
        assert "vfio-mig info --open fake" in str(caught.value)
    else:
        protocol = detect(device, profile)
        assert isinstance(protocol, GvtRfc)
        assert protocol.profile is profile
        assert protocol.device is device
        assert protocol.state_size_max == profile.image_max - 1
    assert set(device.requests) <= HARMLESS
    assert not {profile.status_set.number, profile.get_dirty.number} & {one.number for one in device.requests}
    return [check.name for check in failed]


def test_a_device_of_the_rfc_passes_every_check() -> None:
    device = FakeDevice()
    assert [check.name for check in explain(device, DEFAULT_PROFILE)] == [
        *["pci", "migratable", "regions", "state-region", "no-region-type", "no-mainline-migration"]
    ]
    assert failing(device) == []


def test_another_trees_numbers_decide_when_they_are_given() -> None:
    device = FakeDevice(flags=0x42, num_regions=12, replies={11: reply(size=SIZE * 2)})
    assert failing(device, OTHER_PROFILE) == []
    assert failing(device) == ["migratable", "state-region"]
    assert failing(FakeDevice(), OTHER_PROFILE) == ["migratable", "regions", "state-region"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (FakeDevice(flags=0x20), "pci"),
        (FakeDevice(flags=0x02), "migratable"),
        (FakeDevice(flags=0x42), "migratable"),
        (FakeDevice(replies={}), "state-region"),
        (FakeDevice(replies={9: reply(size=SIZE - 1)}), "state-region"),
        (FakeDevice(replies={9: reply(size=SIZE + 4096)}), "state-region"),
        (FakeDevice(replies={9: reply(size=0)}), "state-region"),
        (FakeDevice(replies={9: reply(flags=1)}), "state-region"),
        (FakeDevice(replies={9: reply(flags=2)}), "state-region"),
        (FakeDevice(replies={9: reply(type_cap(7, 7))}), "no-region-type"),
        (FakeDevice(feature=2), "no-mainline-migration"),
        (FakeDevice(feature=1 << 63), "no-mainline-migration"),
    ],
)
def test_each_check_alone_forbids_it(device: FakeDevice, name: str) -> None:
    assert failing(device) == [name]


LARGE: Final = 0x1000000
OPREGION: Final = (0x80008086, 1)


def test_our_kvmgt_is_known_by_the_size_of_its_region_and_the_rfc_s_own_by_its() -> None:
    for size, expected in ((LARGE, KVMGT_PROFILE), (SIZE, DEFAULT_PROFILE)):
        device = FakeDevice(flags=0x23, num_regions=12, replies={9: reply(size=size)})
        protocol = detect(device, DEFAULT_PROFILE)
        assert isinstance(protocol, GvtRfc)
        assert protocol.profile is expected
        assert protocol.state_size_max == size - 1
        assert set(device.requests) <= HARMLESS
    assert [one.image_max for one in BUILT_IN] == [SIZE, LARGE]


def test_a_header_s_numbers_are_the_only_ones() -> None:
    given = DEFAULT_PROFILE._replace(source="vfio.h")
    assert failing(FakeDevice(replies={9: reply(size=LARGE)}), given) == ["state-region"]


# What each driver answers: flags, regions, their infos, mainline's migration flags.
OTHERS: Final = {
    "stock kvmgt 6.1": FakeDevice(flags=3, num_regions=11, replies={9: reply(type_cap(*OPREGION), flags=1, size=8192)}),
    "stock kvmgt 6.12": FakeDevice(
        flags=3, num_regions=11, replies={9: reply(type_cap(*OPREGION), flags=1, size=8192)}, feature=0
    ),
    "our kvmgt with v2": FakeDevice(
        flags=3, num_regions=11, replies={9: reply(type_cap(*OPREGION), flags=1, size=8192)}, feature=3
    ),
    "mtty 6.12": FakeDevice(flags=2, num_regions=9, replies={0: reply(size=8)}, feature=5),
    "mtty 6.1": FakeDevice(flags=2, num_regions=9, replies={0: reply(size=8)}),
    "vfio-pci": FakeDevice(flags=0x83, num_regions=9, replies={0: reply(flags=RWM, size=LARGE)}),
    "vfio-pci of an integrated GPU": FakeDevice(
        flags=0x83, num_regions=12, replies={9: reply(type_cap(*OPREGION), flags=1, size=8192)}
    ),
    "vfio-pci with a large region of its own": FakeDevice(
        flags=0x83, num_regions=10, replies={9: reply(type_cap(0x80000000 | 0x10DE, 1), size=LARGE)}
    ),
    "an s390 AP queue": FakeDevice(flags=0x20, num_regions=0, replies={}),
    "kvmgt of 2017": FakeDevice(flags=2, num_regions=9, silent=(uapi.DEVICE_FEATURE,)),
    "a driver that answers 0 to everything": FakeDevice(silent=tuple(HARMLESS)),
    "a driver that answers 0 to all but GET_INFO": FakeDevice(
        silent=(uapi.DEVICE_GET_REGION_INFO, uapi.DEVICE_FEATURE)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_driver_is_taken_for_one_of_the_rfc_or_asked_anything_that_could_mean_something(name: str) -> None:
    device = OTHERS[name]
    assert "gvt-rfc" not in spoken(device, DEFAULT_PROFILE)
    assert set(device.requests) <= HARMLESS


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (FakeDevice(flags=3, replies={9: reply(size=LARGE)}), "migratable"),
        (FakeDevice(flags=0x21, replies={9: reply(size=LARGE)}), "pci"),
        (FakeDevice(replies={9: reply(size=LARGE - 4096)}), "state-region"),
        (FakeDevice(replies={9: reply(size=LARGE, flags=1)}), "state-region"),
        (FakeDevice(replies={9: reply(type_cap(7, 7), size=LARGE)}), "no-region-type"),
    ],
)
def test_each_check_forbids_a_large_region_too(device: FakeDevice, name: str) -> None:
    assert [one.name for one in explain(device, DEFAULT_PROFILE) if not one.ok] == [name]


@pytest.mark.parametrize("feature", [1, 7])
def test_a_device_that_speaks_both_is_driven_by_mainline_s_protocol_unless_the_rfc_is_asked_for(feature: int) -> None:
    device = FakeDevice(feature=feature)
    assert failing(device) == []
    assert spoken(device, DEFAULT_PROFILE) == ["mainline-v2", "gvt-rfc"]
    assert isinstance(detect(device, DEFAULT_PROFILE), MainlineV2)
    assert isinstance(detect(device, DEFAULT_PROFILE, "mainline-v2"), MainlineV2)
    assert isinstance(detect(device, DEFAULT_PROFILE, "gvt-rfc"), GvtRfc)


def test_a_device_that_speaks_another_protocol_than_is_asked_for_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="it speaks gvt-rfc, not mainline-v2"):
        detect(FakeDevice(), DEFAULT_PROFILE, "mainline-v2")
    with pytest.raises(UnsupportedError, match="it speaks mainline-v2, not gvt-rfc"):
        detect(FakeDevice(feature=1, num_regions=9), DEFAULT_PROFILE, "gvt-rfc")
    with pytest.raises(UnsupportedError, match="cannot be migrated: mainline-migration"):
        detect(FakeDevice(num_regions=9), DEFAULT_PROFILE, "mainline-v2")


def test_too_few_regions_alone_forbid_it() -> None:
    assert failing(FakeDevice(num_regions=10), DEFAULT_PROFILE._replace(num_regions=11)) == ["regions"]


def test_a_region_that_the_device_does_not_count_is_not_asked_for() -> None:
    device = FakeDevice(num_regions=9)
    assert failing(device) == ["regions", "state-region"]
    assert device.asked_indexes == []


def test_a_broken_capability_chain_forbids_it() -> None:
    broken = bytearray(reply(type_cap(1, 1)))
    struct.pack_into("=I", broken, 36, 32)
    assert failing(FakeDevice(replies={9: bytes(broken)})) == ["state-region"]


@pytest.mark.parametrize(
    ("kind", "subtype", "words"),
    [
        (0x80008086, 4, "the January 2018 form of GVT-g's migration"),
        (1 << 30, 1, "the May 2018 form of GVT-g's migration"),
        (2, 1, "the February 2019 form of GVT-g's migration"),
        (3, 1, "mainline's migration protocol v1"),
        (0x80008086, 1, "an OpRegion"),
        (0x80008086, 2, "something this program does not know"),
        (0, 0, "something this program does not know"),
    ],
)
def test_a_sibling_of_the_rfc_is_known_by_its_region_type(kind: int, subtype: int, words: str) -> None:
    device = FakeDevice(replies={9: reply(type_cap(kind, subtype))})
    assert failing(device) == ["no-region-type"]
    with pytest.raises(UnsupportedError, match=words):
        detect(device, DEFAULT_PROFILE)


def test_old_kvmgt_that_answers_0_to_unknown_requests_is_not_believed() -> None:
    device = FakeDevice(flags=0x02, num_regions=9, silent=(uapi.DEVICE_FEATURE,))
    assert failing(device) == ["migratable", "regions", "state-region"]
    assert mainline_flags(device) == 0


def test_a_device_that_answers_0_to_everything_and_writes_nothing_has_nothing() -> None:
    assert failing(FakeDevice(silent=tuple(HARMLESS))) == ["pci", "migratable", "regions", "state-region"]


def test_a_region_question_that_is_answered_with_nothing_is_no_state_region() -> None:
    assert failing(FakeDevice(silent=(uapi.DEVICE_GET_REGION_INFO,))) == ["state-region"]


def test_a_device_that_is_no_pci_device_means_something_else_by_the_flag() -> None:
    # bit 5 is VFIO_DEVICE_FLAGS_AP upstream
    device = FakeDevice(flags=0x20, num_regions=0, replies={})
    assert failing(device) == ["pci", "regions", "state-region"]


@pytest.mark.parametrize("flags", [0, 1, 0xFFFFFFFFFFFFFFFF])
def test_the_flags_of_mainlines_migration_are_returned(flags: int) -> None:
    assert mainline_flags(FakeDevice(feature=flags)) == flags


@pytest.mark.parametrize(
    ("caps", "expected"),
    [
        ([], (None, None, (), ())),
        ([type_cap(5, 6)], (5, 6, (), (TYPE,))),
        ([sparse_cap((0, 4096), (8192, 4096))], (None, None, ((0, 4096), (8192, 4096)), (SPARSE,))),
        ([sparse_cap(), type_cap(1, 0)], (1, 0, (), (SPARSE, TYPE))),
        ([(77, b""), type_cap(1, 2), (78, b"12345678")], (1, 2, (), (77, TYPE, 78))),
        ([sparse_cap((1, 2)), sparse_cap((3, 4))], (None, None, ((1, 2), (3, 4)), (SPARSE, SPARSE))),
        ([sparse_cap((1, 2), count=1 << 31)], (None, None, ((1, 2),), (SPARSE,))),
        ([sparse_cap((1, 2), (3, 4), count=1)], (None, None, ((1, 2),), (SPARSE,))),
        ([(TYPE, b"1234")], (None, None, (), (TYPE,))),
        ([(SPARSE, b"1234")], (None, None, (), (SPARSE,))),
    ],
)
def test_capabilities_are_decoded(caps: list[tuple[int, bytes]], expected: tuple[Any, ...]) -> None:
    region = FakeDevice(replies={3: reply(*caps, flags=RWM, size=123, offset=3 << 40)}).region(3)
    assert region[:4] == (3, RWM | (CAPS if caps else 0), 123, 3 << 40)
    assert region[4:] == expected


@pytest.mark.parametrize(
    ("kind", "subtype", "purpose"),
    [(0x80008086, 1, "OpRegion"), (1, 1, "EDID"), (1, 2, ""), (0x80008086, 9, ""), (3, 1, "")],
)
def test_regions_of_known_types_have_a_name(kind: int, subtype: int, purpose: str) -> None:
    assert FakeDevice(replies={9: reply(type_cap(kind, subtype))}).region(9).purpose == purpose
    assert FakeDevice().region(9).purpose == ""


@pytest.mark.parametrize(("kind", "is_named"), [("i915-GVTg_V5_4", True), ("gvt_sample-GVTg_V4_8", False)])
def test_a_gvt_g_without_migration_is_told_as_such(kind: str, is_named: bool) -> None:
    stock = FakeDevice(flags=3, num_regions=11, replies={9: reply(type_cap(0x80008086, 1))})
    found = HostDevice("fake", "", "mdev", kind, "0000:00:02.0", "intel_vgpu_mdev", 7)
    with pytest.raises(UnsupportedError) as caught:
        session._detect(found, stock, DEFAULT_PROFILE, "auto")
    text = str(caught.value)
    assert ("a GVT-g vGPU of a driver without migration" in text) is is_named
    assert ("scripts/kvmgt builds" in text) is is_named
    assert "cannot be migrated: migratable" in text
    assert caught.value.exit_code == 4


def test_a_gvt_g_with_another_migration_than_was_asked_for_is_not_told_to_have_none() -> None:
    found = HostDevice("fake", "", "mdev", "i915-GVTg_V5_4", "0000:00:02.0", "intel_vgpu_mdev", 7)
    with pytest.raises(UnsupportedError, match=r"^fake: it speaks gvt-rfc, not mainline-v2$"):
        session._detect(found, FakeDevice(), DEFAULT_PROFILE, "mainline-v2")


def test_capabilities_are_asked_for_with_the_size_that_the_kernel_wants() -> None:
    device = FakeDevice(replies={9: reply(type_cap(1, 1))})
    device.region(9)
    assert [struct.unpack_from("=I", asked)[0] for asked in device.asked_regions] == [32, 48]
    # all but argsz and index is zero each time
    assert [asked[4:8] + asked[12:] for asked in device.asked_regions] == [bytes(24), bytes(40)]


def test_a_chain_that_the_flags_do_not_announce_is_not_followed() -> None:
    data = bytearray(reply(type_cap(1, 1)))
    struct.pack_into("=I", data, 4, RW)
    region = FakeDevice(replies={9: bytes(data)}).region(9)
    assert (region.type, region.capability_ids) == (None, ())


@pytest.mark.parametrize(
    ("first", "following", "words"),
    [
        (31, 0, "broken capability chain at 0x1f"),
        (1, 0, "broken capability chain at 0x1"),
        (41, 0, "broken capability chain at 0x29"),
        (48, 0, "broken capability chain at 0x30"),
        (0xFFFFFFFF, 0, "broken capability chain at 0xffffffff"),
        (32, 32, "capability chain turns back at 0x20"),
        (32, 31, "capability chain turns back at 0x20"),
        (32, 4, "capability chain turns back at 0x20"),
        (32, 41, "broken capability chain at 0x29"),
        (32, 0xFFFFFFFF, "broken capability chain at 0xffffffff"),
    ],
)
def test_a_chain_that_loops_or_leaves_the_answer_is_refused(first: int, following: int, words: str) -> None:
    data = bytearray(reply((77, b"12345678")))
    struct.pack_into("=I", data, 12, first)
    struct.pack_into("=I", data, 36, following)
    with pytest.raises(DeviceError, match=f"^fake: region 9: {words}$"):
        FakeDevice(replies={9: bytes(data)}).region(9)


def test_a_chain_may_have_64_capabilities_and_no_more() -> None:
    region = FakeDevice(replies={9: reply(*[(77, b"")] * CAPS_MAX)}).region(9)
    assert len(region.capability_ids) == 64
    with pytest.raises(DeviceError, match="broken capability chain"):
        FakeDevice(replies={9: reply(*[(77, b"")] * (CAPS_MAX + 1))}).region(9)


def test_an_answer_may_have_64_kib_and_no_more() -> None:
    longest = reply((77, bytes(REPLY_MAX - 40)))
    assert FakeDevice(replies={9: longest}).region(9).capability_ids == (77,)
    device = FakeDevice(replies={9: longest + b"x"})
    device.replies[9] = struct.pack("=I", REPLY_MAX + 1) + device.replies[9][4:]
    with pytest.raises(DeviceError, match="65537 bytes of capabilities"):
        device.region(9)
    assert len(device.asked_regions) == 1


@given(st.binary(min_size=32, max_size=120), st.booleans())
def test_any_answer_is_a_region_or_a_device_error(data: bytes, announced: bool) -> None:
    patched = bytearray(data)
    struct.pack_into("=I", patched, 0, len(data))
    if announced:
        struct.pack_into("=IIII", patched, 0, len(data), CAPS | RW, 0, 32 + data[12] % 64)
    try:
        region = FakeDevice(replies={9: bytes(patched)}).region(9)
    except DeviceError:
        return
    assert region.number == 9
    assert len(region.sparse_areas) * 16 <= len(data)


def test_regions_that_the_kernel_refuses_are_left_out() -> None:
    device = FakeDevice(num_regions=6, replies={0: reply(), 4: reply(), 5: reply(), 7: reply()})
    assert [region.number for region in device.regions()] == [0, 4, 5]
    assert device.asked_indexes == list(range(6))


def test_a_device_that_counts_absurdly_many_regions_is_asked_for_256() -> None:
    device = FakeDevice(num_regions=0xFFFFFFFF, replies={})
    assert device.regions() == []
    assert len(device.asked_regions) == 256


@pytest.mark.parametrize(
    ("flags", "text"), [(0, "---"), (1, "r--"), (2, "-w-"), (4, "--m"), (7, "rwm"), (3 | CAPS, "rw-")]
)
def test_access_is_told_in_three_letters(flags: int, text: str) -> None:
    assert Region(0, flags, 0, 0, None, None, (), ()).access == text


def region_at(offset: int, size: int = 64) -> Region:
    return Region(2, RW, size, offset, None, None, (), ())


def test_a_region_is_read_and_written_at_its_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(range(200)))
    with Device("d", os.open(path, os.O_RDWR)) as device:
        assert device.pread(region_at(100), 5, 10) == bytes(range(105, 115))
        filled = bytearray(10)
        device.pread_into(region_at(100), 5, filled)
        assert filled == bytes(range(105, 115))
        device.pwrite(region_at(100), 5, memoryview(b"abc"))
    assert path.read_bytes() == bytes(range(105)) + b"abc" + bytes(range(108, 200))


def test_short_reads_and_refusals_are_device_errors(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(10))
    with Device("d", os.open(path, os.O_RDONLY)) as device:
        with pytest.raises(DeviceError, match=r"^d: region 2: 6 bytes read instead of 7$"):
            device.pread(region_at(4), 0, 7)
        with pytest.raises(DeviceError, match=r"^d: region 2: 6 bytes read instead of 7$"):
            device.pread_into(region_at(4), 0, bytearray(7))
        with pytest.raises(DeviceError, match=r"^d: writing 1 bytes at 0x3 of region 2 failed: EBADF") as caught:
            device.pwrite(region_at(4), 3, b"x")
    assert caught.value.errno == errno.EBADF


def test_an_ioctl_that_fails_names_the_device() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with (
        Device("d", reader) as device,
        pytest.raises(DeviceError, match=r"^d: VFIO_DEVICE_RESET failed: ENOT") as caught,
    ):
        device.reset()
    assert caught.value.errno == errno.ENOTTY


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_closing_closes_all_that_came_with_the_device_and_only_once() -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    device = Device("d", fds[0], owned=fds[1:])
    assert device.fileno() == fds[0]
    device.close()
    assert not any(map(is_open, fds))
    again = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    device.close()
    assert all(map(is_open, again))
    for fd in again:
        os.close(fd)
    with pytest.raises(ValueError, match="device d is closed"):
        device.fileno()


class RfcDevice(Device):
    """Has a state region, and takes the RFC's requests."""

    def __init__(self, state: bytes = b"", *, result: int = 0, bits: bytes = b"") -> None:
        super().__init__("vgpu", -1)
        self.state = state
        self.result = result
        self.bits = bits
        self.refusal: DeviceError | None = None
        self.reads: list[tuple[int, int, int]] = []
        self.writes: list[tuple[int, int, bytes]] = []
        self.calls: list[tuple[Request, bytes]] = []

    def pread_into(self, region: Region, offset: int, buffer: bytearray) -> None:
        self.reads.append((region.number, offset, len(buffer)))
        if self.refusal:
            raise self.refusal
        buffer[: len(self.state)] = self.state

    def pwrite(self, region: Region, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.writes.append((region.number, offset, bytes(data)))

    def call(self, request: Request, arg: CData | bytearray | int = 0) -> int:
        if isinstance(arg, int):
            self.calls.append((request, b""))
            return self.result
        sent = arg if isinstance(arg, bytearray) else uapi.ffi.buffer(arg)
        self.calls.append((request, bytes(sent)))
        sent[16 : 16 + len(self.bits)] = self.bits
        return self.result


SMALL: Final = 1024
REGION: Final = Region(STATE_INDEX, RW, SMALL, 9 << 40, None, None, (), ())


def rfc(device: Device, profile: RfcProfile = DEFAULT_PROFILE) -> GvtRfc:
    return GvtRfc(device, profile, REGION)


def image(data_size: int, *, kind: int = 1, size: int = 528) -> bytes:
    return struct.pack("<IIii", kind, size, 0, data_size) + bytes(index % 255 + 1 for index in range(SMALL - 16))


@pytest.mark.parametrize("data_size", [536, 537, SMALL - 1])
def test_the_state_is_one_read_of_the_region_cut_at_its_data_size(data_size: int) -> None:
    device = RfcDevice(image(data_size))
    state = rfc(device).read_state()
    assert device.reads == [(STATE_INDEX, 0, SMALL)]
    assert bytes(state) == image(data_size)[:data_size]


@pytest.mark.parametrize(
    "state",
    [
        b"",
        *[image(data_size) for data_size in (0, -1, 535, SMALL, 0x7FFFFFFF, -0x80000000)],
        *[image(600, kind=kind) for kind in (0, 2, 0x01000000)],
        *[image(600, size=size) for size in (0, 527, 529, 0xFFFFFFFF)],
    ],
)
def test_a_hostile_head_is_no_state(state: bytes) -> None:
    with pytest.raises(DeviceError, match=r"^vgpu: the state region holds no image: record type"):
        rfc(RfcDevice(state)).read_state()


@pytest.mark.parametrize(("number", "hinted"), [(errno.EFAULT, True), (0, False)])
def test_a_refused_read_tells_of_the_type_that_does_not_fit(number: int, hinted: bool) -> None:
    device = RfcDevice()
    device.refusal = DeviceError("no", device="vgpu", errno=number)
    with pytest.raises(DeviceError) as caught:
        rfc(device).read_state()
    assert caught.value is device.refusal
    assert ("type _1 does not fit" in str(caught.value)) is hinted


@pytest.mark.parametrize("length", [0, 1, 600, SMALL - 1])
def test_the_state_is_loaded_with_one_write_of_the_region_with_zeros_behind_it(length: int) -> None:
    device = RfcDevice()
    rfc(device).write_state(memoryview(b"\xff" * length))
    assert device.writes == [(STATE_INDEX, 0, b"\xff" * length + bytes(SMALL - length))]


def test_what_lies_behind_a_state_in_a_dump_of_the_region_is_not_written() -> None:
    device = RfcDevice()
    state = struct.pack("<IIii", 1, 528, 0, 600) + b"\x11" * 584
    rfc(device).write_state(memoryview(state + b"\x22" * 50))
    assert device.writes == [(STATE_INDEX, 0, state + bytes(SMALL - 600))]


def test_a_staged_state_is_laid_out_before_the_stop_and_written_when_it_is_asked_for() -> None:
    device = RfcDevice()
    state = bytearray(b"\x11" * 600)
    load = rfc(device).stage([memoryview(state)[:100], bytes(state[100:])])
    assert (device.calls, device.writes) == ([], [])
    state[:] = bytes(600)
    load()
    assert device.writes == [(STATE_INDEX, 0, b"\x11" * 600 + bytes(SMALL - 600))]


@pytest.mark.parametrize("sizes", [[SMALL], [1, SMALL - 1], [SMALL - 1, 1]])
def test_chunks_as_long_as_the_region_together_are_not_staged(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="1024 bytes do not fit into 1024"):
        rfc(RfcDevice()).stage([bytes(size) for size in sizes])


def test_a_state_as_long_as_the_region_is_not_written() -> None:
    device = RfcDevice()
    assert rfc(device).state_size_max == SMALL - 1
    with pytest.raises(ValueError, match="1024 bytes do not fit into 1024"):
        rfc(device).write_state(memoryview(bytes(SMALL)))
    assert device.writes == []


@pytest.mark.parametrize("profile", [DEFAULT_PROFILE, OTHER_PROFILE], ids=["shipped", "other"])
def test_stop_and_start_are_one_status_request_each(profile: RfcProfile) -> None:
    device = RfcDevice()
    protocol = rfc(device, profile)
    protocol.stop()
    protocol.start()
    assert device.calls == [
        (profile.status_set, struct.pack("=II", 8, profile.stop)),
        (profile.status_set, struct.pack("=II", 8, profile.start)),
    ]


@pytest.mark.parametrize("profile", [DEFAULT_PROFILE, OTHER_PROFILE], ids=["shipped", "other"])
@pytest.mark.parametrize(
    ("start_page", "nr_pages", "words"),
    [(0, 1, 2), (3, 63, 2), (1 << 20, 64, 2), (5, 65, 3), (7, 128, 3), (1 << 40, DIRTY_PAGES_MAX, (1 << 14) + 1)],
)
def test_a_dirty_request_has_room_for_one_word_more(
    profile: RfcProfile, start_page: int, nr_pages: int, words: int
) -> None:
    device = RfcDevice()
    rfc(device, profile).dirty(start_page, nr_pages)
    assert device.calls == [(profile.get_dirty, struct.pack("=QQ", start_page * 4096, nr_pages) + bytes(words * 8))]


@pytest.mark.parametrize("nr_pages", [1, 7, 8, 9, 64, 100])
def test_the_dirty_bitmap_is_what_the_kernel_wrote_behind_the_request(nr_pages: int) -> None:
    bits = bytes(range(1, 25))
    got = rfc(RfcDevice(bits=bits)).dirty(0, nr_pages)
    assert bytes(got) == bits[: -(-nr_pages // 8)]


@pytest.mark.parametrize("nr_pages", [0, -1, DIRTY_PAGES_MAX + 1])
def test_a_dirty_request_of_no_or_too_many_pages_is_not_sent(nr_pages: int) -> None:
    device = RfcDevice()
    with pytest.raises(UsageError, match=f"{nr_pages} pages"):
        rfc(device).dirty(0, nr_pages)
    assert device.calls == []


def test_a_bitmap_has_nothing_of_the_one_before() -> None:
    device = RfcDevice(bits=b"\xff" * 24)
    protocol = rfc(device)
    protocol.dirty(0, 100)
    device.bits = b"\x01"  # a kernel that writes less than it should
    assert bytes(protocol.dirty(0, 100)) == b"\x01" + bytes(12)
    assert bytes(protocol.dirty(0, 64)) == b"\x01" + bytes(7)


def test_a_dirty_request_that_returns_a_file_closes_it() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(DeviceError, match="returned a file: not a device of the RFC"):
        rfc(RfcDevice(result=fd)).dirty(0, 1)
    assert not is_open(fd)


def test_a_reset_is_vfios_own_request() -> None:
    device = RfcDevice()
    rfc(device).reset()
    assert device.calls == [(uapi.DEVICE_RESET, b"")]


# A protocol more


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.MODULES, made_up_protocol.NAME, made_up_protocol.__name__)


@pytest.mark.usefixtures("made_up")
def test_a_new_protocol_is_one_module_and_one_line_in_the_registry() -> None:
    device = FakeDevice(flags=made_up_protocol.FLAG, num_regions=9)
    found = HostDevice("fake", "", "mdev", "t", "0000:00:02.0", "d", 7)
    protocol = detect(device, DEFAULT_PROFILE)
    assert isinstance(protocol, made_up_protocol.MadeUp)
    assert (spoken(device, DEFAULT_PROFILE), explain(device, DEFAULT_PROFILE)[0].name) == (["made-up"], "made-up")
    with pytest.raises(UnsupportedError, match="it speaks gvt-rfc, not made-up"):
        detect(FakeDevice(), DEFAULT_PROFILE, "made-up")
    # what jobs ask of its states
    one = session.Session(found, device, protocol)
    good = [finding[:3] for finding in check.state_checks(one, protocol.content)]
    assert good == [
        ("state", "ok", "16 made-up bytes"),
        ("made-up-name", "ok", "fake"),
        (
            "guest-memory",
            "note",
            "it has the state's made-up table, and no page comes along: the target must have the rest",
        ),
        ("state-content", "note", "it is made up"),
    ]
    assert [finding.text for finding in check.state_checks(one, b"other")] == ["not made up at 0x0"]
    with pytest.raises(UsageError, match=r"choose one of auto, mainline-v2, .*made-up"):
        session.open_session("fake", session.Settings(abi="another"))
