"""Huge pages, asked for by one mapping and not by its neighbour, in programs that know nothing of it."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
from pathlib import Path

import pytest

from msharefs.abi import MapFlag
from msharefs.client import Region, parse_maps
from msharefs.memory import tmpfs
from tests.enforcement.clients import PAGE
from tests.enforcement.test_gate import strace

HUGE = 2 << 20
SIZE = 2 * HUGE
"""Of each of the two ranges: the one that does not ask, and behind it the one that does."""
PAGES = 2 * SIZE // PAGE
KB = SIZE >> 10
HUGETLB = int(MapFlag.HUGETLB)


def ranges(client):
    """``(offset, end, kB by PMD, VmFlags)`` of each of the client's mappings of the region."""
    inode = os.stat(client.path).st_ino
    text = Path(f"/proc/{client.pid}/smaps").read_text()
    for entry in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)[1:]:
        addresses, _, offset, _, found, *_ = entry.split()
        if int(found) == inode:
            start, end = (int(part, 16) for part in addresses.split("-"))
            low = int(offset, 16)
            by_pmd = int(re.search(r"ShmemPmdMapped: +(\d+) kB", entry)[1])
            yield low, low + end - start, by_pmd, re.search(r"VmFlags: (.*)", entry)[1].split()


def by_pmd(client):
    """Kilobytes in the range that does not ask, and in the one that does."""
    sums = [0, 0]
    for low, high, size, _ in ranges(client):
        assert high <= SIZE or low >= SIZE, "the kernel keeps the two apart"
        sums[low >= SIZE] += size
    return sums


def advised(client):
    """The offsets at which the client's mappings have been advised."""
    return [(low, high) for low, high, _, flags in ranges(client) if "hg" in flags]


def touch(client):
    for offset in range(0, 2 * SIZE, HUGE):
        client.store(offset, 1)


@pytest.fixture(scope="module")
def _gives():
    """The kernel gives huge pages to those who ask a tmpfs for them."""
    try:
        root = tmpfs.open_detached({"huge": "advise"})
    except OSError as error:
        pytest.skip(f"a tmpfs with huge=advise is missing: {error}")
    fd = tmpfs.unnamed_file(root)
    os.close(root)
    os.ftruncate(fd, 4 * HUGE)
    with mmap.mmap(fd, 4 * HUGE) as memory:
        os.close(fd)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[2 * HUGE] = 1
        text = Path("/proc/self/smaps").read_text()
    if not any(map(int, re.findall(r"ShmemPmdMapped: +(\d+) kB", text))):
        pytest.skip("transparent huge pages for shared memory are missing (shmem_enabled)")


def frees_empty_tables():
    """Whether MADV_DONTNEED takes away the tables of small pages, as large as they may be."""

    def tables():
        return int(re.search(r"VmPTE:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    with mmap.mmap(-1, 64 * HUGE) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for offset in range(0, len(memory), HUGE):
            memory[offset] = 1
        before = tables()
        memory.madvise(mmap.MADV_DONTNEED)
        return before - tables() >= 32 * PAGE >> 10


@pytest.fixture(params=["vma", "auto"])
def share(request, share_with, _gives):
    """``protect=fault`` splits huge pages, as docs/enforcement.md says."""
    return share_with(request.param, "huge=advise")


def filled(share):
    region = share.region(PAGES, prot="")
    region.map(0, SIZE, "rw-")
    region.map(SIZE, SIZE, "rw-", huge=True)
    return region


@pytest.mark.parametrize("before", ["hole", "memory", "touched"])
def test_who_is_there_already_gets_them_where_they_are_asked_for(share, before):
    region = share.region(PAGES, prot="" if before == "hole" else "rw-")
    clients = [share.mapped(region, pages=PAGES) for _ in range(2)]
    if before == "hole":
        region.map(0, SIZE, "rw-")
    if before == "touched":
        if not frees_empty_tables():
            pytest.skip("freeing of empty page tables is missing (CONFIG_PT_RECLAIM)")
        for client in clients:
            touch(client)
            assert [(size, "hg" in flags) for *_, size, flags in ranges(client)] == [(0, False)]
    region.map(SIZE, SIZE, "rw-", huge=True)
    for client in clients:
        assert advised(client) == [(SIZE, 2 * SIZE)]
        touch(client)
        assert by_pmd(client) == [0, KB]


def test_who_comes_later_gets_them(share):
    region = filled(share)
    client = share.mapped(region, pages=PAGES)
    touch(client)
    assert by_pmd(client) == [0, KB]


def test_a_part_that_begins_in_the_middle(share):
    region = filled(share)
    client = share.start()
    assert client.map(region.path, 2 * HUGE // PAGE, offset=(SIZE - HUGE) // PAGE) == 0
    assert advised(client) == [(SIZE, SIZE + HUGE)]


def test_a_forked_child_gets_them_and_those_asked_for_later(share):
    region = share.region(PAGES, prot="")
    region.map(0, SIZE, "rw-")
    parent = share.mapped(region, pages=PAGES)
    early = share.fork(parent)
    region.map(SIZE, SIZE, "rw-", huge=True)
    late = share.fork(parent)
    for child in (late, early, parent):
        assert advised(child) == [(SIZE, 2 * SIZE)]
        touch(child)
        assert by_pmd(child) == [0, KB]


def test_changes_of_protection_keep_them(share):
    region = filled(share)
    clients = [share.mapped(region, pages=PAGES) for _ in range(2)]
    clients.append(share.fork(clients[0]))
    touch(clients[0])
    for rights in ("r--", "rw-"):
        region.protect(0, 2 * SIZE, rights)
        for client in clients:
            for offset in range(0, 2 * SIZE, HUGE):
                assert client.load(offset) == 1
            assert by_pmd(client) == [0, KB]
            assert advised(client) == [(SIZE, 2 * SIZE)]
    region.protect(SIZE, HUGE, "r--")
    for client in clients:
        assert by_pmd(client) == [0, KB]
    assert [(m.start, m.size, m.prot.text(), m.huge) for m in region] == [
        (0, SIZE, "rw-", False),
        (SIZE, HUGE, "r--", True),
        (SIZE + HUGE, SIZE - HUGE, "rw-", True),
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_who_asks_for_them_itself_gets_them(share, threads):
    region = share.region(PAGES)
    client = share.mapped(region, pages=PAGES)
    if threads == 2:
        client.ask("thread")
    assert client.call("create", SIZE, SIZE, 3, HUGETLB) == 0
    touch(client)
    assert by_pmd(client) == [0, KB]


def test_a_mapping_that_no_gate_saw_is_asked_for_by_the_next_change(share):
    region = filled(share)
    client = share.mapped(region, pages=PAGES)
    assert client.ask("mmap", 0, 2 * SIZE, 3, 0, 1).startswith("at ")
    region.protect(0, PAGE, "r--")
    assert advised(client) == [(SIZE, 2 * SIZE)] * 2


@pytest.mark.usefixtures("_gives")
def test_who_cannot_be_asked_fails_no_change_and_is_asked_by_the_next(share_with):
    share = share_with("vma", "huge=advise,enforce=strict")
    region = share.region(PAGES)
    client = share.mapped(region, pages=PAGES)
    with strace(client):
        region.map(SIZE, SIZE, "rw-", huge=True)
        assert advised(client) == []
        with pytest.raises(OSError, match="not permitted"):
            region.protect(0, PAGE, "r--")
    region.protect(0, PAGE, "r--")
    assert advised(client) == [(SIZE, 2 * SIZE)]


def test_where_a_file_was_laid_meanwhile_it_is_asked_for_anew(share, tmp_path):
    region = filled(share)
    client = share.mapped(region, pages=PAGES)
    where = f"{client.address(SIZE):x}-{client.address(0) + 2 * SIZE:x} "
    with (tmp_path / "file").open("wb") as file:
        file.truncate(SIZE)
    region.map(SIZE, SIZE, "rw-", object=tmp_path / "file")
    region.map(SIZE, SIZE, "rw-", huge=True)
    touch(client)
    entry = Path(f"/proc/{client.pid}/smaps").read_text().partition(where)[2]
    assert int(re.search(r"ShmemPmdMapped: +(\d+) kB", entry)[1]) == KB
    assert "hg" in re.search(r"VmFlags: (.*)", entry)[1].split()


def test_memory_without_the_flag_in_its_place_is_another_mapping(share):
    region = filled(share)
    assert [m.huge for m in region] == [False, True]
    region.map(SIZE, HUGE, "rw-")
    assert [(m.start, m.size, m.huge) for m in region] == [
        (0, SIZE + HUGE, False),
        (SIZE + HUGE, SIZE - HUGE, True),
    ]
    client = share.mapped(region, pages=PAGES)
    assert advised(client) == [(SIZE + HUGE, 2 * SIZE)]


@pytest.mark.usefixtures("_gives")
def test_a_plain_file_that_asks_all_over(share_with):
    share = share_with("auto", "huge=advise,automap")
    region = share.region(PAGES, prot="")
    early = share.mapped(region, pages=PAGES)
    region.map(0, 2 * SIZE, "rw-", huge=True)
    for client in (early, share.mapped(region, pages=PAGES)):
        assert advised(client) == [(0, 2 * SIZE)]
        touch(client)
        assert [size for *_, size, _ in ranges(client)] == [2 * KB]


@pytest.mark.usefixtures("_gives")
def test_a_strict_mount_asks_for_them_too(share_with, mounts, gate):
    share = share_with("auto")
    path = mounts(f"gate={gate},huge=advise,strict=v3").path / "strict"
    with Region.create(path, 1 << 39) as region:
        region.map(0, SIZE, "rw-")
        region.map(SIZE, PAGE, "rw-", huge=True)
        client = share.start()
        assert client.map(path, (1 << 39) // PAGE) == 0
        assert advised(client) == [(SIZE, SIZE + HUGE)]
    path.unlink()


@pytest.mark.parametrize("options", ["huge=advise", "huge=always", "huge=within_size"])
def test_they_are_shown(share_with, options):
    share = share_with("auto", options)
    region = filled(share)
    assert [(m.start, m.huge) for m in region] == [(0, False), (SIZE, True)]
    text = (share.served.path / ".control" / "r" / "maps").read_text()
    assert [line.split()[5] for line in text.splitlines()] == ["anon", "huge"]
    assert parse_maps(text) == list(region)


@pytest.mark.parametrize("options", ["", "huge=never"])
def test_where_there_are_none_the_answer_says_what_would_help(share_with, options):
    share = share_with("auto", options)
    region = share.region()
    with pytest.raises(OSError, match="not supported") as caught:
        region.map(0, PAGE, "rw-", huge=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    events = (share.served.path / ".control" / "r" / "events").open("rb", buffering=0)
    with events:
        lines = map(json.loads, events.read(1 << 16).splitlines())
        reasons = [line["reason"] for line in lines if line["event"] == "refuse"]
    assert len(reasons) == 1
    assert "mount with -o huge=advise" in reasons[0]


def test_a_file_has_the_pages_that_it_has(share_with, tmp_path):
    region = share_with("auto", "huge=advise").region()
    (tmp_path / "file").write_bytes(b"x" * PAGE)
    with pytest.raises(OSError, match="Invalid") as caught:
        region.map(0, PAGE, "rw-", object=tmp_path / "file", huge=True)
    assert caught.value.errno == errno.EINVAL
