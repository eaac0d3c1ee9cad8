"""Open files as the router serves them: how they are opened, read() and write().

For: what pyfuse3 has no call for (passthrough), and what it has one for that does not say who is
asking (read, write) or may not wait (events). What allots, finds, copies and syncs data is in
``ranges.py``.

All of it obeys a region's table: a hole is ENXIO and a forbidden access EACCES, after a short
count for what lies before it (the rules table in ``docs/ioctl.md``).
"""

from __future__ import annotations

import errno
import select
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import trio

from msharefs.abi import Prot
from msharefs.clients.identity import identify
from msharefs.fuse.handlers import OpenPlan
from msharefs.region.errors import AccessHole, BadArgument, RegionError
from msharefs.region.events import Event, EventKind
from msharefs.service.errors import IsADirectory, WouldBlock
from msharefs.service.handles import EventsHandle, PlacementHandle, RegionHandle, TextHandle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from msharefs.fuse.handlers import OpenedFile, Pending
    from msharefs.fuse.wire import (
        PollRequest,
        ReadRequest,
        WriteRequest,
    )
    from msharefs.region.events import Actor
    from msharefs.service.changes import Changes
    from msharefs.service.contents import Contents
    from msharefs.service.handles import Handles
    from msharefs.service.nodes import RegionFile
    from msharefs.service.notifications import Notifications, Owed

Hold: TypeAlias = "Callable[[RegionFile, Actor], Awaitable[None]]"
"""Told of an opener before it is answered; raises to refuse it."""

ALWAYS_READY: Final = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM
READABLE: Final = select.POLLIN | select.POLLRDNORM
LEAVING_PATIENCE: Final = 0.2
"""Seconds that a write may wait, on a full mount, for the memory of files that are going."""


@attrs.frozen
class Files:
    """The handlers, over the same handles that the namespace opens."""

    _handles: Handles
    _changes: Changes
    _contents: Contents
    _notifications: Notifications
    leaving: Callable[[], bool]
    """Whether there are nameless files that nobody has open, which the kernel has yet to forget."""

    _hold: Hold | None = None

    def opened(self, opened: OpenedFile) -> OpenPlan | Awaitable[OpenPlan]:
        """How the kernel should treat a file that has just been opened."""
        handle = self._handles.get(opened.fh)
        if isinstance(handle, RegionHandle):
            plan = self._plan(handle)
            if self._hold is None or self._changes.leaves_alone(handle.file):
                return plan
            return self._held(plan, self._hold(handle.file, handle.actor(opened.pid)))
        if isinstance(handle, PlacementHandle):
            return OpenPlan(backing_fd=handle.placement.fd, noflush=True)
        # Without a file position, a read that waits does not lock out others on the descriptor.
        return OpenPlan(stream=isinstance(handle, EventsHandle), noflush=True)

    async def _held(self, plan: OpenPlan, waiting: Awaitable[None]) -> OpenPlan:
        await waiting
        return plan

    def _plan(self, handle: RegionHandle) -> OpenPlan:
        file = handle.file
        native = file.region.semantics.native and self._changes.is_bare(file)
        if native and handle.access & Prot.WRITE and not file.native:
            file.native, file.written_ns = True, file.backing.state[1]
        # A write() may wait for somebody's word, or for the filesystem of a file that lies there.
        parallel = not file.region.semantics.grown
        return OpenPlan(
            backing_fd=file.backing.fd, direct_io=not native, noflush=True, parallel=parallel
        )

    def read(self, request: ReadRequest) -> bytes | Awaitable[bytes] | Pending:
        """FUSE_READ."""
        handle = self._handles.get(request.fh)
        if isinstance(handle, RegionHandle):
            check_contents(handle.file)
            self._changes.follow(handle.file)
            return self._read_region(handle, request)
        if isinstance(handle, TextHandle):
            return handle.read(request.offset, request.size)
        if not isinstance(handle, EventsHandle):
            raise IsADirectory("a directory")
        data = handle.reader.take(request.size)
        if data or not request.size or handle.reader.at_end:
            return data
        if request.nonblocking:
            raise WouldBlock("no event yet")
        return handle.reader.later(request.size)

    def write(self, request: WriteRequest) -> int | Awaitable[int]:
        """FUSE_WRITE: how many bytes were taken."""
        handle = self._handles.get(request.fh)
        if isinstance(handle, RegionHandle):
            check_contents(handle.file)
            self._changes.follow(handle.file)
            try:
                return self._write_region(handle, request)
            except OSError as error:
                if error.errno != errno.ENOSPC or not self.leaving():
                    raise
            return self._write_again(handle, request)
        if isinstance(handle, EventsHandle):
            holds = self._notifications.holds
            return holds.decide(request.data, handle.file, identify(request.pid))
        raise BadArgument("a file that the mount makes up")

    def poll(self, request: PollRequest, wake: Callable[[], None] | None) -> int:
        """Whether it is ready: events come by and by, and all else always is."""
        handle = self._handles.get(request.fh)
        if not isinstance(handle, EventsHandle):
            return ALWAYS_READY
        handle.disarm()
        if handle.reader.ready:
            return READABLE
        if wake is not None:
            handle.wake = wake
            handle.reader.call_when_ready(wake)
        return 0

    async def admitted(
        self, file: RegionFile, offset: int, length: int, store: bool, actor: Actor, via: str
    ) -> int:
        """How much of an access the watches let go, however long that takes."""
        if not self._changes.state(file).watches:
            return length
        admitted = self._notifications.admit(
            file, offset, length, store=store, actor=actor, via=via
        )
        return admitted if isinstance(admitted, int) else await admitted

    def _read_region(self, handle: RegionHandle, request: ReadRequest) -> bytes | Awaitable[bytes]:
        file, offset = handle.file, request.offset
        state = self._changes.state(file)
        state.count("read")  # refused ones too: each has come this far
        try:
            allowed = file.region.readable(offset, request.size)
        except RegionError:
            if state.watches:
                self._refused(handle, request, store=False, via="read")
            raise
        if allowed and state.watches:
            return self._read_watched(handle, request, allowed)
        return self._take(handle, request, allowed)

    def _take(
        self, handle: RegionHandle, request: ReadRequest, allowed: int
    ) -> bytes | Awaitable[bytes]:
        file, offset = handle.file, request.offset
        if file.region.table.files:
            data = self._contents.read(file, offset, allowed, request.pid)
            if not isinstance(data, bytes):
                return self._take_later(handle, request, data)
        else:
            data = file.backing.read(offset, allowed)
        self._changes.state(file).count("read_bytes", len(data))
        return data

    async def _take_later(
        self, handle: RegionHandle, request: ReadRequest, later: Awaitable[bytes]
    ) -> bytes:
        data = await self._changes.waited_for(handle.actor(request.pid), later)
        self._changes.state(handle.file).count("read_bytes", len(data))
        return data

    def _read_watched(
        self, handle: RegionHandle, request: ReadRequest, allowed: int
    ) -> bytes | Awaitable[bytes]:
        file, offset, actor = handle.file, request.offset, handle.actor(request.pid)
        admitted = self._notifications.admit(
            file, offset, allowed, store=False, actor=actor, via="read"
        )
        if isinstance(admitted, int):
            return self._take(handle, request, admitted)

        async def after() -> bytes:
            allowed = file.region.readable(offset, await admitted)
            data = self._take(handle, request, allowed)
            return data if isinstance(data, bytes) else await data

        return after()

    def _write_region(self, handle: RegionHandle, request: WriteRequest) -> int | Awaitable[int]:
        file, offset = handle.file, request.offset
        state = self._changes.state(file)
        try:
            allowed = file.region.writable(offset, len(request.data))
        except RegionError:
            state.count("write")  # else its event is counted
            if state.watches:
                self._refused(handle, request, store=True, via="write")
            raise
        if file.region.table.files and self._contents.clear(file, offset, allowed) < allowed:
            # Only memory grows with the region.
            allowed = min(allowed, max(file.region.size - offset, 0))
            if not allowed:
                raise AccessHole(f"{offset:#x} is past the region's end, where a file lies")
        if offset + allowed > file.region.size:
            if state.watches and offset < file.region.limit:
                return self._write_past_watched_end(handle, request)
            return self._write_past_end(handle, request)
        if state.watches:
            return self._write_watched(handle, request, allowed)
        return self._put(handle, request, allowed)

    def _put(
        self, handle: RegionHandle, request: WriteRequest, length: int
    ) -> int | Awaitable[int]:
        file, offset, data = handle.file, request.offset, memoryview(request.data)[:length]
        if file.region.table.files:
            written = self._contents.write(file, offset, data, request.pid)
            if not isinstance(written, int):
                return self._put_later(handle, request, written)
        else:
            written = file.backing.write(offset, data)
        return self.wrote(handle, request.pid, "write", offset, written)

    async def _put_later(
        self, handle: RegionHandle, request: WriteRequest, later: Awaitable[int]
    ) -> int:
        written = await self._changes.waited_for(handle.actor(request.pid), later)
        return self.wrote(handle, request.pid, "write", request.offset, written)

    def _write_watched(
        self, handle: RegionHandle, request: WriteRequest, allowed: int
    ) -> int | Awaitable[int]:
        file, offset, actor = handle.file, request.offset, handle.actor(request.pid)

        owed: list[Owed] = []

        async def after(later: Awaitable[int]) -> int:
            try:
                return await later
            finally:
                self._notifications.pay(owed)

        async def held(admitted: Awaitable[int]) -> int:
            length = file.region.writable(offset, await admitted)
            written = self._put(handle, request, length)
            return written if isinstance(written, int) else await written

        admitted = self._notifications.admit(
            file, offset, allowed, store=True, actor=actor, via="write", owed=owed
        )
        if isinstance(admitted, int):
            written = self._put(handle, request, file.region.writable(offset, admitted))
            if isinstance(written, int):
                self._notifications.pay(owed)
                return written
            return after(written)
        return after(held(admitted))

    def _refused(
        self, handle: RegionHandle, request: ReadRequest | WriteRequest, *, store: bool, via: str
    ) -> None:
        actor = handle.actor(request.pid)
        self._notifications.refused(handle.file, request.offset, store=store, actor=actor, via=via)

    def _write_past_end(self, handle: RegionHandle, request: WriteRequest) -> int | Awaitable[int]:
        file, offset = handle.file, request.offset
        written = 0

        def work() -> int:
            nonlocal written
            allowed = file.region.writable(offset, len(request.data))
            written = file.backing.write(offset, memoryview(request.data)[:allowed])
            return offset + written

        pending = self._changes.growing(file, work, handle.actor(request.pid), "write")
        if pending is None:
            return self.wrote(handle, request.pid, "write", offset, written)

        async def finished() -> int:
            await pending
            return self.wrote(handle, request.pid, "write", offset, written)

        return finished()

    async def _write_past_watched_end(self, handle: RegionHandle, request: WriteRequest) -> int:
        file, offset, actor = handle.file, request.offset, handle.actor(request.pid)
        inside = min(len(request.data), file.region.limit - offset)
        admitted = await self.admitted(file, offset, inside, True, actor, "write")
        if admitted < inside:
            request.data = request.data[:admitted]
        outcome = self._write_past_end(handle, request)
        return outcome if isinstance(outcome, int) else await outcome

    async def _write_again(self, handle: RegionHandle, request: WriteRequest) -> int:
        await self.left()
        outcome = self._write_region(handle, request)
        return outcome if isinstance(outcome, int) else await outcome

    async def left(self) -> None:
        """Wait for the memory of files that have been unlinked, or for too long.

        Their last close() or unlink() has returned, but the kernel tells us in its own time.
        """
        with trio.move_on_after(LEAVING_PATIENCE):
            while self.leaving():  # noqa: ASYNC110 - the namespace knows no trio, and it is rare
                await trio.sleep(LEAVING_PATIENCE / 100)

    def wrote(self, handle: RegionHandle, tid: int, via: str, offset: int, length: int) -> int:
        file = handle.file
        self._changes.state(file).count("write_bytes", length)
        file.touch()
        actor, name = handle.actor(tid), file.region.name
        self._changes.tell(file, Event(EventKind.WRITE, name, actor, via, offset, length))
        return length


def check_contents(file: RegionFile) -> None:
    if not file.region.semantics.contents:
        raise BadArgument("the kernel series has no read() or write() of a region")
