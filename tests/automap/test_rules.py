"""mshare over plain files: the table follows the files, and what is laid over them holds."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
import subprocess
import sys
import time

import pytest

from msharefs.client import Region
from tests.automap.test_as_tmpfs import KEEP_SIZE, PAGE, PUNCH_HOLE, ZERO_RANGE, fallocate

MIB = 1 << 20
F_OFD_SETLK = 37

LOCKER = """
import fcntl, os, struct, sys
path, kind = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
def attempt():
    try:
        if kind == "flock":
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            command = fcntl.F_SETLK if kind == "fcntl" else 37
            record = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 10, 10, 0)
            fcntl.fcntl(fd, command, record)
    except OSError as error:
        return type(error).__name__
    return "locked"
for line in sys.stdin:
    print(attempt(), flush=True)
"""


@pytest.fixture
def automap(start_mount):
    return start_mount("automap,size=16M")


def mappings(path):
    with Region.open(path) as region:
        return [(m.start, m.size, m.prot.text()) for m in region]


def refused(code, call, *arguments):
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert errno.errorcode[caught.value.errno] == code


def lock(fd, kind):
    if kind == "flock":
        fcntl.flock(fd, fcntl.LOCK_EX)
    else:
        command = fcntl.F_SETLK if kind == "fcntl" else F_OFD_SETLK
        fcntl.fcntl(fd, command, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 15, 0))


@pytest.mark.parametrize("kind", ["flock", "fcntl", "ofd"])
def test_locks_hold_between_processes_and_end_with_their_holder(automap, kind):
    path = automap.path / "f"
    holder = os.open(path, os.O_RDWR | os.O_CREAT)
    lock(holder, kind)
    other = subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(path), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def tries():
        other.stdin.write("\n")
        other.stdin.flush()
        return other.stdout.readline().strip()

    try:
        assert tries() == "BlockingIOError"
        os.close(holder)
        assert tries() == "locked"
    finally:
        other.stdin.close()
        assert other.wait(60) == 0
        other.stdout.close()
    again = os.open(path, os.O_RDWR)
    lock(again, kind)  # the other one has ended
    os.close(again)


def test_the_table_follows_every_way_of_growing_and_shrinking(automap):
    path = automap.path / "f"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * 100)
    assert mappings(path) == [(0, PAGE, "rw-")]
    os.ftruncate(fd, 5 * PAGE + 1)
    assert mappings(path) == [(0, 6 * PAGE, "rw-")]
    assert fallocate(fd, 0, 0, 8 * PAGE) == 0
    assert fallocate(fd, KEEP_SIZE, 20 * PAGE, PAGE) == 0
    assert mappings(path) == [(0, 8 * PAGE, "rw-")]
    assert os.copy_file_range(fd, fd, PAGE, 0, 9 * PAGE) == PAGE
    assert mappings(path) == [(0, 10 * PAGE, "rw-")]
    os.truncate(path, 3)
    assert mappings(path) == [(0, PAGE, "rw-")]
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert mappings(path) == []
    os.close(fd)


def test_zero_range_leaves_zeroes_and_the_memory(automap):
    fd = os.open(automap.path / "f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * 4 * PAGE)
    assert fallocate(fd, ZERO_RANGE, 100, 2 * PAGE) == 0
    assert os.pread(fd, 4 * PAGE, 0) == b"x" * 100 + bytes(2 * PAGE) + b"x" * (2 * PAGE - 100)
    assert os.fstat(fd).st_blocks == 4 * PAGE // 512
    assert fallocate(fd, ZERO_RANGE | KEEP_SIZE, 3 * PAGE, 4 * PAGE) == 0
    assert os.fstat(fd).st_size == 4 * PAGE
    assert fallocate(fd, ZERO_RANGE, 3 * PAGE, 4 * PAGE) == 0
    assert os.fstat(fd).st_size == 7 * PAGE
    os.close(fd)


def test_what_is_laid_over_a_file_holds_for_every_way_in(automap):
    path = automap.path / "f"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, b"a" * 4 * PAGE)
    with Region.open(path, writable=True) as region:
        region.protect(PAGE, PAGE, "r--")
        region.unmap(3 * PAGE, PAGE)
    assert os.pwrite(fd, b"b" * 2 * PAGE, 0) == PAGE, "short, up to what is protected"
    refused("EACCES", os.pwrite, fd, b"b", PAGE)
    refused("ENXIO", os.pwrite, fd, b"b", 3 * PAGE)
    refused("ENXIO", os.pread, fd, 10, 3 * PAGE)
    refused("EACCES", os.copy_file_range, fd, fd, 10, 0, PAGE + 5)
    assert fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 2 * PAGE) == "EACCES"
    assert fallocate(fd, ZERO_RANGE, PAGE, 10) == "EACCES"
    assert os.pread(fd, 2 * PAGE, 0) == b"b" * PAGE + b"a" * PAGE
    assert os.pwrite(fd, b"end", 4 * PAGE) == 3
    assert mappings(path) == [
        (0, PAGE, "rw-"),
        (PAGE, PAGE, "r--"),
        (2 * PAGE, PAGE, "rw-"),
        (4 * PAGE, PAGE, "rw-"),
    ]
    with Region.open(path, writable=True) as region:
        region.map(3 * PAGE, PAGE, "rw-")
        region.protect(0, 5 * PAGE, "rw-")
    assert mappings(path) == [(0, 5 * PAGE, "rw-")]
    assert os.pread(fd, 3, 3 * PAGE) == bytes(3)
    os.close(fd)


def test_native_writes_are_in_the_table_before_anybody_looks(start_mount):
    automap = start_mount("automap,io=native")
    path = automap.path / "f"
    events = os.open(automap.path / ".control" / "events", os.O_RDONLY | os.O_NONBLOCK)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    for pages in (1, 3, 9):
        os.pwrite(fd, b"x" * PAGE, (pages - 1) * PAGE)
        text = (automap.path / ".control" / "f" / "maps").read_text()
        assert int(text.split()[0].partition("-")[2], 16) == pages * PAGE
        assert len(text.splitlines()) == 1
    os.write(fd, b"y" * 10 * PAGE)
    with Region.open(path) as region:
        region.protect(9 * PAGE, PAGE, "r--")  # known to the server through this call alone
    counted = automap.stats("f")
    assert counted.get("write", 0) == 0, "no write has met the server"
    assert json.loads(os.read(events, MIB).splitlines()[-1])["event"] == "protect"
    os.close(events)
    # Whoever opens it now is checked, and goes on being so.
    late = os.open(path, os.O_RDWR)
    refused("EACCES", os.pwrite, late, b"z", 9 * PAGE)
    with Region.open(path) as region:
        region.protect(9 * PAGE, PAGE, "rw-")
    assert os.pwrite(late, b"z", 9 * PAGE) == 1
    assert automap.stats("f")["write"] == 2, "the refused one too"
    assert os.pread(fd, 1, 9 * PAGE) == b"z"
    os.close(late)
    os.close(fd)
    assert mappings(path) == [(0, 10 * PAGE, "rw-")]


def test_native_attributes_are_at_most_a_moment_old(start_mount):
    automap = start_mount("automap,io=native")
    fd = os.open(automap.path / "f", os.O_RDWR | os.O_CREAT)
    for size in range(1, 9):  # what calls do is seen at once
        os.ftruncate(fd, size * PAGE)
        assert os.fstat(fd).st_size == size * PAGE
        os.pwrite(fd, b"x", size * PAGE)
        found = os.fstat(fd)
        assert (found.st_size, found.st_blocks) == (size * PAGE + 1, 8 * size)
        os.chmod(fd, 0o600 + size)
        assert os.fstat(fd).st_mode & 0o777 == 0o600 + size
    os.ftruncate(fd, 64 * PAGE)
    with mmap.mmap(fd, 64 * PAGE) as view:
        blocks = os.fstat(fd).st_blocks
        view[32 * PAGE] = 1
        automap.until(lambda: os.fstat(fd).st_blocks == blocks + 8, "the page in st_blocks")
    with Region.open(automap.path / "f") as region:  # not one moment, where something is laid over
        region.protect(0, PAGE, "r--")
    os.fstat(fd)
    automap.until(lambda: os.fstat(fd).st_blocks == blocks + 8, "the page in st_blocks")
    with mmap.mmap(fd, 64 * PAGE, prot=mmap.PROT_WRITE) as view:
        for page in range(33, 40):
            view[page * PAGE] = 1
            assert os.fstat(fd).st_blocks == blocks + 8 * (page - 31)
    os.close(fd)


def test_native_descriptors_append_and_truncate_beside_checked_ones(start_mount):
    path = start_mount("automap,io=native").path / "f"
    native = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.write(native, b"n" * 5000)
    with Region.open(path) as region:
        region.protect(0, PAGE, "r--")
    checked = os.open(path, os.O_RDWR | os.O_APPEND)
    for _ in range(20):
        os.write(checked, b"c" * 777)
        os.write(native, b"n" * 333)
    content = path.read_bytes()
    assert content == b"n" * 5000 + (b"c" * 777 + b"n" * 333) * 20
    os.ftruncate(native, 6000)
    os.write(native, b"!")
    os.ftruncate(checked, 6002)
    assert path.read_bytes() == content[:6000] + b"!\0"
    assert mappings(path) == [(0, PAGE, "r--"), (PAGE, PAGE, "rw-")]
    os.close(checked)
    os.close(native)


def test_a_right_is_given_back_though_somebody_only_reads(automap):
    path = automap.path / "f"
    path.write_bytes(b"x" * PAGE)
    reader = os.open(path, os.O_RDONLY)
    view = mmap.mmap(reader, PAGE, prot=mmap.PROT_READ)
    with Region.open(path, writable=True) as region:
        region.protect(0, PAGE, "r--")
        region.protect(0, PAGE, "rw-")
    with path.open("r+b") as writer:
        writer.write(b"new")
    assert view[:3] == b"new"
    view.close()
    os.close(reader)


@pytest.mark.parametrize("way", ["checked", "native"])
def test_a_file_that_is_removed_makes_room(start_mount, way):
    automap = start_mount(f"automap,size=4M,io={way}")
    for _ in range(5):
        with (automap.path / "old").open("wb", buffering=0) as old:
            assert old.write(b"o" * 4 * MIB) == 4 * MIB
            with pytest.raises(OSError, match="No space"):
                old.write(b"o")
        fd = os.open(automap.path / "new", os.O_WRONLY | os.O_CREAT)
        refused("ENOSPC", os.write, fd, b"n")
        os.unlink(automap.path / "old")
        if way == "native":  # the kernel tells us in its own time, and asks nobody before it writes
            automap.until(lambda: os.statvfs(automap.path).f_bavail, "room")
        assert os.write(fd, b"n" * PAGE) == PAGE
        os.close(fd)
        os.unlink(automap.path / "new")
        automap.until(lambda: os.statvfs(automap.path).f_bavail == 1024, "all of the room")


def test_memory_counts_when_it_is_touched(automap):
    def available():
        found = os.statvfs(automap.path)
        return found.f_bavail * found.f_frsize

    before = available()
    fd = os.open(automap.path / "f", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 64 * MIB)
    assert available() == before
    memory = mmap.mmap(fd, 64 * MIB)
    memory[40 * MIB] = 1
    assert available() == before - PAGE
    memory.close()
    os.close(fd)
    os.unlink(automap.path / "f")


def test_a_mount_without_a_limit_has_the_one_of_tmpfs(start_mount):
    found = os.statvfs(start_mount("automap").path)
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert abs(found.f_blocks * found.f_frsize - half) < half // 20


def test_sendfile_sees_what_mappings_stored_after_an_earlier_sendfile(automap):
    fd = os.open(automap.path / "f", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4 * PAGE)
    memory = mmap.mmap(fd, 4 * PAGE)
    readable, writable = os.pipe()

    def sent():
        count = os.sendfile(writable, fd, 0, 4 * PAGE)
        return set(os.read(readable, count))

    late = 0
    for value in range(1, 100):
        memory[:] = bytes([value]) * 4 * PAGE
        # The kernel drops what it has cached for the last one in its own time, not before the
        # call returns.
        deadline = time.monotonic() + 20
        while sent() != {value}:
            late += 1
            assert time.monotonic() < deadline
    print(f"{late} calls of {value} came too early")
    memory.close()
    for end in (fd, readable, writable):
        os.close(end)


def test_events_tell_of_growth(automap):
    path = automap.path / "f"
    events = os.open(automap.path / ".control" / "events", os.O_RDONLY | os.O_NONBLOCK)
    path.write_bytes(b"x" * 10)
    seen = os.read(events, MIB).decode()
    assert '"event": "resize"' in seen.replace('":"', '": "'), seen
    os.close(events)


def test_other_mounts_stay_as_they_are(mount):
    refused("EPERM", os.symlink, "x", mount.path / "s")
    refused("EPERM", os.mkfifo, mount.path / "p")
    fd = os.open(mount.path / "f", os.O_RDWR | os.O_CREAT)
    refused("ENXIO", os.write, fd, b"x")
    os.ftruncate(fd, 2 * PAGE)
    assert mappings(mount.path / "f") == []
    assert fallocate(fd, KEEP_SIZE, 0, PAGE) == "ENOTSUP"
    os.close(fd)
