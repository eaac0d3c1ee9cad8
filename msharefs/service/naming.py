"""Opening, closing, and the names of files, as the router serves them.

For: what a program's open(), fstat(), close() and unlink() ask, answered at once
(``fuse/naming.py``); and the part of it that the pyfuse3 operations share (:class:`Opens`).

The kernel checks permissions (``default_permissions``) and keeps names and directory attributes
for as long as it likes, since all changes pass through it. A region's attributes are asked for
each time, since its ``st_blocks`` changes with every page that a program touches; but for a tick of
the clock where reads and writes go past us (``Semantics.native``) and nothing is laid over it. An
open() and fstat() asks for them twice.

Leaves out: what the mount makes up (``control.py``), and whatever has to wait: those requests are
left to ``filesystem.py``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.abi import PAGE_SIZE
from msharefs.clients.identity import identify
from msharefs.fuse.attributes import Attributes
from msharefs.fuse.handlers import FORWARD, Forward
from msharefs.region.errors import RegionError
from msharefs.region.events import NOBODY, Actor, Event, EventKind
from msharefs.service.errors import NotADirectory, Reserved
from msharefs.service.handles import EventsHandle, PlacementHandle, RegionHandle, access_of
from msharefs.service.nodes import OBJECTS_INO, RESERVED_NAMES, Directory, RegionFile
from msharefs.service.placements import DIRECTORY_MODE, MODE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msharefs.fuse.wire import GetattrRequest, NameRequest, OpenRequest
    from msharefs.service.changes import Changes
    from msharefs.service.handles import Handles
    from msharefs.service.holds import Holds
    from msharefs.service.nodes import Namespace, Node
    from msharefs.service.placements import Placement, Placements

FOR_EVER: Final = 86_400 * 10**9
"""Nanoseconds that the kernel may keep a name, or a directory's attributes."""
A_TICK: Final = 1
"""The same for the shortest time that there is: of the kernel's clock, some milliseconds."""


@attrs.frozen
class Opens:
    """Opens and closes regions, and tells of it."""

    _names: Namespace
    _handles: Handles
    _changes: Changes
    _holds: Holds
    placements: Placements | None = None
    """The files of ``.objects/``; None on a mount that shows nobody a file."""

    def open(self, file: RegionFile, flags: int, tid: int, *, created: bool = False) -> int:
        """A new handle's number. Raises ModeTooNarrow."""
        self._changes.follow(file)
        access = access_of(flags)
        handle = RegionHandle(file, access)
        actor = handle.actor(tid)
        try:
            file.region.opened(access)
        except RegionError as error:
            self._changes.refuse(file, actor, "open", "EACCES", str(error))
            raise
        file.opens += 1
        self._changes.opened(file, actor.pid)
        detail = (("access", access.text()[:2]), ("created", int(created)))
        self._changes.tell(
            file, Event(EventKind.OPEN, file.region.name, actor, "open", detail=detail)
        )
        return self._handles.add(handle)

    def close(self, number: int) -> None:
        """Let go of an open file. Nothing if that was done already."""
        handle = self._handles.remove(number)
        if isinstance(handle, EventsHandle):
            handle.disarm()
            self._holds.closed(handle.file)
        elif isinstance(handle, PlacementHandle) and self.placements is not None:
            self.placements.closed(handle.placement)
        elif isinstance(handle, RegionHandle):
            handle.file.region.closed(handle.access)
            self._changes.closed(handle.file)
            handle.file.opens -= 1
            self._changes.follow(handle.file)
            handle.file.native = handle.file.native and handle.file.opens > 0
            self._names.drop_if_dead(handle.file)

    def unlinked(self, file: RegionFile, path: str, tid: int, via: str) -> None:
        """Tell of a name that has gone, then let go of the region if that was its last user."""
        self._changes.tell(file, Event(EventKind.UNLINK, path, actor_of(tid), via))
        self._names.drop_if_dead(file)

    def open_placement(self, placement: Placement, flags: int, tid: int) -> int:
        """A new handle's number. Raises ObjectAccess for everybody who is not made to do that."""
        assert self.placements is not None, "whose placement it is"
        self.placements.opened(placement, flags, tid)
        return self._handles.add(PlacementHandle(placement))

    def placement_attributes(self, placement: Placement | None) -> Attributes:
        """Of a file in ``.objects/``, or of the directory itself."""
        root = self._names.root
        return Attributes(
            OBJECTS_INO if placement is None else placement.ino,
            DIRECTORY_MODE if placement is None else MODE,
            2 if placement is None else 1,
            root.uid,
            root.gid,
            0,
            0,
            PAGE_SIZE,
            root.ctime_ns,
            root.ctime_ns,
            root.ctime_ns,
            FOR_EVER if placement is None else 0,
            FOR_EVER,
        )

    def attributes(self, node: Node) -> Attributes:
        """Of a node that is not made up, as of now."""
        if isinstance(node, RegionFile):
            self._changes.follow(node)
            blocks = node.backing.allocated // 512
            brief = node.region.semantics.native and self._changes.is_bare(node)
            holds = A_TICK if brief else 0
        else:
            holds, blocks = FOR_EVER, 0
        return Attributes(
            node.ino,
            node.mode,
            node.nlink,
            node.uid,
            node.gid,
            node.size,
            blocks,
            PAGE_SIZE,
            node.atime_ns,
            node.mtime_ns,
            node.ctime_ns,
            FOR_EVER,
            holds,
        )


@attrs.frozen
class Naming:
    """The handlers. They leave whatever is not of ``names`` to the filesystem."""

    _names: Namespace
    _opens: Opens

    def lookup(self, request: NameRequest) -> Attributes | Forward:
        placements = self._opens.placements
        if request.nodeid == OBJECTS_INO and placements is not None:
            return self._opens.placement_attributes(placements.lookup(request.name))
        directory, name = self._names.find(request.nodeid), request.name
        if directory is self._names.root and name in RESERVED_NAMES:
            return FORWARD
        if not isinstance(directory, Directory):
            return FORWARD
        return self._entry(self._names.lookup(directory, name))

    def getattr(self, request: GetattrRequest) -> Attributes | Forward:
        node = self._names.find(request.nodeid)
        return FORWARD if node is None else self._opens.attributes(node)

    def create(self, request: OpenRequest) -> tuple[Attributes, int]:
        directory = self._directory(request.nodeid)
        file = self._names.create_region(
            directory, request.name, request.mode, request.uid, request.gid
        )
        number = self._opens.open(file, request.flags, request.pid, created=True)
        return self._entry(file), number

    def open(self, request: OpenRequest) -> int | Forward:
        placements = self._opens.placements
        placement = None if placements is None else placements.get(request.nodeid)
        if placement is not None:
            return self._opens.open_placement(placement, request.flags, request.pid)
        file = self._names.find_region(request.nodeid)
        if file is None or request.flags & os.O_TRUNC:  # cutting it short has to wait
            return FORWARD
        return self._opens.open(file, request.flags, request.pid)

    def unlink(self, request: NameRequest) -> None:
        directory, name = self._directory(request.nodeid), request.name
        path = self._names.lookup(directory, name).path if name in directory.entries else ""
        node = self._names.unlink(directory, name)
        if isinstance(node, RegionFile):
            self._opens.unlinked(node, path, request.pid, "unlink")
        else:
            self._names.drop_if_dead(node)

    def forget(self, lookups: Sequence[tuple[int, int]]) -> None:
        for ino, count in lookups:
            self._names.forget(ino, count)
            if self._opens.placements is not None:
                self._opens.placements.forget(ino, count)

    def _directory(self, ino: int) -> Directory:
        found = self._names.find(ino)
        if found is None:
            raise Reserved("belongs to the mount")
        if not isinstance(found, Directory):
            raise NotADirectory(found.path)
        return found

    def _entry(self, node: Node) -> Attributes:
        """Attributes in a reply that gives the kernel one more reference to the node."""
        node.lookups += 1
        return self._opens.attributes(node)


def actor_of(tid: int) -> Actor:
    """Who the thread is; NOBODY for 0."""
    return identify(tid) if tid else NOBODY
