# SPDX-License-Identifier: MIT
import io
import os

import pytest

from tools.pair.__main__ import BACK, FORWARD, HOSTS, carry

DATA = os.urandom(200_000)


class Target(io.BytesIO):
    """Keeps what it was given when it is closed."""

    got = b""

    def close(self) -> None:
        self.got = self.getvalue()
        super().close()


@pytest.mark.parametrize("cut", [None, 0, 1, 65_536, 65_537, 199_999, 200_000, 300_000])
def test_a_stream_arrives_as_far_as_it_is_not_cut_and_ends(cut: int | None) -> None:
    target = Target()
    stream = carry(io.BytesIO(DATA), target, cut)
    assert target.got == DATA[:cut]
    assert target.closed
    assert stream.size == len(DATA)


def test_the_source_is_read_to_its_end_after_the_target_has_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    source = io.BytesIO(DATA)
    assert carry(source, os.fdopen(write, "wb"), None).size == len(DATA)
    assert source.read() == b""


def test_the_two_hosts_differ_in_kernel_and_pool() -> None:
    assert FORWARD == BACK[::-1] == tuple(HOSTS)
    assert len(set(HOSTS.values())) == 2
