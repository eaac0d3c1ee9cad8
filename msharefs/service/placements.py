"""Placements: the files of ``.objects/`` by which a client is shown parts of a region.

For: the ranges of a region that show a file object, in the clients' address spaces. A client cannot
be given a descriptor from outside; so it is made to open a *placement* here, a file of the mount
that FUSE passes through to the object's own (or to the region's memory, to give a range back to
that), and to map it. Its loads and stores then meet the object's page cache and nothing else.

A placement stands for one region, one source (an object at one distance between the offsets, or
memory), and one right: whether what it is laid over might be stored to. So what a mapping shows is
told by its inode, whoever has it: a child that nobody saw being forked, too.

Promises: nobody can open one but a thread that the server has in hand, for that one and for just
that access; everybody else gets EACCES. What an object allows is not exceeded by it. A placement
holds its object, and keeps its region from being forgotten, until nobody is being shown it any more:
the kernel forgets an inode that is neither mapped nor open.

Leaves out: what is to be shown where (``region/demand.py``), who opens it (``clients/lay.py``).
Everything but :meth:`Placements.expect` and its like is for the loop.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from msharefs.clients.lay import Laid
from msharefs.clients.lay_many import expected
from msharefs.clients.shown import Placed, Shown
from msharefs.region.errors import ObjectAccess
from msharefs.service.errors import NoSuchName
from msharefs.service.nodes import OBJECTS_INO, OBJECTS_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from msharefs.clients.replica import Map
    from msharefs.clients.space import AddressSpace
    from msharefs.memory.objects import FileObject, Objects
    from msharefs.region.demand import Source
    from msharefs.service.nodes import Namespace, RegionFile

DIRECTORY_MODE: Final = stat.S_IFDIR | 0o711
"""To be passed through, not to be listed."""
MODE: Final = stat.S_IFREG | 0o666
"""Who may open one is not for the kernel to say: see :meth:`Placements.opened`."""

CROWDED: Final = 1024
"""Addresses at which something was laid: fewer are kept without looking which are left."""

_Key: TypeAlias = "tuple[int, Source, bool]"


@attrs.define(eq=False)
class Placement:
    """One file of ``.objects/``."""

    ino: int
    file: RegionFile
    shown: Shown
    object: FileObject | None
    """None: the region's own memory."""
    lookups: int = 0
    opens: int = 0
    pins: int = 0
    """How many are about to have it laid somewhere."""
    told: int = 0
    """The lookups that the kernel was told to end; it does once nothing needs the file."""
    listed: tuple[int, int] | None = None
    """Device and inode that its mappings are listed with, if not its own. Then they do not keep it."""
    shifts: dict[int, int] = attrs.field(factory=dict)
    """If so, where it was laid: addresses less offsets in it, and ``Placed.changes`` by then."""
    crowded: int = CROWDED
    """So many that it is worth looking which of them are left."""

    @property
    def flags(self) -> int:
        """How it is to be opened."""
        writes = self.shown.writable and (self.object is None or self.object.writable)
        return os.O_RDWR if writes else os.O_RDONLY

    @property
    def fd(self) -> int:
        return self.file.backing.fd if self.object is None else self.object.fd


class Placements:
    """All placements of a mount, the ``st_dev`` of which is ``device``."""

    def __init__(self, namespace: Namespace, objects: Objects, device: int) -> None:
        self._device = device
        self._namespace = namespace
        self._objects = objects
        self._by_ino: dict[int, Placement] = {}
        self._by_key: dict[_Key, Placement] = {}
        self.placed: Final = Placed()
        """What each stands for; it changes as they do."""
        self._expected: dict[int, tuple[int, int]] = {}
        """By thread: what it is about to open, and how."""
        self.drop_name: Callable[[int, bytes], None] = lambda _directory, _name: None
        """Tells the kernel to keep a name no longer; set where there is a connection to it."""

    def __len__(self) -> int:
        return len(self._by_ino)

    # -- to be laid

    def pin(self, file: RegionFile, source: Source, *, writable: bool) -> Placement:
        """The placement that shows ``source`` in this region, kept until :meth:`unpin`."""
        placement = self._by_key.get((file.ino, source, writable))
        if placement is None:
            placement = self._make(file, source, writable=writable)
        placement.pins += 1
        return placement

    def unpin(self, placement: Placement) -> None:
        placement.pins -= 1
        self._drop_if_unused(placement)

    @staticmethod
    def laid(placement: Placement, mount: bytes, steps: Sequence[Map]) -> Laid:
        """It, to be laid by a process that sees the mount at that path."""
        path = b"%s/%s/%d" % (mount, OBJECTS_NAME, placement.ino)
        return Laid(placement.ino, path, placement.flags, placement.shown.delta, steps)

    def record(self, placement: Placement, space: AddressSpace, steps: Iterable[Map]) -> None:
        """It is about to be laid there. To be told before, so that whoever looks knows it at once."""
        listed = placement.object.listed if placement.object is not None else None
        if listed is None or listed[0] == self._device:
            return
        placement.listed = listed
        for step in steps:
            shift = step.address - step.offset + placement.shown.delta
            self.placed.lay(listed, shift, placement.shown)
            placement.shifts[shift] = self.placed.changes
            if len(space.laid) > CROWDED:
                space.laid.clear()
            space.laid[*listed, shift] = placement.shown

    # -- to be let go of

    def elsewhere(self) -> list[Placement]:
        """Those which are mapped, or were, by mappings that do not keep them."""
        return [p for p in self._by_ino.values() if p.shifts and not p.pins]

    def keep_only(self, placement: Placement, seen: Container[int], since: int) -> None:
        """Somebody looked at everybody, and saw it at these shifts. ``since``: ``Placed.changes`` then.

        What was laid after that is kept. Not while anybody is about to lay it.
        """
        assert placement.listed is not None, "it has shifts"
        for shift, stamp in list(placement.shifts.items()):
            if stamp <= since and shift not in seen:
                del placement.shifts[shift]
                self.placed.lift(placement.listed, shift, placement.shown)
        placement.crowded = max(CROWDED, 2 * len(placement.shifts))
        self._drop_if_unused(placement)

    def idle(self) -> list[Placement]:
        """Those which the kernel may know for no reason any more."""
        return [
            placement
            for placement in self._by_ino.values()
            if not placement.pins and not placement.opens and placement.told != placement.lookups
        ]

    def let_go(self, placement: Placement) -> None:
        """Have the kernel forget it, as soon as nobody maps it."""
        placement.told = placement.lookups
        self.drop_name(OBJECTS_INO, b"%d" % placement.ino)

    # -- who is let in; from any thread

    def expect(self, tid: int, inode: int, flags: int) -> None:
        self._expected[tid] = inode, flags

    def expect_no_more(self, tid: int) -> None:
        self._expected.pop(tid, None)

    def may_map(self, tid: int, ino: int) -> bool:
        """Whether the thread is being made to map just that one."""
        return self._expecting(tid)[0] == ino

    def _expecting(self, tid: int) -> tuple[int, int]:
        return self._expected.get(tid) or expected(tid)

    # -- as the kernel sees them

    def get(self, ino: int) -> Placement | None:
        return self._by_ino.get(ino)

    def lookup(self, name: bytes) -> Placement:
        """Raises NoSuchName. Gives the kernel one reference more."""
        placement = self._by_ino.get(int(name)) if name.isdigit() else None
        if placement is None or str(placement.ino).encode() != name:
            raise NoSuchName(os.fsdecode(name))
        placement.lookups += 1
        return placement

    def opened(self, placement: Placement, flags: int, tid: int) -> None:
        """Raises ObjectAccess unless that thread is expected to do just that."""
        if self._expecting(tid) != (placement.ino, flags & os.O_ACCMODE):
            raise ObjectAccess(f".objects/{placement.ino} is not to be opened by hand")
        placement.opens += 1

    def closed(self, placement: Placement) -> None:
        placement.opens -= 1
        self._drop_if_unused(placement)

    def forget(self, ino: int, lookups: int) -> None:
        """The kernel lets go of ``lookups`` references (FUSE_FORGET). Nothing for other inodes."""
        placement = self._by_ino.get(ino)
        if placement is not None:
            placement.lookups = max(0, placement.lookups - lookups)
            placement.told = 0
            self._drop_if_unused(placement)

    def clear(self) -> None:
        """The mount has gone, and with it every reference."""
        placements = list(self._by_ino.values())
        self._by_ino.clear()
        self._by_key.clear()
        self.placed.by_inode.clear()
        for placement in placements:
            if placement.object is not None:
                self._objects.release(placement.object.ident)

    # -- helpers

    def _make(self, file: RegionFile, source: Source, *, writable: bool) -> Placement:
        ident, delta = source if source is not None else (0, 0)
        shown_object = self._objects.hold(ident) if source is not None else None
        ino = self._namespace.new_ino()
        placement = Placement(ino, file, Shown(file.ino, source, delta, writable), shown_object)
        file.lookups += 1  # the region is not forgotten as long as a part of it is shown
        self._by_ino[ino] = self._by_key[file.ino, source, writable] = placement
        self.placed.by_inode[ino] = placement.shown
        return placement

    def _drop_if_unused(self, placement: Placement) -> None:
        if placement.pins or placement.lookups or placement.opens or placement.shifts:
            return
        if self._by_ino.pop(placement.ino, None) is None:  # the mount has gone
            return
        del self.placed.by_inode[placement.ino]
        shown = placement.shown
        del self._by_key[shown.region, shown.source, shown.writable]
        if placement.object is not None:
            self._objects.release(placement.object.ident)
        self._namespace.forget(shown.region, 1)
