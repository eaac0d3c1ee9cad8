"""Which files may be mapped into a region.

Only what behaves as shared memory of a regular file: everything else either has no page cache to
share (devices, pipes, sockets), or rules of its own that a region could not keep (hugetlbfs,
secretmem), or would nest one table in another (a region). Source: the rules table in
``docs/ioctl.md``; mmap(2) for the access checks.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
from typing import Final

from msharefs.abi import Kind, Prot
from msharefs.region.errors import BadDescriptor, BadObject, ObjectAccess
from msharefs.region.mapping import ObjectRef

HUGETLBFS_MAGIC: Final = 0x958458F6
SECRETMEM_MAGIC: Final = 0x5345434D
O_PATH: Final = 0o10000000
"""Source of the magic numbers: linux/magic.h."""

_libc = ctypes.CDLL(None, use_errno=True)

_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a symbolic link"),
)


def examine(fd: int, prot: Prot, region_devices: frozenset[int]) -> tuple[ObjectRef, Prot]:
    """Judge the file behind ``fd`` (our duplicate of the caller's) for a mapping with ``prot``.

    ``region_devices`` are the st_dev of mounts whose files are regions. Returns the object and
    the most that PROTECT may give it. Raises BadObject (EINVAL), BadDescriptor (EBADF) or
    ObjectAccess (EACCES), in that order of the checks.
    """
    mode = fcntl.fcntl(fd, fcntl.F_GETFL)
    if mode & O_PATH:
        raise BadDescriptor("the object's descriptor was opened with O_PATH")
    status = os.fstat(fd)
    _check_kind(fd, status, region_devices)
    access = mode & os.O_ACCMODE
    if access == os.O_WRONLY:
        raise ObjectAccess("the object's descriptor is not readable")
    if prot & Prot.WRITE and access != os.O_RDWR:
        raise ObjectAccess("PROT_WRITE, but the object's descriptor is not writable")
    most = Prot.READ | Prot.EXEC
    if access == os.O_RDWR:
        most |= Prot.WRITE
    device = status.st_dev
    return (
        ObjectRef(
            Kind.FILE,
            dev_major=os.major(device),
            dev_minor=os.minor(device),
            ino=status.st_ino,
        ),
        most,
    )


def _check_kind(fd: int, status: os.stat_result, region_devices: frozenset[int]) -> None:
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise BadObject(f"the object is {name}, not a regular file")
    if not stat.S_ISREG(status.st_mode):
        # eventfd, epoll, userfaultfd ...: an anonymous inode has no file type at all
        raise BadObject("the object is an anonymous kernel object, not a regular file")
    if status.st_dev in region_devices:
        raise BadObject("the object is a region itself; regions do not nest")
    magic = _filesystem_magic(fd)
    if magic == HUGETLBFS_MAGIC:
        raise BadObject("the object lies on hugetlbfs; use the mount's huge= option instead")
    if magic == SECRETMEM_MAGIC:
        raise BadObject("the object is secret memory (memfd_secret)")


class _StatFs(ctypes.Structure):
    """struct statfs of statfs(2) on 64-bit Linux; only the type is of interest."""

    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_long * 30))


def _filesystem_magic(fd: int) -> int:
    buffer = _StatFs()
    if _libc.fstatfs(fd, ctypes.byref(buffer)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(buffer.f_type) & 0xFFFFFFFF
