"""What allots, finds, copies and syncs the data of open files, as the router serves it.

For: fallocate(2), lseek(2), copy_file_range(2), fsync(2). pyfuse3 has no call for the first three,
and can neither cancel the last nor hold more than a hundred that wait.

All of it obeys a region's table, as read() and write() do (``files.py``).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.memory.backing import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
)
from msharefs.region.errors import AccessHole, BadArgument, Unsupported
from msharefs.service.files import check_contents
from msharefs.service.handles import RegionHandle

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from msharefs.fuse.wire import CopyRequest, FallocateRequest, FsyncRequest, SeekRequest
    from msharefs.service.changes import Changes
    from msharefs.service.contents import Contents
    from msharefs.service.files import Files
    from msharefs.service.handles import Handles
    from msharefs.service.nodes import RegionFile

OFFSET_END: Final = 1 << 63
"""No file offset reaches this (off_t is signed)."""
COPIED_AT_ONCE: Final = 64 << 20
"""Bytes. copy_file_range(2) may be short, and so may be interrupted from time to time."""
_MODES: Final = frozenset(
    {
        0,
        FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_ZERO_RANGE,
        FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
    }
)
"""Of fallocate(2). The kernel itself refuses the others on FUSE, with EOPNOTSUPP."""


@attrs.frozen
class Ranges:
    """The handlers, over the same handles as ``files``."""

    _handles: Handles
    _changes: Changes
    _contents: Contents
    _files: Files

    def fallocate(self, request: FallocateRequest) -> Awaitable[None]:
        """Mode 0 sets the size, as in the kernel series; it never shrinks. No other modes.

        Where the mount's files are as tmpfs has them, mode 0 also gives memory to the range, and
        the modes are those of tmpfs and ZERO_RANGE.
        """
        handle = self._handles.region(request.fh)
        allocates = handle.file.region.semantics.allocates
        if request.mode and not (allocates and request.mode in _MODES):
            raise Unsupported(f"fallocate mode {request.mode:#x}")
        end = request.offset + request.length
        if end >= OFFSET_END:
            raise BadArgument("offset plus length overflows")
        actor = handle.actor(request.pid)
        self._changes.follow(handle.file)
        if allocates:
            return self._allocate(handle, request)
        if handle.file.region.semantics.sized_once:
            if request.offset:
                raise BadArgument(f"offset {request.offset:#x}: the size is all that can be set")
            return self._changes.resize(handle.file, end, actor, "fallocate")
        return self._changes.grow(handle.file, end, actor, "fallocate")

    async def _allocate(self, handle: RegionHandle, request: FallocateRequest) -> None:
        file, actor = handle.file, handle.actor(request.pid)
        offset, length, mode = request.offset, request.length, request.mode
        clears = bool(mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))

        def work() -> int:
            if self._contents.clear(file, offset, length) < length:
                raise Unsupported("a file lies there; fallocate() that")
            if clears:
                inside = max(min(length, file.region.limit - offset), 0)
                file.region.check_writable(offset, inside)
                file.backing.drop(offset, offset + length)
            if not mode & FALLOC_FL_PUNCH_HOLE:
                keep_size = bool(mode & FALLOC_FL_KEEP_SIZE)
                file.backing.allocate(offset, length, keep_size=keep_size)
            return 0 if mode & FALLOC_FL_KEEP_SIZE else offset + length

        try:
            await self._changes.growing_in_thread(file, work, actor, "fallocate")
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._files.leaving():
                raise
            await self._files.left()
            await self._changes.growing_in_thread(file, work, actor, "fallocate")
        if clears:
            self._files.wrote(handle, request.pid, "fallocate", offset, length)
        else:
            file.touch()

    def seek(self, request: SeekRequest) -> int | Awaitable[int]:
        """lseek(2) for SEEK_DATA and SEEK_HOLE: where memory has been touched, as tmpfs tells.

        Of a file that lies there it is what that file's filesystem tells.
        """
        handle = self._handles.get(request.fh)
        if not isinstance(handle, RegionHandle):
            raise BadArgument("a file that the mount makes up has no holes")
        self._changes.follow(handle.file)
        if request.offset >= handle.file.region.size:  # also what was negative
            raise AccessHole(f"{request.offset:#x} is past the region's end")
        if handle.file.region.table.files:
            later = self._contents.seek(handle.file, request.offset, request.whence, request.pid)
            return self._changes.waited_for(handle.actor(request.pid), later)
        try:
            found = handle.file.backing.seek(request.offset, request.whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise AccessHole(f"no data from {request.offset:#x} on") from None
            raise
        return min(found, handle.file.region.size)

    def fsync(self, request: FsyncRequest) -> Awaitable[None] | None:
        """The files that lie in the region, to their storage; memory has none."""
        handle = self._handles.get(request.fh)
        if not isinstance(handle, RegionHandle) or not handle.file.region.table.files:
            return None
        limit, tid = handle.file.region.limit, request.pid
        later = self._contents.sync(handle, 0, limit, tid, data_only=request.data_only)
        return self._changes.waited_for(handle.actor(tid), later)

    async def copy(self, request: CopyRequest) -> int:
        """copy_file_range(2) between two files of the mount: how many bytes were copied."""
        source, target = self._handles.get(request.fh), self._handles.get(request.target_fh)
        if not isinstance(source, RegionHandle) or not isinstance(target, RegionHandle):
            raise Unsupported("copied by the kernel's own means")  # which EOPNOTSUPP makes it do
        origin, file = source.file, target.file
        check_contents(file)
        self._changes.follow(origin)
        self._changes.follow(file)
        count = min(request.length, COPIED_AT_ONCE)
        count = origin.region.readable(request.offset, count)
        if not count:
            return 0
        via, actor = "copy_file_range", target.actor(request.pid)
        count = await self._files.admitted(origin, request.offset, count, False, actor, via)
        count = await self._files.admitted(file, request.target_offset, count, True, actor, via)
        clear = min(
            self._contents.clear(origin, request.offset, count),
            self._contents.clear(file, request.target_offset, count),
        )
        if count and not clear:
            return await self._copy_file(origin, target, request, count)
        count, copied = clear, 0  # a file is the next call's

        def work() -> int:
            nonlocal copied
            allowed = file.region.writable(request.target_offset, count)
            while copied < allowed:
                at, to = request.offset + copied, request.target_offset + copied
                taken = origin.backing.copy_to(file.backing, at, to, allowed - copied)
                if not taken:
                    break
                copied += taken
            return request.target_offset + copied

        await self._changes.growing_in_thread(file, work, actor, via)
        return self._files.wrote(target, request.pid, via, request.target_offset, copied)

    async def _copy_file(
        self, origin: RegionFile, target: RegionHandle, request: CopyRequest, count: int
    ) -> int:
        """What begins with a file, at either end."""
        count = target.file.region.writable(request.target_offset, count)
        later = self._contents.copy(
            origin, request.offset, target.file, request.target_offset, count, request.pid
        )
        copied = await self._changes.waited_for(target.actor(request.pid), later)
        via = "copy_file_range"
        return self._files.wrote(target, request.pid, via, request.target_offset, copied)
