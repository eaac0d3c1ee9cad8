"""A node's attributes as the kernel takes them: in the replies to LOOKUP, CREATE and GETATTR.

The source of the layouts is the kernel's ``include/uapi/linux/fuse.h``, as of protocol 7.9: struct
fuse_attr, fuse_entry_out and fuse_attr_out.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from .wire import ENTRY_OUT_SIZE

_ATTR: Final = "QQQQQQIIIIIIIIII"
"""ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize,
flags."""
_ENTRY_OUT: Final = struct.Struct("<QQQQII" + _ATTR)
"""nodeid, generation, how long the name and the attributes hold, in seconds and nanoseconds."""
_ATTR_OUT: Final = struct.Struct("<QII" + _ATTR)
"""How long the attributes hold, in seconds and nanoseconds, padding."""
_BILLION: Final = 1_000_000_000

assert _ENTRY_OUT.size == ENTRY_OUT_SIZE


@attrs.define
class Attributes:
    """What stat(2) says of a node, and for how long.

    Size and ``block_size`` in bytes, ``blocks`` of 512 bytes each, times in ns since the epoch.
    ``name_holds_ns``, ``holds_ns``: for how long the kernel need not ask again for the name that
    led here, and for these attributes. It counts in ticks (of 1 to 10 ms), and rounds up.
    """

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    block_size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    name_holds_ns: int = 0
    holds_ns: int = 0

    def as_entry(self) -> bytes:
        """The body of a reply to LOOKUP: struct fuse_entry_out."""
        name, name_ns = divmod(self.name_holds_ns, _BILLION)
        attr, attr_ns = divmod(self.holds_ns, _BILLION)
        return _ENTRY_OUT.pack(self.ino, 0, name, attr, name_ns, attr_ns, *self._fields())

    def as_reply(self) -> bytes:
        """The body of a reply to GETATTR: struct fuse_attr_out."""
        return _ATTR_OUT.pack(*divmod(self.holds_ns, _BILLION), 0, *self._fields())

    def _fields(self) -> tuple[int, ...]:
        atime, atime_ns = divmod(self.atime_ns, _BILLION)
        mtime, mtime_ns = divmod(self.mtime_ns, _BILLION)
        ctime, ctime_ns = divmod(self.ctime_ns, _BILLION)
        return (
            self.ino,
            self.size,
            self.blocks,
            atime & _MASK,
            mtime & _MASK,
            ctime & _MASK,
            atime_ns,
            mtime_ns,
            ctime_ns,
            self.mode,
            self.nlink,
            self.uid,
            self.gid,
            0,
            self.block_size,
            0,
        )


_MASK: Final = (1 << 64) - 1
"""Seconds before the epoch travel as two's complement."""
