"""What pagemap says of a process, against what the kernel says of it elsewhere."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from msharefs.abi import Prot
from msharefs.client import ClientMapping
from msharefs.footprint import footprints, page_tables, scan
from msharefs.memory import tmpfs
from msharefs.pagetables import Span, Tables

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def pagemap():
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def shared():
    """Make shared mappings: where each begins, and the memory itself."""
    made = []

    def make(fd, size):
        memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        made.append(memory)
        holder = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(holder)
        del holder
        return start, memory

    yield make
    for memory in made:
        memory.close()


def touch(memory, *pages):
    for page in pages:
        memory[page * PAGE] = 1


def test_a_scan_sees_each_touched_page_and_no_other(pagemap, shared):
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4 * MIB)
    start, memory = shared(fd, 4 * MIB)
    os.close(fd)
    assert list(scan(pagemap, start, start + 4 * MIB)) == []
    touch(memory, 0, 1, 5, 1023)
    assert list(scan(pagemap, start, start + 4 * MIB)) == [
        Span(start + a * PAGE, start + b * PAGE) for a, b in ((0, 2), (5, 6), (1023, 1024))
    ]
    # Only what was asked for.
    assert list(scan(pagemap, start + PAGE, start + 5 * PAGE)) == [
        Span(start + PAGE, start + 2 * PAGE)
    ]


def test_more_ranges_than_one_answer_holds(pagemap, shared):
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4096 * PAGE)
    start, memory = shared(fd, 4096 * PAGE)
    os.close(fd)
    touch(memory, *range(0, 4096, 2))
    found = list(scan(pagemap, start, start + 4096 * PAGE))
    assert found == [Span(start + p * PAGE, start + (p + 1) * PAGE) for p in range(0, 4096, 2)]


def test_huge_pages_are_told_from_small_ones_as_smaps_tells_them(pagemap, shared):
    try:
        root = tmpfs.open_detached({"huge": "always"})
    except OSError as error:
        pytest.skip(f"no tmpfs with huge=always: {error}")
    fd = tmpfs.unnamed_file(root)
    os.close(root)
    os.ftruncate(fd, 8 * MIB)
    start, memory = shared(fd, 8 * MIB)
    os.close(fd)
    touch(memory, 0, 1024)
    found = list(scan(pagemap, start, start + 8 * MIB))
    in_smaps = entry_of_smaps(start)
    if not in_smaps["ShmemPmdMapped"]:
        pytest.skip("the kernel gave no huge page")
    assert sum(s.end - s.start for s in found if s.huge) == in_smaps["ShmemPmdMapped"]
    assert sum(s.end - s.start for s in found) == in_smaps["Rss"]


def entry_of_smaps(start):
    text = Path("/proc/self/smaps").read_text()
    entry = text[text.index(f"{start:x}-") :].split("VmFlags", 1)[0]
    return {key: int(value) * 1024 for key, value in re.findall(r"(\w+): +(\d+) kB", entry)}


def test_the_derived_tables_are_what_vmpte_grows_by(shared):
    """A mapping that shares no table with others: PTEs by its pages, and the level above."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, 64 * MIB)
    start, memory = shared(fd, 64 * MIB)
    os.close(fd)
    before = page_tables(os.getpid())
    touch(memory, *range(0, 64 * MIB // PAGE, 512))
    grown = page_tables(os.getpid()) - before
    (found,) = footprints([client(os.getpid(), start, 64 * MIB)])
    assert found.present is not None
    # The first and the last table may hold PTEs of neighbours, the upper ones do so as a rule.
    assert (found.tables.pte - 2) * PAGE <= grown <= found.tables.size + 2 * PAGE
    assert 32 <= found.tables.pte <= 33
    assert found.vmpte >= found.tables.size


def client(pid, start, size, offset=0):
    prot = Prot.READ | Prot.WRITE
    return ClientMapping(pid, start, start + size, prot, offset, "replica", "", 0, 0, "test")


def test_one_line_for_a_process_however_often_it_maps(shared):
    fd = os.memfd_create("test")
    os.ftruncate(fd, MIB)
    first, memory = shared(fd, MIB)
    second, again = shared(fd, MIB)
    os.close(fd)
    touch(memory, 0)
    touch(again, 0, 7)
    (found,) = footprints(
        [client(os.getpid(), second, MIB), client(os.getpid(), first, MIB)],
    )
    assert (found.mappings, found.mapped) == (2, 2 * MIB)
    # What one mapping has touched the other maps along with it, if at all, by fault-around.
    assert found.present >= 3 * PAGE
    assert found.huge == 0


def test_a_process_that_has_ended_is_passed_over():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    try:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        gone = [client(ended.pid, PAGE, PAGE), client(zombie.pid, PAGE, PAGE)]
        assert list(footprints(gone)) == []
        with pytest.raises(ProcessLookupError):
            page_tables(zombie.pid)
    finally:
        zombie.wait()


def test_what_may_not_be_looked_at_is_none():
    """Without privilege another user's process shows its VmPTE and nothing else."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            (found,) = footprints([client(1, PAGE, PAGE)])
            sane = found.present is None and found.tables is None and found.vmpte is not None
            os.write(writable, b"y" if sane else b"n")
        finally:
            os._exit(0)
    os.close(writable)
    answer = os.read(readable, 1)
    os.close(readable)
    os.waitpid(pid, 0)
    assert answer == b"y"


def test_a_kernel_without_the_scan_leaves_it_out(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTTY, "no such ioctl")

    monkeypatch.setattr("msharefs.footprint.fcntl.ioctl", refuse)
    (found,) = footprints([client(os.getpid(), PAGE, PAGE)])
    assert (found.present, found.huge, found.tables) == (None, None, None)
    assert found.vmpte > 0


def test_tables_add_up():
    assert Tables(1, 2, 3) + Tables(10, 20, 30) == Tables(11, 22, 33)
