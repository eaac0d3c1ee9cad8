"""Files come into regions, change their protection, and go again, under the eyes of programs."""

from __future__ import annotations

import errno
import os

import pytest

from tests.enforcement.clients import PAGE, until
from tests.objects.mapped.conftest import layout, pinned, text


def segv(client, *words):
    """The access fails, at the address that it was meant for."""
    assert client.fault_of(*words) == client.base + int(words[1])


def mapped(share, region, language="c", pages=8):
    client = share.mapped(region, language, pages)
    lines = [line for line in share.listed(region) if int(line[0]) == client.pid]
    client.base = min(int(line[1].split("-")[0], 16) for line in lines)
    return client


def test_unmapped_it_is_gone_and_the_file_is_pinned_no_more(share, make):
    region, fd = share.region(8), make()
    client = mapped(share, region)
    region.map(2 * PAGE, 3 * PAGE, "rw-", fd=fd)
    assert text(client, 8) == "..abc..."
    assert pinned(fd)
    region.unmap(2 * PAGE, 3 * PAGE)
    segv(client, "load", 2 * PAGE)
    segv(client, "store", 4 * PAGE, 1)
    assert text(client, 2) == ".."
    until(lambda: not pinned(fd), "the file to be let go of")
    assert os.pread(fd, 1, 0) == b"a"


def test_replaced_by_memory_it_reads_as_zeroes(share, make):
    region, fd = share.region(8), make()
    client = mapped(share, region)
    region.map(0, 8 * PAGE, "rw-", fd=fd)
    region.map(2 * PAGE, 2 * PAGE, "rw-")
    assert text(client, 8) == "ab..efgh"
    client.store(2 * PAGE, 9)
    assert os.pread(region.fd, 1, 2 * PAGE) == b"\t"
    assert os.pread(fd, 1, 2 * PAGE) == b"c"
    region.map(2 * PAGE, 2 * PAGE, "rw-", fd=fd, object_offset=2 * PAGE)
    region.map(2 * PAGE, 2 * PAGE, "rw-")
    assert text(client, 8) == "ab..efgh", "what was stored to memory does not come again"


def test_replaced_by_another_file(share, make):
    region, small, large = share.region(8), make("a"), make("A", kind="memfd")
    client = mapped(share, region)
    region.map(0, 4 * PAGE, "rw-", fd=small)
    region.map(PAGE, 4 * PAGE, "rw-", fd=large, object_offset=4 * PAGE)
    assert text(client, 8) == "aEFGH..."
    client.store(PAGE, ord("!"))
    assert (os.pread(large, 1, 4 * PAGE), os.pread(small, 1, PAGE)) == (b"!", b"b")


def test_memory_keeps_what_it_has_beside_a_file(share, make):
    region, fd = share.region(8), make()
    client = mapped(share, region)
    for page in range(8):
        client.store(page * PAGE, ord("0") + page)
    region.map(3 * PAGE, PAGE, "rw-", fd=fd)
    assert text(client, 8) == "012a4567"
    region.map(3 * PAGE, PAGE, "rw-")
    assert text(client, 8) == "012.4567", "the memory under it went with it"


def test_over_a_hole_and_over_what_nobody_may_see(share, make):
    region, fd = share.region(8, prot=""), make()
    region.map(0, 4 * PAGE, "rw-")
    client = mapped(share, region)
    segv(client, "load", 5 * PAGE)
    region.map(5 * PAGE, PAGE, "rw-", fd=fd, object_offset=7 * PAGE)
    region.protect(0, PAGE, "---")
    region.map(0, PAGE, "rw-", fd=fd)
    assert text(client, 4) == "a..."
    assert client.load(5 * PAGE) == ord("h")
    segv(client, "load", 4 * PAGE)
    segv(client, "load", 6 * PAGE)


def test_one_file_many_times(share, make):
    region, fd = share.region(8), make(kind="memfd")
    other = share.region(8, name="other")
    one, two = mapped(share, region), mapped(share, other, "python")
    region.map(0, 2 * PAGE, "rw-", fd=fd)
    region.map(2 * PAGE, 2 * PAGE, "rw-", fd=fd, object_offset=PAGE)
    region.map(6 * PAGE, 2 * PAGE, "r--", fd=fd)
    other.map(4 * PAGE, 4 * PAGE, "rw-", fd=fd)
    assert text(one, 8) == "abbc..ab"
    assert text(two, 8) == "....abcd"
    one.store(2 * PAGE, ord("X"))  # the file's second page
    assert text(one, 8) == "aXXc..aX"
    assert text(two, 8) == "....aXcd"
    two.store(4 * PAGE, ord("Y"))
    assert text(one, 8) == "YXXc..YX"
    segv(one, "store", 6 * PAGE, 1)
    region.unmap(2 * PAGE, 2 * PAGE)
    assert text(one, 2) == "YX"
    assert text(one, 2, 6) == "YX"
    other.unmap(0, 8 * PAGE)
    one.store(0, ord("Z"))
    assert os.pread(fd, 1, 0) == b"Z"


@pytest.mark.parametrize("kind", ["disk", "memfd"])
def test_protected_as_memory_is(share, make, kind):
    region, fd = share.region(8), make(kind=kind)
    client = mapped(share, region)
    region.map(0, 8 * PAGE, "rw-", fd=fd)
    region.protect(2 * PAGE, 2 * PAGE, "r--")
    region.protect(5 * PAGE, PAGE, "---")
    assert text(client, 5) == "abcde"
    segv(client, "store", 2 * PAGE, 1)
    segv(client, "load", 5 * PAGE)
    late = mapped(share, region)
    want = [(0, 2, "rw-"), (2, 2, "r--"), (4, 1, "rw-"), (5, 1, "---"), (6, 2, "rw-")]
    for one in (client, late):
        assert layout(share, region, one) == want
    region.protect(0, 8 * PAGE, "rw-")
    for one in (client, late):
        one.store(2 * PAGE, ord("S"))
        one.store(5 * PAGE, ord("S"))
        assert text(one, 8) == "abSdeSgh"
        assert layout(share, region, one) == [(0, 8, "rw-")]


def test_what_is_opened_for_reading_is_never_written(share, make):
    region, fd = share.region(8), make()
    client = mapped(share, region)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with pytest.raises(PermissionError):
        region.map(0, PAGE, "rw-", fd=read_only)
    region.map(0, 2 * PAGE, "r--", fd=read_only)
    os.close(read_only)
    assert text(client, 3) == "ab."
    segv(client, "store", 0, 1)
    with pytest.raises(PermissionError):
        region.protect(0, PAGE, "rw-")
    assert client.call("mprotect", 0, PAGE, 3) == -errno.EACCES, "nor if the program asks itself"
    # Given back to memory it can be written again: that is the region's own right.
    region.map(0, PAGE, "rw-")
    client.store(0, 1)
    child = share.fork(client)
    region.map(PAGE, PAGE, "rw-")
    child.store(PAGE, 2)
    assert client.load(PAGE) == 2


def test_a_region_that_is_one_file(share, make):
    region, fd = share.region(8, prot=""), make()
    region.map(0, 8 * PAGE, "rw-", fd=fd)
    early = mapped(share, region)
    assert text(early, 8) == "abcdefgh"
    assert early.call("close", 3) in {0, -errno.EBADF}
    region.protect(0, PAGE, "r--")
    segv(early, "store", 0, 1)
    assert share.states(region) == {early.pid: "replica"}
    os.unlink(region.path)
    region.close()
    early.store(PAGE, ord("!"))  # without name and descriptor, what is mapped stays
    assert os.pread(fd, 1, PAGE) == b"!"


def test_a_client_that_has_closed_everything(share, make):
    region, fd = share.region(8), make()
    client = share.start()
    file = client.call("open", region.path, "rw")
    client.path = region.path
    assert client.ask("mmap", 0, 8 * PAGE, 3, 0, 1).split()[0] in {"at", "mapped"}
    assert client.call("close", file) == 0
    client.base = client.address(0)
    region.map(0, 4 * PAGE, "rw-", fd=fd)
    assert text(client, 8) == "abcd...."
    region.map(0, 2 * PAGE, "rw-")
    region.unmap(2 * PAGE, PAGE)
    assert text(client, 2) == ".."
    segv(client, "load", 2 * PAGE)
    assert client.load(3 * PAGE) == ord("d")


def test_children_of_any_age_see_the_same(share, make):
    region, fd = share.region(8), make()
    client = mapped(share, region)
    before = share.fork(client)
    region.map(0, 2 * PAGE, "rw-", fd=fd)
    after = share.fork(client)
    region.map(4 * PAGE, 2 * PAGE, "r--", fd=fd, object_offset=4 * PAGE)
    family = (client, before, after)
    for one in family:
        assert text(one, 8) == "ab..ef.."
    region.unmap(0, PAGE)
    region.map(4 * PAGE, PAGE, "rw-")
    for one in family:
        one.base = client.base
        segv(one, "load", 0)
        assert text(one, 7, 1) == "b...f.."
        one.store(4 * PAGE, 0)
    assert set(share.states(region).values()) == {"replica"}


def test_a_program_that_becomes_another_has_it_no_more_and_may_map_it_anew(share, make):
    region, fd = share.region(8), make()
    client = mapped(share, region)
    region.map(0, PAGE, "rw-", fd=fd)
    client.say("exec")
    assert client.answer() == f"ready {client.pid}"
    until(lambda: not share.states(region), "it is nobody's client any more")
    assert client.map(region.path, 8) == 0
    assert text(client, 3) == "a.."


def test_parts_of_a_region_mapped_apart(share, make):
    region, fd = share.region(8), make()
    client = share.start()
    assert client.map(region.path, 2, offset=3) == 0
    first = client.address(3 * PAGE)
    region.map(2 * PAGE, 4 * PAGE, "rw-", fd=fd)
    assert client.ask("base", f"{first - 3 * PAGE:x}")
    assert [chr(client.load(page * PAGE)) for page in (3, 4)] == ["b", "c"]
    assert layout(share, region, client) == [(3, 2, "rw-")]


def test_the_region_shrinks(share, make):
    region, fd = share.region(8), make()
    client = mapped(share, region)
    region.map(0, 8 * PAGE, "rw-", fd=fd)
    os.ftruncate(region.fd, 3 * PAGE)
    assert text(client, 3) == "abc"
    segv(client, "load", 3 * PAGE)
    assert os.fstat(fd).st_size == 8 * PAGE


def test_two_regions_of_one_program(share, make):
    one, two = share.region(8), share.region(8, name="two")
    fd, client = make(), share.start("python")
    assert client.map(one.path, 8) == 0
    one.map(0, PAGE, "rw-", fd=fd)
    assert client.map(two.path, 8) == 0
    two.map(PAGE, PAGE, "rw-", fd=fd, object_offset=PAGE)
    assert text(client, 3) == ".b."
    one.map(0, PAGE, "rw-")
    two.unmap(0, PAGE)
    assert client.load(PAGE) == ord("b")
