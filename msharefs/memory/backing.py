"""The file that holds a region's memory.

For: everything done to that memory from outside: sizing, dropping ranges, read() and write() on
the region. Programs map this file through FUSE passthrough, so loads and stores never come here.

Promises: one owner of the descriptor, close-on-exec from birth, -1 once closed; the memory itself
lives on in the kernel until the last mapping of it has gone.

Leaves out: what lies where (``region/``), how much a mount may use (``store.py``).
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

import attrs

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
FALLOC_FL_ZERO_RANGE: Final = 0x10
"""linux/falloc.h."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int


@attrs.define(eq=False)
class Backing:
    """Owns ``fd``. Offsets and sizes in bytes; errors of the kernel come as OSError."""

    fd: int

    def resize(self, size: int) -> None:
        """ftruncate(2): shrinking drops the memory past the end, in every process at once."""
        os.ftruncate(self.fd, size)

    def drop(self, start: int, end: int) -> None:
        """Free the memory of a range, in every process at once; it reads as zeroes after that."""
        self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, end - start)

    def allocate(self, offset: int, length: int, *, keep_size: bool = False) -> None:
        """Give memory to a range, growing the file to its end unless ``keep_size``.

        Raises OSError ENOSPC, having given none.
        """
        self._fallocate(FALLOC_FL_KEEP_SIZE if keep_size else 0, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2). EINTR cannot be meant for us: whose call this is, is another's thread."""
        while _libc.fallocate(self.fd, mode, offset, length):
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, f"fallocate mode {mode}: {os.strerror(code)}")

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2) for SEEK_DATA and SEEK_HOLE: the next offset. Raises OSError ENXIO past it."""
        return os.lseek(self.fd, offset, whence)

    def copy_to(self, other: Backing, offset: int, other_offset: int, count: int) -> int:
        """copy_file_range(2): how many bytes were copied, 0 at this file's end."""
        return os.copy_file_range(self.fd, other.fd, count, offset, other_offset)

    def holds_data(self, start: int, end: int) -> bool:
        """Whether any page of the range has been touched since it was last dropped."""
        try:
            return os.lseek(self.fd, start, os.SEEK_DATA) < end
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise

    @property
    def allocated(self) -> int:
        """Bytes of memory in use."""
        return os.fstat(self.fd).st_blocks * 512

    @property
    def state(self) -> tuple[int, int]:
        """Size in bytes, and when the content last changed by a call (ns since the epoch)."""
        found = os.fstat(self.fd)
        return found.st_size, found.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, offset)

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """As pwrite(2): may be short; raises OSError ENOSPC when memory has run out."""
        return os.pwrite(self.fd, data, offset)

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
