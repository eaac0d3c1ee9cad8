"""Map a file of the mount into the server itself, for a moment, to see how that goes.

For: finding out before a client is bothered whether FUSE can pass a file through at all (ELOOP with
too many filesystems stacked below), and as which file a mapping of it is listed in
``/proc/PID/maps``. That is the file of the mount, unless the filesystem below puts a file of its own
into each mapping, as overlayfs does.

Promises: nothing is left mapped or open. Blocks for as long as the file's filesystem likes, and the
open() comes to this very server: for a thread that the loop does not wait for.

Leaves out: letting the thread in (``lay.Door``). Source: proc_pid_maps(5).
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING, Final

from msharefs.abi import PAGE_SIZE
from msharefs.clients.lay import MAP_SHARED_FIXED
from msharefs.clients.procmap import READ_FLAGS, listed_at

if TYPE_CHECKING:
    from msharefs.abi import Prot
    from msharefs.clients.lay import Door

MAP_SHARED: Final = MAP_SHARED_FIXED & 0xF

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
_FAILED: Final = ctypes.c_void_p(-1).value


def listed_as(
    path: bytes, inode: int, flags: int, prot: Prot, offset: int, door: Door
) -> tuple[int, int]:
    """The device (as ``st_dev``) and inode that a mapping of one page of the file is listed with.

    ``inode`` and ``flags`` as ``door`` expects them; ``offset`` in bytes, page-aligned. Raises
    OSError with what open(2) or mmap(2) says.
    """
    tid = threading.get_native_id()
    door.expect(tid, inode, flags)
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return _listed_as(fd, prot, offset)
        finally:
            os.close(fd)
    finally:
        door.expect_no_more(tid)


def _listed_as(fd: int, prot: Prot, offset: int) -> tuple[int, int]:
    address = _libc.mmap(None, PAGE_SIZE, int(prot), MAP_SHARED, fd, offset)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        maps = os.open("/proc/self/maps", READ_FLAGS)
        try:
            return listed_at(maps, address)
        finally:
            os.close(maps)
    finally:
        _libc.munmap(address, PAGE_SIZE)
