"""Unmodified programs in each language obey the table: what they may not do is a SIGSEGV, or EFAULT."""

from __future__ import annotations

import errno
import os

import pytest

from tests.enforcement.clients import FATAL, LANGUAGES, PAGE


@pytest.fixture(params=LANGUAGES)
def language(request) -> str:
    return request.param


def test_a_program_obeys(share, language, tmp_path):
    region = share.region()
    client = share.mapped(region, language)
    assert client.ranges() == [(0, 4, "rw-")]
    other = share.mapped(region, "c")
    if language == "java":
        assert client.ask("threads", 3 * PAGE) == "result 0"

    def content(offset):
        return os.pread(region.fd, 1, offset)[0]

    def fault_of(*words):
        """The access fails, at the right address; if the program ends by that, start another."""
        nonlocal client
        where = client.address(words[1])
        assert client.fault_of(*words) == where
        if language in FATAL:
            client = share.mapped(region, language)

    full, empty = tmp_path / "full", tmp_path / "empty"
    full.write_bytes(b"\x55")
    empty.touch()
    client.store(5, 7)
    assert (client.load(5), content(5), other.load(5)) == (7, 7, 7)

    region.protect(0, PAGE, "r--")
    if share.tells:
        assert client.ranges() == other.ranges() == [(0, 1, "r--"), (1, 3, "rw-")]
    assert client.load(5) == 7
    assert client.read_into(5, full) == -errno.EFAULT
    assert client.write_from(5, empty) == 1
    assert empty.read_bytes() == b"\7"
    fault_of("store", 5, 9)
    assert (client.load(5), content(5)) == (7, 7)
    client.store(PAGE, 1)

    region.protect(0, PAGE, "---")
    assert client.ranges() == other.ranges() == [(0, 1, "---"), (1, 3, "rw-")]
    assert client.write_from(5, empty) == -errno.EFAULT
    fault_of("load", 5)

    region.protect(0, PAGE, "rw-")
    assert client.ranges() == other.ranges() == [(0, 4, "rw-")]
    client.store(6, 8)
    assert (client.load(5), client.load(6), content(6)) == (7, 8, 8)

    region.unmap(PAGE, PAGE)
    assert client.ranges() == other.ranges() == [(0, 1, "rw-"), (1, 1, "---"), (2, 2, "rw-")]
    assert client.read_into(PAGE, full) == -errno.EFAULT
    assert client.write_from(PAGE, empty) == -errno.EFAULT
    fault_of("load", PAGE + 9)

    region.map(PAGE, PAGE, "rw-")
    assert client.ranges() == other.ranges() == [(0, 4, "rw-")]
    assert client.load(PAGE) == 0
    client.store(PAGE, 3)
    assert (other.load(PAGE), content(PAGE)) == (3, 3)
    assert client.read_into(PAGE, full) == 1
    assert other.load(PAGE) == 0x55
    assert set(share.states(region).values()) <= {"replica", "fault"}


def test_the_gate_shows_a_newcomer_what_is_the_rule(share, language):
    region = share.region()
    region.protect(0, PAGE, "r--")
    region.unmap(PAGE, PAGE)
    region.protect(2 * PAGE, PAGE, "---")
    client = share.mapped(region, language)
    if language == "java":  # it does a lot between open() and mmap(): the gate may have let it go
        region.protect(3 * PAGE, PAGE, "rw-")
    ranges = client.ranges()
    assert ranges[-2:] == [(1, 2, "---"), (3, 1, "rw-")]
    if share.tells:
        assert ranges[0] == (0, 1, "r--")
    assert client.load(0) == 0
    client.store(3 * PAGE, 1)
    where = client.address(0)
    assert client.fault_of("store", 0, 1) == where
    assert os.pread(region.fd, 1, 0) == b"\0"
