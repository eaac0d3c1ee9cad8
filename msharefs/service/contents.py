"""What read(), write() and their like find in a region: its own memory and the files laid over it.

For: carrying out what the table and the watches have let go (``files.py`` asks them), piece by
piece: memory at once, a file by a thread, since its filesystem may make us wait. A file in memory,
and what of any file is in the page cache, is read at once too.

Promises: a piece is judged by the table as it is when its turn comes. A file is never grown: bytes
of it exist up to its end, and beyond it an access is short, then ENXIO (AccessHole). What its
filesystem refuses is the caller's to hear (ObjectFailed), after a short count for what went well.

Leaves out: memory that comes with a change of size (``Changes.growing``), events.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from msharefs.abi import Kind
from msharefs.clients.identity import is_dying
from msharefs.region.errors import AccessHole, ObjectFailed, RegionError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from msharefs.memory.objects import FileObject, Objects
    from msharefs.service.changes import Changes
    from msharefs.service.handles import RegionHandle
    from msharefs.service.nodes import RegionFile

PATIENCE: Final = 10.0
"""Seconds that a call on a file goes on after a signal to its caller, or our own end, asked for
that. Calls on regular files are not interrupted by signals; but a filesystem may be dead."""
COPY_BUFFER: Final = 1 << 20
"""Bytes. Between two filesystems that cannot copy among themselves."""
_NO_COPY: Final = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


@attrs.frozen
class Piece:
    """``length`` bytes of a region: of a file from ``at`` on, or of its memory if that is None."""

    shown: FileObject | None
    at: int
    length: int


@attrs.frozen
class Contents:
    """Those of one mount's regions. Offsets and lengths in bytes, within a region."""

    _changes: Changes

    @property
    def _objects(self) -> Objects:
        return self._changes.objects

    def clear(self, file: RegionFile, offset: int, length: int) -> int:
        """How many bytes from ``offset`` on, up to ``length``, no file lies in."""
        table = file.region.table
        if table.files:
            for mapping in table.overlapping(offset, offset + length):
                if mapping.object.kind is Kind.FILE:
                    return max(mapping.start - offset, 0)
        return length

    def _piece(self, file: RegionFile, offset: int, end: int) -> Piece:
        mapping = file.region.table.at(offset)
        if mapping is None or mapping.object.kind is not Kind.FILE:
            return Piece(None, offset, self.clear(file, offset, end - offset))
        shown = self._objects.of(mapping.object.ident)
        at = offset - mapping.start + mapping.object_offset
        return Piece(shown, at, min(mapping.end, end) - offset)

    # -- read()

    def read(
        self, file: RegionFile, offset: int, length: int, tid: int
    ) -> bytes | Awaitable[bytes]:
        """Of a range that may be read throughout; ``tid`` asks. Raises as the module says."""
        end, taken = offset + length, bytearray()
        while offset + len(taken) < end:
            piece = self._piece(file, offset + len(taken), end)
            if piece.shown is None:
                data: bytes | None = file.backing.read(piece.at, piece.length)
            else:
                data = piece.shown.read_now(piece.at, piece.length)
            if data is None:
                return self._read_on(file, offset, end, taken, tid)
            taken += data
            if len(data) < piece.length:
                break
        return bytes(taken)

    async def _read_on(
        self, file: RegionFile, offset: int, end: int, taken: bytearray, tid: int
    ) -> bytes:
        """As :meth:`read`, from where something has to be waited for."""
        go_on = _while_alive(tid)
        while (now := offset + len(taken)) < end and not (taken and _cancelled()):
            try:
                allowed = file.region.readable(now, end - now)
                piece = self._piece(file, now, now + allowed)
                if piece.shown is None:
                    data = file.backing.read(piece.at, piece.length)
                else:
                    work = partial(_read, piece, piece.length)
                    data = await piece.shown.in_thread(work, go_on)
            except RegionError:
                if taken:
                    break
                raise
            taken += data
            if len(data) < piece.length or not data:
                break
        return bytes(taken)

    # -- write()

    def write(
        self, file: RegionFile, offset: int, data: bytes | memoryview, tid: int
    ) -> int | Awaitable[int]:
        """To a range that may be written throughout: how many bytes. Raises as the module says."""
        written, end = 0, offset + len(data)
        while offset + written < end:
            piece = self._piece(file, offset + written, end)
            if piece.shown is not None and not piece.shown.shmem:
                return self._write_on(file, offset, memoryview(data), written, tid)
            try:
                count = self._store(file, piece, memoryview(data)[written:])
            except (RegionError, OSError):
                if written:
                    break
                raise
            written += count
            if count < piece.length:
                break
        return written

    async def _write_on(
        self, file: RegionFile, offset: int, data: memoryview, written: int, tid: int
    ) -> int:
        """As :meth:`write`, from where something has to be waited for."""
        end, go_on = offset + len(data), _while_alive(tid)
        while (now := offset + written) < end and not (written and _cancelled()):
            try:
                allowed = file.region.writable(now, end - now)
                piece = self._piece(file, now, now + allowed)
                work = partial(self._store, file, piece, data[written:])
                if piece.shown is None:
                    count = work()
                else:
                    count = await self._storing(file, now, piece, work, go_on)
            except (RegionError, OSError):
                if written:
                    break
                raise
            written += count
            if count < piece.length:
                break
        return written

    async def _storing(
        self,
        file: RegionFile,
        offset: int,
        piece: Piece,
        work: Callable[[], int],
        go_on: Callable[[], bool],
        *,
        beside: FileObject | None = None,
    ) -> int:
        """A store to a file, of which a change that would forbid it must know."""
        assert piece.shown is not None
        stores = self._changes.state(file).stores
        store = stores.begin(offset, offset + piece.length)
        ended = partial(stores.end, store)
        return await piece.shown.in_thread(work, go_on, beside=beside, ended=ended)

    @staticmethod
    def _store(file: RegionFile, piece: Piece, data: memoryview) -> int:
        """Raises AccessHole at the end of a file."""
        if piece.shown is None:
            return file.backing.write(piece.at, data[: piece.length])
        count = piece.shown.write(piece.at, data[: piece.length])
        if not count and piece.length:
            raise AccessHole(f"{piece.shown.path} ends before {piece.at:#x}")
        return count

    # -- copy_file_range()

    async def copy(
        self,
        source: RegionFile,
        offset: int,
        target: RegionFile,
        target_offset: int,
        length: int,
        tid: int,
    ) -> int:
        """Copy some of what is one piece in either: how many bytes.

        Both ranges may be used throughout; memory is judged again when it is written to.
        """
        length = min(length, max(target.region.size - target_offset, 0))
        give = self._piece(source, offset, offset + length)
        take = self._piece(target, target_offset, target_offset + give.length)
        go_on, length = _while_alive(tid), min(take.length, COPY_BUFFER)
        if give.shown is None:
            data = source.backing.read(give.at, length)
            outcome = self.write(target, target_offset, data, tid)
            return outcome if isinstance(outcome, int) else await outcome
        if take.shown is None:
            data = await give.shown.in_thread(partial(_read, give, length), go_on)
            length = target.region.writable(target_offset, len(data))
            return target.backing.write(target_offset, data[:length])
        work = partial(_copy, give, take)
        return await self._storing(target, target_offset, take, work, go_on, beside=give.shown)

    # -- lseek()

    async def seek(self, file: RegionFile, offset: int, whence: int, tid: int) -> int:
        """SEEK_DATA or SEEK_HOLE: the next offset. Raises AccessHole if there is none."""
        size, go_on = file.region.size, _while_alive(tid)
        while offset < size:
            piece = self._piece(file, offset, size)
            work = partial(_seek, file, piece, whence)
            found = work() if piece.shown is None else await piece.shown.in_thread(work, go_on)
            if found < piece.at + piece.length:
                return offset + found - piece.at
            offset += piece.length
        if whence == os.SEEK_HOLE:
            return size
        raise AccessHole(f"no data from {offset:#x} on")

    # -- fsync()

    async def sync(
        self, handle: RegionHandle, start: int, end: int, tid: int, *, data_only: bool = False
    ) -> None:
        """Write the files in a range to their storage, as far as stores can have changed them.

        All are tried. Raises ObjectFailed with what the first of them said, and tells through each
        descriptor of each failure, also of one that somebody else's call has met.
        """
        found: dict[int, FileObject] = {}
        for mapping in handle.file.region.table.overlapping(start, end):
            if mapping.object.kind is Kind.FILE:
                shown = self._objects.of(mapping.object.ident)
                if shown.writable:
                    found[shown.ident] = shown
        go_on = _while_alive(tid)

        async def one(shown: FileObject) -> None:
            with contextlib.suppress(ObjectFailed):  # it is remembered
                await shown.in_thread(partial(shown.sync, data_only=data_only), go_on)

        async with trio.open_nursery() as nursery:
            for shown in found.values():
                nursery.start_soon(one, shown)
        failures: list[ObjectFailed] = []
        for shown in found.values():
            if shown.failure is not None:
                when, failure = shown.failure
                if when > handle.told.get(shown.ident, handle.since):
                    handle.told[shown.ident] = when
                    failures.append(failure)
        if failures:
            raise failures[0]


def _while_alive(tid: int) -> Callable[[], bool]:
    """Whether a call whose caller was signalled, or whose server ends, is to go on."""
    until: float | None = None

    def go_on() -> bool:
        nonlocal until
        now = trio.current_time()
        until = now + PATIENCE if until is None else until
        return now < until and not is_dying(tid)

    return go_on


def _cancelled() -> bool:
    return trio.current_effective_deadline() == -math.inf


def _read(piece: Piece, length: int) -> bytes:
    """Of a file. Raises AccessHole at its end."""
    assert piece.shown is not None
    data = piece.shown.read(piece.at, length)
    if not data and length:
        raise AccessHole(f"{piece.shown.path} ends before {piece.at:#x}")
    return data


def _room(piece: Piece) -> int:
    """How much of a file there is. Raises AccessHole if nothing."""
    assert piece.shown is not None
    room = piece.shown.size - piece.at
    if room <= 0:
        raise AccessHole(f"{piece.shown.path} ends before {piece.at:#x}")
    return min(room, piece.length)


def _copy(give: Piece, take: Piece) -> int:
    """copy_file_range(2) between two files, or its like where they know of no such thing."""
    assert give.shown is not None
    assert take.shown is not None
    length = min(_room(give), _room(take))
    if take.shown.own:
        try:
            return os.copy_file_range(give.shown.fd, take.shown.fd, length, give.at, take.at)
        except OSError as error:
            if error.errno not in _NO_COPY:
                code = error.errno or 0
                raise ObjectFailed(code, f"copy_file_range: {os.strerror(code)}") from error
    return take.shown.write(take.at, give.shown.read(give.at, min(length, COPY_BUFFER)))


def _seek(file: RegionFile, piece: Piece, whence: int) -> int:
    """Where in the piece's own terms; its end if nowhere in it."""
    end = piece.at + piece.length
    try:
        if piece.shown is None:
            return min(file.backing.seek(piece.at, whence), end)
        size = piece.shown.size
        if piece.at >= size:
            return piece.at if whence == os.SEEK_HOLE else end
        return min(piece.shown.seek(piece.at, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        raise
    except ObjectFailed as error:
        if error.code == errno.ENXIO:
            return end
        raise
