"""Open files as the router serves them: how they are opened, read(), write(), fallocate().

For: what pyfuse3 has no call for (passthrough, fallocate), and what it has one for that does not
say who is asking (read, write) or may not wait (events).

``read`` and ``write`` of a region obey its table: a hole is ENXIO and a forbidden access EACCES,
after a short count for what lies before it (the rules table in ``docs/ioctl.md``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from msharefs.fuse.handlers import OpenPlan
from msharefs.region.errors import BadArgument, Unsupported
from msharefs.region.events import Event, EventKind
from msharefs.service.errors import IsADirectory, WouldBlock
from msharefs.service.handles import EventsHandle, RegionHandle, TextHandle

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from msharefs.fuse.handlers import OpenedFile
    from msharefs.fuse.wire import FallocateRequest, ReadRequest, WriteRequest
    from msharefs.service.changes import Changes
    from msharefs.service.handles import Handles

OFFSET_END = 1 << 63
"""No file offset reaches this (off_t is signed)."""


@attrs.frozen
class Files:
    """The handlers, over the same handles that the namespace opens."""

    _handles: Handles
    _changes: Changes

    def opened(self, opened: OpenedFile) -> OpenPlan:
        """How the kernel should treat a file that has just been opened."""
        handle = self._handles.get(opened.fh)
        if isinstance(handle, RegionHandle):
            return OpenPlan(backing_fd=handle.file.backing.fd, noflush=True)
        # Without a file position, a read that waits does not lock out others on the descriptor.
        return OpenPlan(stream=isinstance(handle, EventsHandle), noflush=True)

    def read(self, request: ReadRequest) -> bytes | Awaitable[bytes]:
        """FUSE_READ."""
        handle = self._handles.get(request.fh)
        if isinstance(handle, RegionHandle):
            return self._read_region(handle, request.offset, request.size)
        if isinstance(handle, TextHandle):
            return handle.read(request.offset, request.size)
        if not isinstance(handle, EventsHandle):
            raise IsADirectory("a directory")
        data = handle.reader.take(request.size)
        if data or not request.size or handle.reader.at_end:
            return data
        if request.nonblocking:
            raise WouldBlock("no event yet")
        return handle.reader.read(request.size)

    def write(self, request: WriteRequest) -> int:
        """FUSE_WRITE: how many bytes were taken."""
        handle = self._handles.get(request.fh)
        if isinstance(handle, RegionHandle):
            return self._write_region(handle, request)
        if isinstance(handle, EventsHandle):
            raise Unsupported("this mount holds no accesses that could be decided on")
        raise BadArgument("a file that the mount makes up")

    def fallocate(self, request: FallocateRequest) -> Awaitable[None]:
        """Mode 0 sets the size, as in the kernel series; it never shrinks. No other modes."""
        handle = self._handles.region(request.fh)
        if request.mode:
            raise Unsupported(f"fallocate mode {request.mode:#x}")
        end = request.offset + request.length
        if end >= OFFSET_END:
            raise BadArgument("offset plus length overflows")
        actor = handle.actor(request.pid)
        return self._changes.grow(handle.file, end, actor, "fallocate")

    def _read_region(self, handle: RegionHandle, offset: int, size: int) -> bytes:
        file = handle.file
        data = file.backing.read(offset, file.region.readable(offset, size))
        state = self._changes.state(file)
        state.count("read")
        state.count("read_bytes", len(data))
        return data

    def _write_region(self, handle: RegionHandle, request: WriteRequest) -> int:
        file = handle.file
        allowed = file.region.writable(request.offset, len(request.data))
        written = file.backing.write(request.offset, memoryview(request.data)[:allowed])
        self._changes.state(file).count("write_bytes", written)
        file.touch()
        actor, name = handle.actor(request.pid), file.region.name
        self._changes.tell(
            file, Event(EventKind.WRITE, name, actor, "write", request.offset, written)
        )
        return written
