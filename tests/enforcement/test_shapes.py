"""How a program may map a region: itself the caller, twice, in parts, several regions; moved, unmapped."""

from __future__ import annotations

import errno
import os

import pytest

from msharefs.client import Region
from tests.enforcement.clients import PAGE

RW = 3
SHARED = 1


# -- the caller maps the region


@pytest.mark.parametrize("threads", [1, 2])
def test_the_caller_obeys_its_own_change(share, threads):
    region = share.region()
    client = share.mapped(region)
    other = share.mapped(region)
    if threads == 2:
        client.ask("thread")
    for _ in range(3):
        assert client.call("protect", 0, PAGE, 1) == 0
        for one in (client, other):
            if share.tells:
                assert one.ranges() == [(0, 1, "r--"), (1, 3, "rw-")]
            assert one.fault_of("store", 7, 1) == one.address(7)
        assert client.call("remove", PAGE, PAGE) == 0
        for one in (client, other):
            assert one.fault_of("load", PAGE) == one.address(PAGE)
        assert client.call("create", PAGE, PAGE, RW) == 0
        assert client.call("protect", 0, PAGE, RW) == 0
        for one in (client, other):
            assert one.ranges() == [(0, 4, "rw-")]
            one.store(7, 1)
            one.store(PAGE, 1)
        os.pwrite(region.fd, b"\0", 7)


def test_the_caller_is_still_held_by_the_gate(share):
    """Between its open() and its mmap() it changes the table, several times."""
    region = share.region()
    client = share.start()
    assert client.call("open", region.path, "rw") > 0
    assert client.call("protect", 0, PAGE, 1) == 0
    assert client.call("remove", PAGE, PAGE) == 0
    assert client.ask("mmap", 0, 4 * PAGE, RW, 0, SHARED).startswith("at ")
    client.path = region.path
    assert client.ranges()[-2:] == [(1, 1, "---"), (2, 2, "rw-")]
    assert client.fault_of("store", 0, 1) == client.address(0)
    assert client.call("protect", 0, PAGE, RW) == 0
    client.store(0, 1)
    assert client.ranges() == [(0, 1, "rw-"), (1, 1, "---"), (2, 2, "rw-")]


@pytest.mark.parametrize("threads", [1, 2])
def test_two_that_change_the_same_region_at_once(share, threads):
    """Each has to be stopped for the other's change while it waits for its own."""
    region = share.region()
    pair = [share.mapped(region) for _ in range(2)]
    for client in pair:
        if threads == 2:
            client.ask("thread")
    # One that enters its call just as it is to be stopped for the other's costs a second.
    times = 10 if threads == 2 else 5
    for page, client in enumerate(pair):
        client.say("toggle", page * PAGE, PAGE, times)
    assert [client.answer() for client in pair] == ["result 0", "result 0"]
    for client in pair:
        client.say("toggle", 0, 2 * PAGE, times)
    assert [client.answer() for client in pair] == ["result 0", "result 0"]
    for client in pair:
        assert client.ranges() == [(0, 4, "rw-")]
        client.store(0, 1)
        client.store(PAGE, 1)


# -- more than one mapping


def test_three_regions_in_one_process(share):
    regions = [share.region(name=name) for name in "abc"]
    client = share.start()
    bases = []
    for region in regions:
        assert client.map(region.path) == 0
        bases.append(client.address(0))
    for turn, region in enumerate(regions):
        region.protect(turn * PAGE, PAGE, "---")
    for turn, (region, base) in enumerate(zip(regions, bases, strict=True)):
        client.path = region.path
        client.ask("base", f"{base:x}")
        shut = [(turn, 1, "---")]
        before = [(0, turn, "rw-")] if turn else []
        assert client.ranges() == [*before, *shut, (turn + 1, 3 - turn, "rw-")]
        assert client.fault_of("load", turn * PAGE) == base + turn * PAGE
        client.store(3 * PAGE, 1)
        assert os.pread(region.fd, 1, 3 * PAGE) == b"\1"


def test_one_region_mapped_twice_and_in_parts(share):
    region = share.region(8)
    client = share.mapped(region, pages=8)
    whole = client.address(0)
    fd = client.call("open", region.path, "rw")
    assert fd > 0
    assert client.ask("mmap", 2 * PAGE, 4 * PAGE, RW, 0, SHARED).startswith("at ")
    region.protect(3 * PAGE, 2 * PAGE, "---")
    region.protect(0, PAGE, "r--")
    found = sorted(client.windows(), key=lambda window: (window.offset, window.start))
    ranges = [window.range for window in found]
    assert ranges.count((3, 2, "---")) == 2
    assert ranges.count((5, 1, "rw-")) == 1
    assert ranges.count((5, 3, "rw-")) == 1
    part = next(
        w.start
        for w in found
        if w.range == (3, 2, "---") and not whole <= w.start < whole + 8 * PAGE
    )
    client.ask("base", f"{part:x}")
    assert client.fault_of("load", 9) == part + 9
    assert client.fault_of("load", PAGE + 9) == part + PAGE + 9
    client.store(2 * PAGE, 4)  # page 5
    client.ask("base", f"{whole:x}")
    assert client.load(5 * PAGE) == 4
    assert client.fault_of("store", 0, 1) == whole
    assert client.fault_of("load", 4 * PAGE) == whole + 4 * PAGE


@pytest.mark.parametrize("seen", [True, False], ids=["by the gate", "by nobody"])
def test_mapped_again_after_a_change(share, seen):
    region = share.region()
    client = share.mapped(region)
    region.protect(0, PAGE, "r--")
    first = client.address(0)
    assert client.call("open", region.path, "rw") > 0
    if not seen:
        assert client.ask("mmap", 0, PAGE, RW, 0, SHARED).startswith("at ")
        assert client.call("munmap", 0, PAGE) == 0
    word, second = client.ask("mmap", 0, 4 * PAGE, RW, 0, SHARED).split()
    assert word == "at"
    if not seen:
        region.protect(2 * PAGE, PAGE, "r--")
    for base in (int(second, 16), first):
        client.ask("base", f"{base:x}")
        assert client.fault_of("store", 5, 1) == base + 5
        client.store(PAGE, 1)
    assert os.pread(region.fd, 1, 5) == b"\0"


def test_a_part_at_an_offset(share):
    region = share.region(8)
    client = share.start()
    assert client.map(region.path, pages=2, offset=5) == 0
    region.protect(0, 5 * PAGE, "---")
    assert client.ranges() == [(5, 2, "rw-")]
    region.protect(6 * PAGE, 2 * PAGE, "---")
    assert client.ranges() == [(5, 1, "rw-"), (6, 1, "---")]
    assert client.fault_of("load", PAGE) == client.address(6 * PAGE)


# -- what a program does to its own mappings


def test_moved_and_unmapped_by_the_program(share):
    region = share.region()
    client = share.mapped(region)
    region.protect(0, PAGE, "r--")
    region.protect(0, PAGE, "rw-")
    assert client.ask("mremap", 4 * PAGE, 4 * PAGE, 1).startswith("at ")
    region.protect(0, PAGE, "r--")
    assert client.fault_of("store", 3, 1) == client.address(3)
    region.protect(0, PAGE, "rw-")
    client.store(3, 1)
    assert client.call("munmap", PAGE, PAGE) == 0
    assert client.ranges() == [(0, 1, "rw-"), (2, 2, "rw-")]
    region.protect(0, 4 * PAGE, "---")
    assert client.ranges() == [(0, 1, "---"), (2, 2, "---")]
    assert client.fault_of("load", 2 * PAGE) == client.address(2 * PAGE)
    region.protect(0, 4 * PAGE, "rw-")
    client.store(2 * PAGE, 2)
    assert client.call("munmap", 0, 4 * PAGE) == 0
    region.protect(0, PAGE, "r--")
    assert share.states(region) == {}


def test_moved_while_it_is_protected(share):
    region = share.region()
    client = share.mapped(region)
    region.protect(PAGE, PAGE, "r--")
    # For the kernel it is three mappings now, and not every kernel moves them together.
    moved = client.ask("mremap", 4 * PAGE, 4 * PAGE, 1)
    assert client.fault_of("store", PAGE, 1) == client.address(PAGE)
    if moved.startswith("at "):
        client.store(0, 1)
    else:
        assert moved == f"errno {errno.EFAULT}"  # and some of it may have moved
    assert os.pread(region.fd, 1, PAGE) == b"\0"


def test_protected_otherwise_by_the_program(share, gate):
    """The lsm gate refuses it; otherwise the next change puts it right."""
    region = share.region()
    client = share.mapped(region)
    region.protect(0, PAGE, "---")
    if gate == "lsm":
        assert client.call("mprotect", 0, PAGE, RW) == -errno.EACCES
    else:
        assert client.call("mprotect", 0, PAGE, RW) == 0
        region.protect(PAGE, PAGE, "---")
    assert client.fault_of("load", 0) == client.address(0)


# -- the end of a region


def test_unlinked_while_it_is_mapped(share):
    region = share.region()
    client = share.mapped(region)
    client.store(0, 1)
    os.unlink(region.path)
    region.protect(0, PAGE, "r--")
    assert client.load(0) == 1
    assert client.ask("store", 0, 2).startswith("segv ")
    region.protect(0, PAGE, "rw-")
    client.store(0, 3)
    assert os.pread(region.fd, 1, 0) == b"\3"
    fresh = Region.create(region.path, 4 * PAGE)  # another region of that name
    share.regions.append(fresh)
    fresh.map(0, PAGE, "rw-")
    fresh.protect(0, PAGE, "---")
    assert client.load(0) == 3


def test_resized_while_it_is_mapped(share):
    region = share.region()
    client = share.mapped(region)
    client.store(3 * PAGE, 1)
    region.resize(2 * PAGE)
    assert client.ranges() == [(0, 2, "rw-"), (2, 2, "---")]
    assert client.fault_of("load", 3 * PAGE) == client.address(3 * PAGE)
    client.store(PAGE, 1)
    region.resize(6 * PAGE)
    assert client.ranges() == [(0, 2, "rw-"), (2, 2, "---")]
    assert client.fault_of("store", 2 * PAGE, 1) == client.address(2 * PAGE)
    region.map(2 * PAGE, 4 * PAGE, "rw-")
    assert client.ranges() == [(0, 4, "rw-")]
    assert client.load(3 * PAGE) == 0
    client.store(3 * PAGE, 2)
    region.protect(2 * PAGE, PAGE, "r--")
    assert client.fault_of("store", 2 * PAGE, 1) == client.address(2 * PAGE)
    region.resize(0)
    assert client.ranges() == [(0, 4, "---")]


# -- huge pages


def smaps(client, field):
    """Kilobytes of it in the client's mappings of the region."""
    inode, total, inside = os.stat(client.path).st_ino, 0, False
    with open(f"/proc/{client.pid}/smaps") as file:
        for line in file:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                inside = int(line.split()[4]) == inode
            elif inside and first == field + ":":
                total += int(line.split()[1])
    return total


def page_tables(client):
    with open(f"/proc/{client.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmPTE"))


def test_huge_mappings_stay_whole(share_with):
    huge = 2 << 20
    share = share_with("auto", "huge=always")
    pages = 4 * huge // PAGE
    region = share.region(pages)
    clients = [share.mapped(region, pages=pages) for _ in range(10)]
    for client in clients:
        for offset in range(0, 4 * huge, huge):
            client.store(offset, 1)
    if smaps(clients[0], "ShmemPmdMapped") != 4 * huge >> 10:
        pytest.skip(
            "the kernel gave no huge pages: {} kB".format(smaps(clients[0], "ShmemPmdMapped"))
        )
    before = [page_tables(client) for client in clients]
    region.protect(0, 4 * huge, "r--")
    for client, tables in zip(clients, before, strict=True):
        assert client.ranges() == [(0, pages, "r--")]
        assert client.load(0) == 1
        assert client.fault_of("store", huge, 2) == client.address(huge)
        assert smaps(client, "ShmemPmdMapped") == 4 * huge >> 10
        assert page_tables(client) <= tables + 64
    region.protect(0, 4 * huge, "rw-")
    for client in clients:
        client.store(0, 1)
        assert smaps(client, "ShmemPmdMapped") == 4 * huge >> 10


# -- what auto chooses


def test_auto_protects_small_ranges_of_many_by_faults_and_few_by_mappings(share_with):
    share = share_with("auto")
    region = share.region()
    clients = [share.begin() for _ in range(9)]
    for client in clients:
        client.ready()
    few, many = clients[:2], clients
    for client in few:
        assert client.map(region.path) == 0
    region.protect(0, PAGE, "r--")
    for client in few:
        assert client.ranges() == [(0, 1, "r--"), (1, 3, "rw-")]
        assert client.fault_of("store", 0, 1) == client.address(0)
    region.protect(0, PAGE, "rw-")
    for client in clients[2:]:
        assert client.map(region.path) == 0
    region.protect(0, PAGE, "r--")
    assert set(share.states(region).values()) == {"fault"}
    for client in many:
        assert client.ranges() == [(0, 4, "rw-")]
        assert client.fault_of("store", 0, 1) == client.address(0)
    region.protect(0, PAGE, "---")  # from the one way to the other
    for client in many:
        assert client.ranges() == [(0, 1, "---"), (1, 3, "rw-")]
        assert client.fault_of("load", 0) == client.address(0)
    region.protect(0, PAGE, "rw-")
    for client in many:
        client.store(0, 1)
    assert set(share.states(region).values()) == {"replica"}
