"""mmap() of a region on a strict mount, as the gate has it: all of the region, where it may lie."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import GATE
from tests.v3.actors import Caught
from tests.v3.conftest import ALIGNMENT, PAGE, create_mapping, unmap

NONE, READ, WRITE, EXEC = 0, 1, 2, 4
RW = READ | WRITE
SHARED, PRIVATE, FIXED, NOREPLACE, POPULATE = 1, 2, 0x10, 0x100000, 0x8000
TIB = 2 * ALIGNMENT
gate = GATE or "ptrace"


@pytest.fixture
def strict(mounts):
    return mounts(f"strict=v3,gate={gate}")


@pytest.fixture
def region(strict, fresh):
    """A path and an open descriptor; two pages in it, one of them only readable."""
    fd = fresh()
    assert create_mapping(fd, 0, PAGE) == ""
    assert create_mapping(fd, PAGE, PAGE, READ) == ""
    return strict.path / "region", fd


def status(pid, key):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition(f"{key}:")[2].split()[0])


def mmap(actor, path, address=0, length=ALIGNMENT, prot=RW, flags=SHARED, offset=0, mode=os.O_RDWR):
    return actor.map(path, length, address, prot=prot, flags=flags, offset=offset, mode=mode)


def test_without_an_address_an_aligned_one_is_found(region, actor):
    path, _ = region
    one, other = mmap(actor, path), mmap(actor, path)
    assert one != other
    for address in (one, other):
        assert address % ALIGNMENT == 0
        assert actor.call("poke", address + 7, 0x5A) == 0
        assert actor.call("peek", one + 7) == actor.call("peek", other + 7) == 0x5A
        assert actor.call("poke", address + PAGE, 1) == Caught(signal.SIGSEGV, address + PAGE)
        hole = address + ALIGNMENT - 1
        assert actor.call("peek", hole) == Caught(signal.SIGSEGV, hole)
    assert actor.call("munmap", one, ALIGNMENT) == 0
    assert actor.call("peek", other + 7) == 0x5A


def test_a_hint_is_rounded_up_and_taken_if_it_is_free(region, actor):
    path, _ = region
    assert mmap(actor, path, TIB - PAGE) == TIB
    assert mmap(actor, path, TIB) not in {TIB, 0}, "it is taken"
    assert mmap(actor, path, 3 * ALIGNMENT) == 3 * ALIGNMENT
    assert mmap(actor, path, (1 << 47) - PAGE) % ALIGNMENT == 0, "beyond the end"


def test_a_fixed_address_is_aligned_or_refused(region, actor):
    path, _ = region
    assert mmap(actor, path, TIB, flags=SHARED | FIXED) == TIB
    for off in (PAGE, 2 << 20, 1 << 30, 1 << 38):
        assert mmap(actor, path, 4 * TIB + off, flags=SHARED | FIXED) == "EINVAL"
    assert mmap(actor, path, TIB, flags=SHARED | NOREPLACE) == "EEXIST"
    assert mmap(actor, path, TIB, flags=SHARED | FIXED) == TIB, "over itself"
    assert actor.call("poke", TIB, 1) == 0
    assert next(start for start, _, _ in actor.maps(path)) == TIB


@pytest.mark.parametrize("length", [PAGE, 2 << 20, ALIGNMENT - PAGE, ALIGNMENT + PAGE, TIB])
def test_a_part_of_a_region_is_not_mapped(region, actor, length):
    path, _ = region
    assert mmap(actor, path, length=length) == "EINVAL"
    assert list(actor.maps(path)) == []
    assert mmap(actor, path, length=ALIGNMENT - 1) % ALIGNMENT == 0, "it is rounded up to pages"


def test_a_region_without_a_size_is_not_mapped(strict, fresh, actor):
    fresh(None)
    assert mmap(actor, strict.path / "region") == "EINVAL"


def test_a_private_mapping_is_refused(region, actor):
    path, _ = region
    assert mmap(actor, path, flags=PRIVATE) == "EINVAL"
    assert mmap(actor, path, TIB, flags=PRIVATE | FIXED) == "EINVAL"


@pytest.mark.skipif(gate == "lsm", reason="that gate cannot have the call made in another way")
def test_the_offset_and_populate_are_passed_over(region, actor):
    path, _ = region
    address = mmap(actor, path, offset=7 * PAGE, flags=SHARED | POPULATE)
    assert address % ALIGNMENT == 0
    assert actor.call("poke", address, 1) == 0
    assert path.stat().st_blocks == 8, "one page, and that by the program"


@pytest.mark.skipif(gate != "lsm", reason="the other gate has the call made in another way")
def test_what_cannot_be_passed_over_is_refused(region, actor):
    path, _ = region
    assert mmap(actor, path, offset=7 * PAGE) == "EINVAL"
    assert mmap(actor, path, flags=SHARED | POPULATE) == "ENOMEM"
    assert path.stat().st_blocks == 0


@pytest.mark.parametrize("prot", [NONE, READ, RW])
def test_what_a_mapping_may_do_is_the_tables_affair_whatever_it_was_made_for(region, actor, prot):
    path, fd = region
    address = mmap(actor, path, prot=prot)
    assert actor.call("poke", address, 0x77) == 0
    assert actor.call("peek", address) == 0x77
    assert actor.call("poke", address + PAGE, 1) == Caught(signal.SIGSEGV, address + PAGE)
    assert create_mapping(fd, PAGE, PAGE) == ""
    assert actor.call("poke", address + PAGE, 1) == 0
    child_sees = [line[2] for line in actor.maps(path)]
    assert child_sees == ["rw-s", "---s"]


def test_who_may_only_read_reads_what_others_write(region, actor):
    path, _ = region
    assert mmap(actor, path, prot=RW, mode=os.O_RDONLY) == "EACCES"
    address = mmap(actor, path, prot=READ, mode=os.O_RDONLY)
    assert actor.call("peek", address) == 0
    assert actor.call("poke", address, 1) == Caught(signal.SIGSEGV, address)


def test_changes_reach_those_who_map_it(region, actor, tmp_path):
    path, fd = region
    address = mmap(actor, path, TIB)
    child = actor.fork(tmp_path)
    assert create_mapping(fd, 1 << 38, 3 * PAGE) == ""
    for one in (actor, child):
        assert one.call("poke", address + (1 << 38) + PAGE, 9) == 0
    assert unmap(fd, 1 << 38, PAGE) == ""
    assert unmap(fd, 0, PAGE) == ""
    for one in (actor, child):
        for offset in (0, 1 << 38):
            at = address + offset
            assert one.call("peek", at) == Caught(signal.SIGSEGV, at)
        assert one.call("peek", address + (1 << 38) + PAGE) == 9


def test_a_window_costs_next_to_nothing(strict, fresh, actor):
    fd = fresh(16 * ALIGNMENT)
    path = strict.path / "region"
    tables = status(actor.pid, "VmPTE")
    address = mmap(actor, path, length=16 * ALIGNMENT)
    assert address % ALIGNMENT == 0
    assert create_mapping(fd, 3 * ALIGNMENT, 4 * PAGE) == ""
    assert unmap(fd, 0, 16 * ALIGNMENT) == ""
    assert status(actor.pid, "VmPTE") - tables <= 16
    assert os.fstat(fd).st_blocks == 0


def test_threads_that_map_at_once_all_find_a_place(region, actor):
    path, _ = region
    for _ in range(3):
        assert actor.call("storm", path, ALIGNMENT, 16) == 0
    starts = [start for start, _, _ in actor.maps(path) if not start % ALIGNMENT]
    assert len(starts) == 48


def test_who_comes_again_at_once_is_attended_to_again(region, actor):
    path, _ = region
    times = 50 if gate == "lsm" else 1000  # in an emulated machine each takes a hundredfold
    assert actor.call("often", path, ALIGNMENT, times) == 0


def test_no_place_is_enomem(region, actor):
    path, _ = region
    found = 0
    while isinstance(mmap(actor, path), int):
        found += 1
        assert found < 256
    assert found >= 200, "what the address space has but for a few"
    assert mmap(actor, path) == "ENOMEM"


def test_mprotect_is_refused_where_the_gate_can_tell(region, actor):
    path, _ = region
    address = mmap(actor, path)
    refused = actor.call("mprotect", address, ALIGNMENT, READ)
    assert refused == ("EINVAL" if gate == "lsm" else 0)
