"""Many files in a region, files in regions that behave as tmpfs has them, and mounts that show none."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from msharefs.abi import Feature, NotifyEvent
from msharefs.client import Region
from tests.objects.conftest import MIB, PAGE, events_of, held, mapped_kinds, reasons, refused

COUNT = 100


def files(tmp_path, count):
    """``count`` files of two pages; page N of a file is full of the file's number plus N."""
    opened = []
    for number in range(count):
        fd = os.open(tmp_path / f"object{number}", os.O_RDWR | os.O_CREAT, 0o600)
        os.write(fd, bytes([number]) * PAGE + bytes([number + 1]) * PAGE)
        opened.append(fd)
    return opened


def use_all(mount, opened):
    """Lay them all into a region, use them, and let them go in three ways."""
    with Region.create(mount.path / "many", COUNT * PAGE) as region:
        for number, fd in enumerate(opened):
            region.map(number * PAGE, PAGE, "rw-", fd=fd, object_offset=number % 2 * PAGE)
        assert len(list(region)) == COUNT
        old = b"".join(os.pread(fd, PAGE, n % 2 * PAGE) for n, fd in enumerate(opened))
        assert os.pread(region.fd, COUNT * PAGE, 0) == old
        new = os.urandom(COUNT * PAGE)
        assert os.pwrite(region.fd, new, 0) == len(new)
        assert b"".join(os.pread(fd, PAGE, n % 2 * PAGE) for n, fd in enumerate(opened)) == new
        os.fsync(region.fd)
        half = COUNT // 2
        region.unmap(0, half * PAGE)
        mount.until(lambda: not any(held(mount, fd) for fd in opened[:half]), "half")
        assert all(held(mount, fd) == 1 for fd in opened[half:])
        region.resize((half + 1) * PAGE)
        mount.until(lambda: not any(held(mount, fd) for fd in opened[half + 1 :]), "all but one")
        assert held(mount, opened[half]) == 1
        os.unlink(mount.path / "many")
    mount.until(lambda: not held(mount, opened[half]), "the last")


def test_a_hundred_files_in_a_region(mount, tmp_path):
    opened = files(tmp_path, COUNT)
    use_all(mount, opened)
    before = mount.descriptors()
    use_all(mount, opened)
    mount.until_descriptors(before)
    for fd in opened:
        os.close(fd)


def test_every_file_is_let_go_when_the_mount_ends(start_mount, tmp_path):
    mount = start_mount()
    [fd] = files(tmp_path, 1)
    with Region.create(mount.path / "r", 2 * PAGE) as region:
        region.map(0, 2 * PAGE, "rw-", fd=fd)
        assert held(mount, fd) == 1
    mount.stop()
    os.close(fd)


def test_a_change_that_is_undone_lets_go_of_its_file(mount, region, memfd):
    """A right that an open descriptor lacks: nothing has changed."""
    region.map(0, PAGE, "r--")
    with Region.open(mount.path / "r", writable=False):
        refused(errno.EBUSY, region.map, 0, PAGE, "rw-", fd=memfd)
    refused(errno.EEXIST, region.map, 0, 2 * PAGE, "r--", fd=memfd, replace=False)
    mount.until(lambda: not held(mount, memfd), "it is let go")
    assert mapped_kinds(region) == [(0, PAGE, "r--", 1)]


def test_events_name_the_file_and_what_is_done_through_the_region(mount, region, tmp_path):
    [fd] = files(tmp_path, 1)
    region.map(2 * PAGE, 2 * PAGE, "rw-", fd=fd)
    region.notify(2 * PAGE, PAGE, NotifyEvent.WRITE)
    os.pwrite(region.fd, b"told", 3 * PAGE - 2)
    found = events_of(mount, "r")
    [mapped] = [e for e in found if e["event"] == "map"]
    assert (mapped["object"], mapped["object_offset"]) == (str(tmp_path / "object0"), 0)
    assert (mapped["offset"], mapped["length"], mapped["prot"]) == (2 * PAGE, 2 * PAGE, "rw-")
    written = [(e["event"], e["offset"], e["length"]) for e in found[-2:]]
    assert written == [("fault", 3 * PAGE - 2, 2), ("write", 3 * PAGE - 2, 4)]
    os.close(fd)


def test_a_mount_without_a_gate_shows_no_file(start_mount, memfd):
    mount = start_mount("gate=none")
    with Region.create(mount.path / "r", PAGE) as region:
        assert not region.info().features & Feature.FILE_OBJECTS
        refused(errno.EOPNOTSUPP, region.map, 0, PAGE, "rw-", fd=memfd)
        refused(errno.EOPNOTSUPP, region.sync)
        os.fsync(region.fd)
        assert [name for name, _ in reasons(mount, "r")] == ["EOPNOTSUPP", "EOPNOTSUPP"]
        mount.until(lambda: not held(mount, memfd), "it is let go")


# -- where files are as tmpfs has them


KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10
libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd, mode, offset, length):
    """fallocate(2), where the library would do it in its own way: 0, or the errno."""
    failed = libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length))
    return ctypes.get_errno() if failed else 0


@pytest.fixture
def plain(start_mount, memfd):
    """A plain file of eight pages; a file object lies over its third and fourth."""
    mount = start_mount("automap")
    with Region(os.open(mount.path / "p", os.O_RDWR | os.O_CREAT), mount.path / "p") as region:
        os.pwrite(region.fd, b"p" * 8 * PAGE, 0)
        region.map(2 * PAGE, 2 * PAGE, "rw-", fd=memfd)
        yield region


def test_a_file_over_a_plain_file(plain, memfd):
    assert os.pread(plain.fd, 9 * PAGE, 0) == (
        b"p" * 2 * PAGE + bytes(PAGE) + b"\1" * PAGE + b"p" * 4 * PAGE
    )
    assert os.pwrite(plain.fd, b"w" * 8 * PAGE, PAGE) == 7 * PAGE  # a file, and then what grows
    assert os.pwrite(plain.fd, b"w" * PAGE, 8 * PAGE) == PAGE
    assert os.fstat(plain.fd).st_size == 9 * PAGE
    assert os.pread(memfd, 3 * PAGE, 0) == b"w" * 2 * PAGE + b"\2" * PAGE
    os.ftruncate(plain.fd, 3 * PAGE)
    assert mapped_kinds(plain) == [(0, 2 * PAGE, "rw-", 1), (2 * PAGE, PAGE, "rw-", 2)]
    os.ftruncate(plain.fd, 0)
    assert os.fstat(memfd).st_size == 8 * PAGE


def test_fallocate_leaves_files_alone(plain, memfd):
    for mode in (0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, ZERO_RANGE):
        assert fallocate(plain.fd, mode, PAGE, MIB) == errno.EOPNOTSUPP
    assert os.fstat(plain.fd).st_size == 8 * PAGE
    assert fallocate(plain.fd, 0, 4 * PAGE, MIB) == 0
    assert fallocate(plain.fd, KEEP_SIZE | PUNCH_HOLE, 0, 2 * PAGE) == 0
    assert os.pread(plain.fd, 4 * PAGE, 0) == bytes(3 * PAGE) + b"\1" * PAGE
    assert os.fstat(plain.fd).st_size == 4 * PAGE + MIB
    assert os.fstat(memfd).st_size == 8 * PAGE


def test_a_whole_plain_file_that_is_another_file(start_mount, memfd):
    """Nothing of it is plain any more, whatever its protection."""
    mount = start_mount("automap")
    with Region(os.open(mount.path / "p", os.O_RDWR | os.O_CREAT), mount.path / "p") as region:
        os.ftruncate(region.fd, 8 * PAGE)
        region.map(0, 8 * PAGE, "rw-", fd=memfd)
        with Region.open(mount.path / "p") as other:
            assert os.pread(other.fd, PAGE, 5 * PAGE) == b"\5" * PAGE
        os.pwrite(region.fd, b"end", 8 * PAGE)
        assert mapped_kinds(region) == [(0, 8 * PAGE, "rw-", 2), (8 * PAGE, PAGE, "rw-", 1)]
