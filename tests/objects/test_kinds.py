"""Which files may be laid into a region: each kind that is refused, with its errno and the reason."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket

import pytest

from msharefs.client import Region
from tests.objects.conftest import PAGE, held, mapped_kinds, mounted, on_loop, reasons, refused, run

MFD_ALLOW_SEALING = 2
MFD_HUGETLB = 4
SYS_MEMFD_SECRET = 447
SYS_USERFAULTFD = 323
F_SEAL_FUTURE_WRITE = 0x10
FS_IOC_SETFLAGS = 0x40086602
FS_APPEND_FL = 0x20
O_PATH = 0o10000000

libc = ctypes.CDLL(None, use_errno=True)


def directory(place):
    return os.open(place, os.O_RDONLY)


def character_device(_place):
    return os.open("/dev/zero", os.O_RDWR)


def block_device(place):
    os.mknod(place / "b", 0o600 | 0o060000, os.makedev(7, 0))
    try:
        return os.open(place / "b", os.O_RDONLY)
    except OSError as error:
        pytest.skip(f"/dev/loop0 cannot be opened: {error}")


def pipe(_place):
    one, other = os.pipe()
    os.close(other)
    return one


def fifo(place):
    os.mkfifo(place / "f")
    return os.open(place / "f", os.O_RDWR)


def unix_socket(_place):
    return socket.socket(socket.AF_UNIX).detach()


def event_fd(_place):
    return os.eventfd(0)


def epoll_fd(_place):
    with select.epoll() as one:
        return os.dup(one.fileno())


def user_fault_fd(_place):
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
    assert fd >= 0
    return fd


def huge_memory(_place):
    try:
        return os.memfd_create("huge", MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"hugetlbfs is missing: {error}")


def secret_memory(_place):
    fd = libc.syscall(SYS_MEMFD_SECRET, 0)
    if fd < 0:
        pytest.skip(f"memfd_secret() is missing: {os.strerror(ctypes.get_errno())}")
    os.ftruncate(fd, PAGE)
    return fd


def proc_file(_place):
    return os.open("/proc/self/maps", os.O_RDONLY)


def sysfs_file(_place):
    return os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY)


def path_only(place):
    return os.open(file_of(place), O_PATH)


def write_only(place):
    return os.open(file_of(place), os.O_WRONLY)


def read_only(place):
    return os.open(file_of(place), os.O_RDONLY)


def append_only(place):
    """chattr +a: mmap(2) gives no shared mapping of what is open for writing."""
    fd = os.open(file_of(place), os.O_RDWR | os.O_APPEND)
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, ctypes.c_long(FS_APPEND_FL))
    return fd


def file_of(place):
    (place / "file").write_bytes(b"f" * PAGE)
    return place / "file"


KINDS = [
    (directory, "r--", errno.EINVAL, "the object is a directory, not a regular file"),
    (character_device, "rw-", errno.EINVAL, "the object is a character device,"),
    (block_device, "r--", errno.EINVAL, "the object is a block device,"),
    (pipe, "r--", errno.EINVAL, "the object is a pipe,"),
    (fifo, "rw-", errno.EINVAL, "the object is a pipe,"),
    (unix_socket, "r--", errno.EINVAL, "the object is a socket,"),
    (event_fd, "r--", errno.EINVAL, "the object is an anonymous kernel object,"),
    (epoll_fd, "r--", errno.EINVAL, "the object is an anonymous kernel object,"),
    (user_fault_fd, "r--", errno.EINVAL, "the object is an anonymous kernel object,"),
    (huge_memory, "rw-", errno.EINVAL, "the object lies on hugetlbfs"),
    (secret_memory, "rw-", errno.EINVAL, "the object is secret memory"),
    (proc_file, "r--", errno.EINVAL, "the object is a file of procfs"),
    (sysfs_file, "r--", errno.EINVAL, "the object is a file of sysfs"),
    (path_only, "r--", errno.EBADF, "the object's descriptor was opened with O_PATH"),
    (write_only, "r--", errno.EACCES, "the object's descriptor is not readable"),
    (write_only, "-w-", errno.EACCES, "the object's descriptor is not readable"),
    (read_only, "rw-", errno.EACCES, "PROT_WRITE, but the object's descriptor is not writable"),
    (append_only, "rw-", errno.EACCES, "mmap(2) of "),
    (append_only, "r--", errno.EACCES, "mmap(2) of "),
]


@pytest.mark.parametrize(
    ("make", "prot", "code", "reason"), KINDS, ids=[f"{k[0].__name__}-{k[1]}" for k in KINDS]
)
def test_what_is_no_shared_file_is_refused(mount, region, tmp_path, make, prot, code, reason):
    place = tmp_path / "place"
    place.mkdir()
    fd = make(place)
    before = held(mount, fd)  # anonymous inodes are all one
    try:
        refused(code, region.map, 0, PAGE, prot, fd=fd)
        assert mapped_kinds(region) == []
        [(name, why)] = reasons(mount, "r")
        assert name == errno.errorcode[code]
        assert why.startswith(reason)
        mount.until(lambda: held(mount, fd) <= before, "it is let go")
    finally:
        if make is append_only:
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, ctypes.c_long(0))
        os.close(fd)


def test_a_descriptor_that_is_not_open(mount, region):
    refused(errno.EBADF, region.map, 0, PAGE, "r--", fd=987)
    assert reasons(mount, "r") == [("EBADF", "descriptor 987 is not open in the calling process")]


def test_regions_do_not_nest(mount, start_mount, region):
    elsewhere = start_mount()
    with Region.create(elsewhere.path / "s", PAGE) as other:
        for inner in (region, other):
            refused(errno.EINVAL, region.map, 0, PAGE, "rw-", fd=inner.fd)
        with open(elsewhere.path / ".control/s/maps", "rb") as control:
            refused(errno.EINVAL, region.map, 0, PAGE, "r--", fd=control.fileno())
    assert {why for _, why in reasons(mount, "r")} == {
        "the object is a region itself; regions do not nest"
    }


# -- seals


@pytest.fixture
def sealed():
    """A memfd of two pages that may be sealed."""
    fd = os.memfd_create("sealed", MFD_ALLOW_SEALING)
    os.write(fd, b"s" * 2 * PAGE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, F_SEAL_FUTURE_WRITE])
def test_a_seal_against_writing_makes_an_object_read_only(mount, region, sealed, seal):
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, seal)
    refused(errno.EPERM, region.map, 0, PAGE, "rw-", fd=sealed)
    [(name, why)] = reasons(mount, "r")
    assert name == "EPERM"
    assert why.endswith("with rw-: Operation not permitted")
    region.map(0, PAGE, "r--", fd=sealed)
    assert os.pread(region.fd, 2, 0) == b"ss"
    refused(errno.EACCES, region.protect, 0, PAGE, "rw-")  # as mprotect(2) of such a mapping
    refused(errno.EACCES, os.pwrite, region.fd, b"x", 0)


def test_a_seal_against_writing_that_comes_later(region, sealed):
    """Nobody has mapped it, so it can be sealed; the filesystem has the last word."""
    region.map(0, PAGE, "rw-", fd=sealed)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    refused(errno.EPERM, os.pwrite, region.fd, b"x", 0)
    assert os.pread(region.fd, 2, 0) == b"ss"
    region.map(0, PAGE, "r--", fd=sealed)  # the same file, with other rights by now
    refused(errno.EACCES, region.protect, 0, PAGE, "rw-")


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
def test_a_seal_of_the_size_takes_no_right(region, sealed, seal):
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, seal)
    region.map(0, 4 * PAGE, "rw-", fd=sealed)
    assert os.pwrite(region.fd, b"x" * 3 * PAGE, 0) == 2 * PAGE
    assert os.pread(sealed, 3 * PAGE, 0) == b"x" * 2 * PAGE


# -- mounts


def test_a_noexec_mount_gives_nothing_to_execute(mount, region, tmp_path):
    with mounted(tmp_path / "noexec", "-t", "tmpfs", "-o", "noexec", "none") as place:
        fd = os.open(place / "object", os.O_RDWR | os.O_CREAT)
        refused(errno.EPERM, region.map, 0, PAGE, "r-x", fd=fd)
        assert reasons(mount, "r")[0][0] == "EPERM"
        region.map(0, PAGE, "rw-", fd=fd)
        refused(errno.EACCES, region.protect, 0, PAGE, "r-x")
        # The same file by a mount that lets it be executed is another matter.
        with mounted(tmp_path / "exec", "--bind", place):
            run("mount", "-o", "remount,bind,exec", tmp_path / "exec")
            region.map(PAGE, PAGE, "r-x", object=tmp_path / "exec/object")
            region.protect(PAGE, PAGE, "r--")
            region.unmap(0, 2 * PAGE)
            mount.until(lambda: not held(mount, fd), "it is let go")
        os.close(fd)


def test_a_read_only_filesystem(mount, region, tmp_path):
    with on_loop(tmp_path, "ext4", 8 << 20) as place:
        (place / "object").write_bytes(b"r" * PAGE)
        run("mount", "-o", "remount,ro", place)
        region.map(0, PAGE, "r--", object=place / "object")
        assert os.pread(region.fd, 2, 0) == b"rr"
        refused(errno.EROFS, region.map, 0, PAGE, "rw-", object=place / "object")  # by open()
        refused(errno.EACCES, region.protect, 0, PAGE, "rw-")
        os.fsync(region.fd)
        region.sync()
        fd = os.open(place / "object", os.O_RDONLY)
        region.unmap(0, PAGE)
        mount.until(lambda: not held(mount, fd), "it is let go")
        os.close(fd)


def test_a_file_whose_descriptor_appends_and_is_locked(region, tmp_path):
    """The region opens it anew: neither O_APPEND nor the lock is the region's."""
    path = tmp_path / "object"
    path.write_bytes(b"a" * PAGE)
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    fcntl.flock(fd, fcntl.LOCK_EX)
    region.map(0, PAGE, "rw-", fd=fd)
    os.close(fd)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert os.pwrite(region.fd, b"here", 100) == 4
    data = path.read_bytes()
    assert (data[100:104], len(data)) == (b"here", PAGE)
