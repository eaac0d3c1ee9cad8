"""A file laid over a plain file of an automap mount, in programs that asked for different rights."""

from __future__ import annotations

import mmap
import os

import pytest

from msharefs.client import Region
from tests.automap.test_enforced import PAGE, automap, mapper, path  # noqa: F401 - fixtures

A, B = str(ord("a")), str(ord("b"))


def test_each_sees_it_with_the_rights_that_it_asked_for(path, mapper, make):  # noqa: F811
    fd = make()
    writer, reader = mapper(path), mapper(path, os.O_RDONLY, mmap.PROT_READ)
    modest = mapper(path, os.O_RDWR, mmap.PROT_READ)
    everybody = (writer, reader, modest)
    with Region.open(path) as region:
        region.map(2 * PAGE, 2 * PAGE, "rw-", fd=fd)
        for one in everybody:
            assert one.told(f"load {2 * PAGE}") == A
            assert one.told("load 0") == str(ord("x"))
        assert writer.told(f"7 {3 * PAGE}") == "stored"
        assert os.pread(fd, 1, PAGE) == b"\x07"
        assert reader.told(f"load {3 * PAGE}") == modest.told(f"load {3 * PAGE}") == "7"
        late = mapper(path)
        assert late.told(f"load {2 * PAGE}") == A
        region.map(2 * PAGE, PAGE, "rw-")
        for one in (*everybody, late):
            assert one.told(f"load {2 * PAGE}") == "0"
            assert one.told(f"load {3 * PAGE}") == "7"
        assert writer.told(f"5 {2 * PAGE}") == "stored"
        assert late.told(f"load {2 * PAGE}") == "5"
    assert reader.told(f"1 {3 * PAGE}") == "SIGSEGV"
    assert modest.told(f"1 {2 * PAGE}") == "SIGSEGV"


def test_a_private_copy_of_it_is_refused(start_mount, make):
    place = start_mount("automap,private=allow").path / "f"
    place.write_bytes(b"x" * 16 * PAGE)
    with Region.open(place) as region:
        with mmap.mmap(region.fd, PAGE, flags=mmap.MAP_PRIVATE) as copy:
            assert copy[0] == ord("x")
        region.map(2 * PAGE, 2 * PAGE, "rw-", fd=make())
        again = os.open(place, os.O_RDWR)
        with pytest.raises(OSError, match="Invalid"):
            mmap.mmap(again, PAGE, flags=mmap.MAP_PRIVATE)
        os.close(again)
