"""Which files may be mapped into a region, and what of them.

Only what behaves as shared memory of a regular file: everything else either has no page cache to
share (devices, pipes, sockets), or rules of its own that a region could not keep (hugetlbfs,
secretmem), or would nest one table in another (a region). Source: the rules table in
``docs/ioctl.md``; mmap(2) for the access checks, and mmap(2) itself for what only the kernel knows
(seals, noexec mounts, files that cannot be mapped).

Everything here may block for as long as the object's filesystem likes: for threads.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs
import trio

from msharefs.abi import PAGE_SIZE, Prot
from msharefs.region.errors import BadDescriptor, BadObject, ObjectAccess, ObjectFailed
from msharefs.region.mapping import PROTS

HUGETLBFS_MAGIC: Final = 0x958458F6
SECRETMEM_MAGIC: Final = 0x5345434D
PROC_MAGIC: Final = 0x9FA0
SYSFS_MAGIC: Final = 0x62656572
TMPFS_MAGIC: Final = 0x01021994
FUSE_MAGIC: Final = 0x65735546
O_PATH: Final = 0o10000000
AT_EMPTY_PATH: Final = 0x1000
"""Source of the numbers: linux/magic.h, fcntl.h."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a symbolic link"),
)
_PLACES: Final = {
    HUGETLBFS_MAGIC: "lies on hugetlbfs; use the mount's huge= option instead",
    SECRETMEM_MAGIC: "is secret memory (memfd_secret)",
    PROC_MAGIC: "is a file of procfs, which has no content to share",
    SYSFS_MAGIC: "is a file of sysfs, which has no content to share",
}

Devices = Callable[[], frozenset[int]]
Identity = tuple[int, int, bytes]
"""What tells one file from another: device, inode, and the filesystem's own handle of it."""


@attrs.frozen
class Examined:
    """A file that may be mapped. ``fd`` is ours, to be closed by whoever gets this.

    It is open for writing if and only if ``max_prot``, the most that PROTECT may ever give, has
    WRITE. ``own``: the open file description is ours alone; else it is the caller's, whose status
    flags and position we do not touch. ``shmem``: it is memory, with no storage behind it.
    """

    fd: int
    identity: Identity
    max_prot: Prot
    shmem: bool
    own: bool
    path: str

    def discard(self) -> None:
        """Nobody wants it. Closing may block, so a thread does it."""
        trio.lowlevel.start_thread_soon(lambda: os.close(self.fd), lambda _outcome: None)


def examine(fd: int, prot: Prot, offset: int, region_devices: Devices) -> Examined:
    """Judge the file behind ``fd`` (our duplicate of the caller's) for a mapping with ``prot``.

    ``offset`` in bytes, page-aligned: where in the file the mapping would begin.
    ``region_devices`` tells the st_dev of mounts whose files are regions. Takes ``fd`` over, also
    when it raises: BadDescriptor (EBADF), BadObject (EINVAL), ObjectAccess (EACCES), or
    ObjectFailed with what mmap(2) says of that descriptor, in that order of the checks.
    """
    try:
        found = _examine(fd, prot, offset, region_devices)
    except BaseException:
        os.close(fd)
        raise
    if found.own:
        os.close(fd)
    return found


def _examine(fd: int, prot: Prot, offset: int, region_devices: Devices) -> Examined:
    mode = fcntl.fcntl(fd, fcntl.F_GETFL)
    if mode & O_PATH:
        raise BadDescriptor("the object's descriptor was opened with O_PATH")
    status = os.fstat(fd)
    magic = _check_kind(fd, status, region_devices)
    access = mode & os.O_ACCMODE
    if access == os.O_WRONLY:
        raise ObjectAccess("the object's descriptor is not readable")
    if prot & Prot.WRITE and access != os.O_RDWR:
        raise ObjectAccess("PROT_WRITE, but the object's descriptor is not writable")
    path = _path_of(fd)
    if code := _try_map(fd, prot, offset):
        reason = f"mmap(2) of {path} with {prot.text()}: {os.strerror(code)}"
        raise ObjectFailed(code, reason)
    most = _most(fd, offset, writable=access == os.O_RDWR)
    identity = (status.st_dev, status.st_ino, _handle_of(fd))
    own = _reopened(fd, writable=bool(most & Prot.WRITE))
    kept = fd if own is None else own
    return Examined(kept, identity, most, magic == TMPFS_MAGIC, own is not None, path)


def _check_kind(fd: int, status: os.stat_result, region_devices: Devices) -> int:
    """The magic number of the file's filesystem. Raises BadObject."""
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise BadObject(f"the object is {name}, not a regular file")
    if not stat.S_ISREG(status.st_mode):
        # eventfd, epoll, userfaultfd ...: an anonymous inode has no file type at all
        raise BadObject("the object is an anonymous kernel object, not a regular file")
    magic = _filesystem_magic(fd)
    if magic in {FUSE_MAGIC, 0} and status.st_dev in region_devices():
        raise BadObject("the object is a region itself; regions do not nest")
    if magic in _PLACES:
        raise BadObject(f"the object {_PLACES[magic]}")
    return magic


def _most(fd: int, offset: int, *, writable: bool) -> Prot:
    """What mappings of the file may be given, one after another: mmap(2) tells by trying."""
    most = Prot.READ
    for right in (Prot.WRITE, Prot.EXEC) if writable else (Prot.EXEC,):
        if not _try_map(fd, Prot.READ | right, offset):
            most |= right
    return PROTS[most]


def _try_map(fd: int, prot: Prot, offset: int) -> int:
    """Map a page and let it go. 0, or the errno."""
    address = _libc.mmap(None, PAGE_SIZE, int(prot), mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        return ctypes.get_errno()
    _libc.munmap(address, PAGE_SIZE)
    return 0


def _reopened(fd: int, *, writable: bool) -> int | None:
    """The same file by a description of our own, or None where we may not open it ourselves.

    With the caller's description we would share O_APPEND, O_DIRECT, the file position, and its
    flock() or OFD locks, which would outlive the caller's own close().
    """
    access = os.O_RDWR if writable else os.O_RDONLY
    try:
        return os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:  # chattr +a, another user's FUSE mount, NFS without root's rights
        return None


def _path_of(fd: int) -> str:
    """For people: as it was when somebody looked, seen from here."""
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return "?"


class _StatFs(ctypes.Structure):
    """struct statfs of statfs(2) on 64-bit Linux; only the type is of interest."""

    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_long * 30))


def _filesystem_magic(fd: int) -> int:
    """0 of a filesystem that does not say; those that matter here do."""
    buffer = _StatFs()
    if _libc.fstatfs(fd, ctypes.byref(buffer)):
        return 0
    return int(buffer.f_type) & 0xFFFFFFFF


class _FileHandle(ctypes.Structure):
    """struct file_handle of name_to_handle_at(2) with room for MAX_HANDLE_SZ."""

    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * 128),
    )


def _handle_of(fd: int) -> bytes:
    """What the filesystem itself tells its files apart by; empty if it has no such thing.

    Some filesystems (of FUSE, mostly) give several files one inode number.
    """
    handle, mount = _FileHandle(handle_bytes=128), ctypes.c_int()
    if _libc.name_to_handle_at(fd, b"", ctypes.byref(handle), ctypes.byref(mount), AT_EMPTY_PATH):
        return b""
    return bytes(handle.f_handle[: handle.handle_bytes])
