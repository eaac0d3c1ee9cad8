"""read() and write() of a region reach the files that lie in it, as far as those go."""

from __future__ import annotations

import errno
import os

import pytest

from msharefs.client import Region
from tests.objects.conftest import PAGE, held, mapped_kinds, refused


@pytest.fixture(params=["memfd", "file"])
def made(request, tmp_path):
    """A file of 8 pages, each full of its own number: in memory, on a disk."""
    if request.param == "memfd":
        fd = os.memfd_create("object")
    else:
        fd = os.open(tmp_path / "object", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, b"".join(bytes([page]) * PAGE for page in range(8)))
    yield fd
    os.close(fd)


def test_bytes_are_those_of_the_file_both_ways(region, made):
    region.map(0, 2 * PAGE, "rw-", fd=made)
    assert os.pread(region.fd, 2 * PAGE, 0) == bytes(PAGE) + b"\1" * PAGE
    os.pwrite(made, b"from the file", 10)
    assert os.pread(region.fd, 13, 10) == b"from the file"
    assert os.pwrite(region.fd, b"from the region", PAGE - 4) == 15
    assert os.pread(made, 15, PAGE - 4) == b"from the region"


def test_pieces_of_memory_and_files_are_one_read_and_one_write(region, made):
    region.map(0, 4 * PAGE, "rw-")
    region.map(PAGE, PAGE, "rw-", fd=made, object_offset=5 * PAGE)
    region.map(3 * PAGE, 2 * PAGE, "rw-", fd=made, object_offset=2 * PAGE)
    os.pwrite(region.fd, b"m" * PAGE, 0)
    expected = b"m" * PAGE + b"\5" * PAGE + bytes(PAGE) + b"\2" * PAGE + b"\3" * PAGE
    assert os.pread(region.fd, 16 * PAGE, 0) == expected
    data = os.urandom(5 * PAGE - 20)
    assert os.pwrite(region.fd, data, 10) == len(data)
    assert os.pread(region.fd, len(data), 10) == data
    assert os.pread(made, PAGE, 5 * PAGE) == data[PAGE - 10 : 2 * PAGE - 10]
    assert os.pread(made, PAGE, 2 * PAGE) == data[3 * PAGE - 10 : 4 * PAGE - 10]
    assert os.pread(made, PAGE, 0) == bytes(PAGE)


def test_what_lies_beyond_the_end_is_short_and_then_nothing(region, made):
    os.ftruncate(made, PAGE + 100)
    region.map(0, 3 * PAGE, "rw-", fd=made)
    region.map(3 * PAGE, PAGE, "rw-")
    assert os.pread(region.fd, 3 * PAGE, 0) == bytes(PAGE) + b"\1" * 100
    assert os.pwrite(region.fd, b"x" * PAGE, PAGE) == 100
    refused(errno.ENXIO, os.pread, region.fd, 10, PAGE + 100)
    refused(errno.ENXIO, os.pwrite, region.fd, b"x", PAGE + 100)
    refused(errno.ENXIO, os.pread, region.fd, 10, 2 * PAGE)
    assert os.fstat(made).st_size == PAGE + 100
    os.ftruncate(made, 3 * PAGE)
    assert os.pread(region.fd, 4 * PAGE, PAGE) == b"x" * 100 + bytes(3 * PAGE - 100)


def test_a_read_only_object_is_never_written(region, tmp_path):
    path = tmp_path / "object"
    path.write_bytes(b"a" * PAGE)
    fd = os.open(path, os.O_RDONLY)
    region.map(0, PAGE, "r--", fd=fd)
    os.close(fd)
    assert os.pread(region.fd, 3, 0) == b"aaa"
    refused(errno.EACCES, os.pwrite, region.fd, b"x", 0)
    refused(errno.EACCES, region.protect, 0, PAGE, "rw-")
    region.protect(0, PAGE, "r-x")
    assert path.read_bytes() == b"a" * PAGE


def test_the_table_tells_which_file_it_is(region, made):
    region.map(2 * PAGE, 3 * PAGE, "rw-", fd=made, object_offset=PAGE)
    region.protect(3 * PAGE, PAGE, "r--")
    status = os.fstat(made)
    found = region.query(3 * PAGE)
    assert (found.start, found.size, found.object_offset) == (3 * PAGE, PAGE, 2 * PAGE)
    assert found.object_ino == status.st_ino
    assert found.object_dev == (os.major(status.st_dev), os.minor(status.st_dev))
    assert mapped_kinds(region) == [
        (2 * PAGE, PAGE, "rw-", 2),
        (3 * PAGE, PAGE, "r--", 2),
        (4 * PAGE, PAGE, "rw-", 2),
    ]
    region.protect(3 * PAGE, PAGE, "rw-")
    assert mapped_kinds(region) == [(2 * PAGE, 3 * PAGE, "rw-", 2)]


def test_what_replaces_a_file_is_new(region, made):
    region.map(0, 2 * PAGE, "rw-")
    os.pwrite(region.fd, b"m" * 2 * PAGE, 0)
    region.map(0, 2 * PAGE, "rw-", fd=made, object_offset=6 * PAGE)
    assert os.pread(region.fd, PAGE, PAGE) == b"\7" * PAGE
    region.map(0, PAGE, "rw-")
    assert os.pread(region.fd, 2 * PAGE, 0) == bytes(PAGE) + b"\7" * PAGE
    region.unmap(PAGE, PAGE)
    refused(errno.ENXIO, os.pread, region.fd, 1, PAGE)
    assert os.pread(made, 2 * PAGE, 6 * PAGE) == b"\6" * PAGE + b"\7" * PAGE


def test_descriptors_are_one_for_each_file_and_go_with_their_last_mapping(mount, made):
    regions = [Region.create(mount.path / f"r{i}", 16 * PAGE) for i in range(3)]
    for region in regions:
        for page in range(0, 16, 2):
            region.map(page * PAGE, PAGE, "rw-", fd=made)
    mount.until(lambda: held(mount, made) == 1, "one descriptor")
    regions[0].unmap(0, 16 * PAGE)  # by unmapping
    regions[1].resize(0)  # by shrinking
    assert held(mount, made) == 1
    assert os.pread(regions[2].fd, 1, 0) == b"\0"
    os.unlink(mount.path / "r2")  # with its region
    for region in regions:
        region.close()
    mount.until(lambda: not held(mount, made), "none")
