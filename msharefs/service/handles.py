"""Open files: what stands behind each file handle that the kernel holds."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.clients.identity import identify
from msharefs.memory.objects import stamp
from msharefs.region.region import READ_ONLY, READ_WRITE, WRITE_ONLY
from msharefs.service.errors import NotOpenForThat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from msharefs.abi import Prot
    from msharefs.region.events import Actor
    from msharefs.service.eventlog import Reader
    from msharefs.service.nodes import RegionFile
    from msharefs.service.placements import Placement

ACTORS_REMEMBERED: Final = 64
"""Threads per descriptor. A pool larger than that pays for a look into /proc now and then."""

_ACCESS: Final = {os.O_RDONLY: READ_ONLY, os.O_WRONLY: WRITE_ONLY, os.O_RDWR: READ_WRITE}


def access_of(flags: int) -> Prot:
    """What a descriptor opened with ``flags`` (open(2)) can give. 3 acts as O_RDWR."""
    return _ACCESS.get(flags & os.O_ACCMODE, READ_WRITE)


@attrs.define(eq=False)
class RegionHandle:
    """A descriptor of a region."""

    file: RegionFile
    access: Prot
    since: int = attrs.field(factory=stamp)
    told: dict[int, int] = attrs.field(factory=dict)
    """Up to which failure (``FileObject.failure``) fsync() has told of each file object; of none
    from before this descriptor was opened, as with any file."""
    _actors: dict[int, Actor] = attrs.field(factory=dict)

    def actor(self, tid: int) -> Actor:
        """Who the thread is, as of its first call through this descriptor.

        Remembered, because asking /proc costs more than most calls do.
        """
        known = self._actors.get(tid)
        if known is None:
            if len(self._actors) >= ACTORS_REMEMBERED:
                self._actors.clear()
            known = self._actors[tid] = identify(tid)
        return known


@attrs.define(eq=False)
class EventsHandle:
    """A descriptor of an events file, with its place in the stream."""

    reader: Reader
    file: RegionFile | None
    """The region whose events these are; None for the mount's."""
    wake: Callable[[], None] | None = None
    """Tells the kernel that a poll() may go on; set while one is armed."""

    def disarm(self) -> None:
        if self.wake is not None:
            self.reader.forget_call(self.wake)
            self.wake = None


@attrs.define(eq=False)
class TextHandle:
    """A descriptor of a text file made when it was opened, produced as far as it is read."""

    _pieces: Iterator[bytes]
    _made: bytearray = attrs.field(factory=bytearray)

    def read(self, offset: int, size: int) -> bytes:
        while len(self._made) < offset + size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._made += piece
        return bytes(self._made[offset : offset + size])


@attrs.define(eq=False)
class DirectoryHandle:
    """A listing as of opendir(): (name, inode), so that a change meanwhile disturbs nobody."""

    entries: list[tuple[bytes, int]]


@attrs.define(eq=False)
class PlacementHandle:
    """A descriptor of a file in ``.objects/``, there to be mapped and for nothing else."""

    placement: Placement


Handle = RegionHandle | EventsHandle | TextHandle | DirectoryHandle | PlacementHandle


class Handles:
    """Handles by the number that the kernel knows them by."""

    def __init__(self) -> None:
        self._by_number: dict[int, Handle] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._by_number)

    def add(self, handle: Handle) -> int:
        number, self._next = self._next, self._next + 1
        self._by_number[number] = handle
        return number

    def get(self, number: int) -> Handle:
        """Raises NotOpenForThat if there is none."""
        handle = self._by_number.get(number)
        if handle is None:
            raise NotOpenForThat(f"no open file {number}")
        return handle

    def region(self, number: int) -> RegionHandle:
        handle = self.get(number)
        if not isinstance(handle, RegionHandle):
            raise NotOpenForThat(f"open file {number} is no region")
        return handle

    def remove(self, number: int) -> Handle | None:
        return self._by_number.pop(number, None)

    def clear(self) -> None:
        """The session has ended: nobody may be told of events through it any more."""
        for handle in self._by_number.values():
            if isinstance(handle, EventsHandle):
                handle.disarm()
        self._by_number.clear()
