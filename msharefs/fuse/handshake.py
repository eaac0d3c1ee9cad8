"""INIT: what the kernel and the library behind us agree on, amended in both directions.

The library (libfuse, of any version 3) knows nothing of passthrough, and would negotiate frames too
long for a socket. It is offered less than the kernel offers; its answer is given what the kernel
offered to us. Source: struct fuse_init_in, struct fuse_init_out in the kernel's fuse.h.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

import attrs

from .wire import (
    IN_SIZE,
    INIT_IN,
    INIT_OUT,
    OUT_HEADER,
    OUT_SIZE,
    Frame,
    InitFlag,
    InitRequest,
    build_reply,
)

_WITHHELD: Final = (
    InitFlag.MAX_PAGES  # keeps frames at 128 KiB; a longer one needs a huge socket buffer each
    | InitFlag.WRITEBACK_CACHE  # excludes passthrough
    | InitFlag.SETXATTR_EXT  # would change a layout that we check
    | InitFlag.INIT_EXT  # flags2 is ours
)
_WANTED: Final = (
    InitFlag.PASSTHROUGH
    | InitFlag.HAS_RESEND
    | InitFlag.ABORT_ERROR  # tells an abort, after which the mount is still there, from unmount
)
_STACK_DEPTH: Final = 2
"""Backing files may lie on file systems stacked this deep: 1 is a plain one (tmpfs, ext4), 2 also
allows overlayfs, which is where a container's files are. The kernel allows no more."""
_MAX_BACKGROUND: Final = 0xFFFF
"""Requests in the background at once. Of the default, 12, a dozen asynchronous reads that wait
would leave nothing for anybody's RELEASE."""
_CONGESTION: Final = _MAX_BACKGROUND * 3 // 4
_LEGACY_INIT_OUT: Final = 24
"""The shortest body of a reply that a library speaking 7.22 or older gives."""


@attrs.frozen
class Connection:
    """What was agreed on. ``offered`` and ``flags`` are `InitFlag` bits, both words in one."""

    major: int
    minor: int
    offered: int
    flags: int
    max_write: int

    @property
    def passthrough(self) -> bool:
        return bool(self.flags & InitFlag.PASSTHROUGH)

    @property
    def resend(self) -> bool:
        """The kernel can be asked for the requests in flight (by a server that takes over)."""
        return bool(self.flags & InitFlag.HAS_RESEND)


def amend_init_request(frame: Frame) -> bytes:
    """The INIT request ``frame`` (decoded before, so known to be whole) as the library gets it."""
    amended = bytearray(frame)
    (flags,) = struct.unpack_from("<I", amended, IN_SIZE + 12)
    struct.pack_into("<I", amended, IN_SIZE + 12, flags & ~int(_WITHHELD))
    if len(amended) >= IN_SIZE + INIT_IN.size:
        struct.pack_into("<I", amended, IN_SIZE + 16, 0)
    return bytes(amended)


def amend_init_reply(frame: Frame, request: InitRequest) -> tuple[bytes, Connection]:
    """The library's reply to INIT as the kernel gets it, and what it comes to.

    Raises OSError (EPROTO) if the library refuses, or its reply is too short to be one.
    """
    error = OUT_HEADER.unpack_from(frame)[1]
    body = bytes(frame[OUT_SIZE:])
    if error or len(body) < _LEGACY_INIT_OUT:
        raise OSError(
            errno.EPROTO,
            f"libfuse and this kernel do not agree: INIT {request.major}.{request.minor} "
            f"answered with errno {-error} and {len(body)} bytes",
        )
    body = body[: INIT_OUT.size].ljust(INIT_OUT.size, b"\0")
    (major, minor, readahead, flags, _background, _congestion, max_write, gran, *rest) = (
        INIT_OUT.unpack(body)
    )
    max_pages, map_alignment, _flags2, _depth, timeout = rest
    flags &= ~int(_WITHHELD)
    flags |= request.flags & _WANTED
    depth = _STACK_DEPTH if flags & InitFlag.PASSTHROUGH else 0
    if flags >> 32:
        flags |= InitFlag.INIT_EXT
    payload = INIT_OUT.pack(
        major,
        minor,
        readahead,
        flags & 0xFFFF_FFFF,
        _MAX_BACKGROUND,
        _CONGESTION,
        max_write,
        gran,
        max_pages,
        map_alignment,
        flags >> 32,
        depth,
        timeout,
    )
    connection = Connection(major, minor, request.flags, flags, max_write)
    return build_reply(request.unique, payload), connection
