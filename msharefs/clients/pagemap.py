"""Which pages of an address space were stored to since stores to them began to be noted.

For: ``written.py``. Leaves out: how they come to be noted (a userfaultfd with WP_ASYNC), and that
there is an address space to be asked about.

:func:`try_noting` finds out, on memory of this process, whether the kernel can do all that.

Source: ioctl PAGEMAP_SCAN in Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from typing import Final, TypeAlias

from msharefs.clients.arch import Number
from msharefs.clients.gone import Gone
from msharefs.clients.userfault import (
    PAGE,
    UFFD_USER_MODE_ONLY,
    Feature,
    Mode,
    Outcome,
    Userfault,
    UserfaultUnavailable,
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_NEEDED: Final = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_ASYNC
"""By itself; a client's descriptor has more."""

Range: TypeAlias = "tuple[int, int]"
"""``[start, end)``, addresses of a client, page-aligned."""

PAGEMAP_SCAN: Final = 0xC0606610
PM_SCAN_WP_MATCHING: Final = 1
PM_SCAN_CHECK_WPASYNC: Final = 2
PAGE_IS_WRITTEN: Final = 1 << 1
_SCAN: Final = struct.Struct("=12Q")
_FOUND: Final = struct.Struct("=3Q")
_AT_ONCE: Final = 512
"""Written ranges that one call can tell of."""


class NotNoted(Exception):
    """Stores to a range, or a part of it, are not noted: it is not registered."""


def scan(pagemap: int, start: int, end: int, *, rearm: bool) -> list[Range]:
    """The pages stored to in ``[start, end)`` of an address space, as ranges, lowest first.

    ``pagemap`` is its /proc/PID/pagemap. Not in it is what is not mapped. ``rearm``: note them
    anew from now on; each store is found by this scan or a later one. Raises NotNoted, Gone,
    OSError; waits for the owner's mmap_lock.
    """
    flags = PM_SCAN_CHECK_WPASYNC | (PM_SCAN_WP_MATCHING if rearm else 0)
    buffer = ctypes.create_string_buffer(_FOUND.size * _AT_ONCE)
    found: list[Range] = []
    while start < end:
        # Asking for nothing but WRITTEN counts pages that were reclaimed after a store as well.
        argument = bytearray(
            _SCAN.pack(
                _SCAN.size,
                flags,
                start,
                end,
                0,
                ctypes.addressof(buffer),
                _AT_ONCE,
                0,
                0,
                PAGE_IS_WRITTEN,
                0,
                PAGE_IS_WRITTEN,
            )
        )
        try:
            count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument)
        except OSError as error:
            if error.errno == errno.EPERM:
                raise NotNoted from error
            if error.errno == errno.ESRCH:
                raise Gone("the owner of a pagemap") from error
            raise
        for low, high, _ in _FOUND.iter_unpack(buffer.raw[: count * _FOUND.size]):
            if found and found[-1][1] == low:
                found[-1] = found[-1][0], high
            else:
                found.append((low, high))
        walked = _SCAN.unpack(argument)[4]
        if walked <= start:  # nothing is mapped there any more
            break
        start = walked
    return found


def try_noting() -> None:
    """Have the kernel note a store to memory of our own. Raises OSError if it cannot."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY
    fd = int(_libc.syscall(ctypes.c_long(Number.USERFAULTFD), ctypes.c_int(flags)))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    try:
        userfault = Userfault.negotiate(fd, user_mode_only=True, features=_NEEDED)
    except UserfaultUnavailable as error:
        raise OSError(errno.EOPNOTSUPP, str(error)) from error
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    memory = mmap.mmap(-1, PAGE)
    view = ctypes.c_char.from_buffer(memory)
    try:
        at = ctypes.addressof(view)
        outcomes = {userfault.register(at, PAGE, Mode.WP), userfault.protect(at, PAGE)}
        before = scan(pagemap, at, at + PAGE, rearm=False)
        memory[0] = 1
        after = scan(pagemap, at, at + PAGE, rearm=True)
    except NotNoted:
        outcomes, before, after = set(), [], []
    finally:
        del view
        userfault.close()
        memory.close()
        os.close(pagemap)
    if outcomes != {Outcome.SERVED} or before or after != [(at, at + PAGE)]:
        raise OSError(errno.EOPNOTSUPP, "stores are not noted")
