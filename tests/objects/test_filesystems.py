"""Files of several filesystems in a region: the same bytes, the same ends, the same errors."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest

from msharefs.client import Region
from tests.objects.conftest import (
    MIB,
    PAGE,
    held,
    overlay,
    reasons,
    refused,
)


def test_a_file_is_the_same_by_either_way(place, region, opened):
    region.map(2 * PAGE, 3 * PAGE, "rw-", fd=opened, object_offset=4 * PAGE)
    assert os.pread(region.fd, PAGE, 3 * PAGE) == b"\5" * PAGE
    data = os.urandom(2 * PAGE)
    assert os.pwrite(region.fd, data, 2 * PAGE + 100) == len(data)
    assert (place / "object").read_bytes()[4 * PAGE + 100 :][: len(data)] == data
    os.pwrite(opened, b"back", 6 * PAGE)
    assert os.pread(region.fd, 4, 4 * PAGE) == b"back"
    os.fsync(region.fd)
    os.fdatasync(region.fd)
    region.sync(2 * PAGE, PAGE)


def test_a_file_without_a_name_lives_on(place, region, opened):
    region.map(0, 8 * PAGE, "rw-", fd=opened)
    os.unlink(place / "object")
    assert os.pread(region.fd, 1, 7 * PAGE) == b"\7"
    assert os.pwrite(region.fd, b"alive", 0) == 5
    os.fsync(region.fd)
    assert os.pread(opened, 5, 0) == b"alive"


def test_a_file_that_is_cut_and_grows(region, opened):
    region.map(0, 8 * PAGE, "rw-", fd=opened)
    assert len(os.pread(region.fd, 8 * PAGE, 0)) == 8 * PAGE
    os.ftruncate(opened, 3 * PAGE + 7)
    assert len(os.pread(region.fd, 8 * PAGE, 0)) == 3 * PAGE + 7
    refused(errno.ENXIO, os.pread, region.fd, 1, 3 * PAGE + 7)
    refused(errno.ENXIO, os.pwrite, region.fd, b"x", 7 * PAGE)
    os.ftruncate(opened, 8 * PAGE)
    assert os.pread(region.fd, PAGE, 7 * PAGE) == bytes(PAGE)
    assert os.pwrite(region.fd, b"x", 7 * PAGE) == 1
    assert os.fstat(opened).st_size == 8 * PAGE


def test_data_and_holes_are_the_files_own(region, opened):
    """SEEK_DATA and SEEK_HOLE, over memory and file alike."""
    os.ftruncate(opened, 0)
    os.ftruncate(opened, 64 * PAGE)
    os.pwrite(opened, b"d" * 16 * PAGE, 32 * PAGE)
    os.fsync(opened)
    region.resize(80 * PAGE)
    region.map(0, 4 * PAGE, "rw-")
    region.map(4 * PAGE, 64 * PAGE, "rw-", fd=opened)
    found = os.lseek(opened, 0, os.SEEK_DATA)
    end = os.lseek(opened, found, os.SEEK_HOLE)
    assert os.lseek(region.fd, 0, os.SEEK_DATA) == 4 * PAGE + found
    assert os.lseek(region.fd, 4 * PAGE + found, os.SEEK_HOLE) == 4 * PAGE + end
    assert os.lseek(region.fd, 0, os.SEEK_HOLE) == 0
    os.pwrite(region.fd, b"m", PAGE)
    assert os.lseek(region.fd, 0, os.SEEK_DATA) == PAGE
    refused(errno.ENXIO, os.lseek, region.fd, 70 * PAGE, os.SEEK_DATA)
    region.unmap(0, 80 * PAGE)


def test_copies_go_between_memory_and_files(mount, region, opened):
    region.map(0, 4 * PAGE, "rw-")
    region.map(4 * PAGE, 4 * PAGE, "rw-", fd=opened)
    with Region.create(mount.path / "other", 8 * PAGE) as other:
        other.map(0, 2 * PAGE, "rw-", fd=opened, object_offset=6 * PAGE)
        other.map(2 * PAGE, 2 * PAGE, "rw-")

        def copy(source, target, at, to, length):
            done = 0
            while done < length:
                count = os.copy_file_range(
                    source.fd, target.fd, length - done, at + done, to + done
                )
                assert count
                done += count

        copy(region, other, 5 * PAGE, 2 * PAGE, PAGE)  # file to memory
        assert os.pread(other.fd, PAGE, 2 * PAGE) == b"\1" * PAGE
        os.pwrite(region.fd, b"m" * PAGE, 0)
        copy(region, other, 0, PAGE, PAGE)  # memory to file
        assert os.pread(opened, PAGE, 7 * PAGE) == b"m" * PAGE
        copy(region, other, 6 * PAGE, 0, PAGE)  # file to file
        assert os.pread(opened, PAGE, 6 * PAGE) == b"\2" * PAGE
        copy(region, other, 3 * PAGE, PAGE, 3 * PAGE)  # pieces of all of them
        assert os.pread(other.fd, 3 * PAGE, PAGE) == bytes(2 * PAGE) + b"\1" * PAGE
        region.protect(4 * PAGE, PAGE, "r--")
        refused(errno.EACCES, os.copy_file_range, other.fd, region.fd, PAGE, 0, 4 * PAGE)
        os.ftruncate(opened, 6 * PAGE)
        refused(errno.ENXIO, os.copy_file_range, region.fd, other.fd, PAGE, 0, 0)
        other.unmap(0, 8 * PAGE)
    os.unlink(mount.path / "other")


@pytest.mark.parametrize("place", ["ext4", "btrfs", "xfs", "tmpfs"], indirect=True)
def test_a_filesystem_without_room(place, region, opened):
    """A sparse file can be shown; what does not fit is the writer's to hear of."""
    os.ftruncate(opened, 16 * PAGE)
    region.map(0, 16 * PAGE, "rw-", fd=opened)
    filler = os.open(place / "filler", os.O_RDWR | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(filler, bytes(MIB))
    with contextlib.suppress(OSError):
        while True:
            os.write(filler, bytes(PAGE))
    assert os.pread(region.fd, PAGE, 15 * PAGE) == bytes(PAGE)

    def fill():
        for page in range(8, 16):
            os.pwrite(region.fd, b"x" * PAGE, page * PAGE)
        os.fsync(region.fd)

    refused(errno.ENOSPC, fill)
    os.ftruncate(filler, 0)
    os.fsync(filler)
    os.close(filler)
    os.pwrite(region.fd, b"x" * PAGE, 15 * PAGE)
    with contextlib.suppress(OSError):  # what the first writes had left to tell
        os.fsync(region.fd)
    os.fsync(region.fd)


def test_shared_memory_of_posix(mount, region):
    """shm_open(3) makes files of /dev/shm."""
    path = f"/dev/shm/msharefs-test-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(fd, 2 * PAGE)
        region.map(0, PAGE, "rw-", fd=fd, object_offset=PAGE)
        os.pwrite(region.fd, b"posix", 0)
        assert os.pread(fd, 5, PAGE) == b"posix"
    finally:
        os.unlink(path)
        os.close(fd)


def test_a_layer_below_is_written_as_a_copy(mount, region, tmp_path):
    """As overlayfs has it: a descriptor for reading shows the lower file, one for writing copies."""
    with overlay(tmp_path) as place:
        region.map(0, PAGE, "r--", object=place / "object")
        assert os.pread(region.fd, 5, 0) == b"lower"
        region.map(PAGE, PAGE, "rw-", object=place / "object")
        os.pwrite(region.fd, b"upper", PAGE)
        assert (place / "object").read_bytes()[:5] == b"upper"
        assert (tmp_path / "layers/upper/object").read_bytes()[:5] == b"upper"
        assert (tmp_path / "layers/lower/object").read_bytes()[:5] == b"lower"
        fd = os.open(place / "object", os.O_RDONLY)
        region.unmap(0, 2 * PAGE)
        mount.until(lambda: not held(mount, fd), "it is let go")
        os.close(fd)


# -- storage that fails


def test_storage_that_fails(mount, region, failing):
    """What fsync() of the file says, fsync() and SYNC of the region say, by each descriptor once."""
    path, code, fail = failing
    fd = os.open(path, os.O_RDWR)
    region.resize(20 * MIB)
    region.map(0, 16 * MIB, "rw-", fd=fd)
    region.map(16 * MIB, 4 * MIB, "rw-")
    with Region.open(mount.path / "r") as other:
        for offset in range(0, 16 * MIB, MIB):
            assert os.pwrite(region.fd, os.urandom(MIB), offset) == MIB
        fail()
        region.sync(16 * MIB, 4 * MIB)  # memory has no storage to fail
        refused(code, os.fsync, region.fd)
        refused(code, other.sync, 0, PAGE)
        refused(code, os.fsync, fd)
    [(name, why)] = reasons(mount, "r")
    assert name == errno.errorcode[code]
    assert why == f"fsync of {path}: {os.strerror(code)}"
    region.unmap(0, 16 * MIB)
    mount.until(lambda: not held(mount, fd), "it is let go")
    os.close(fd)
