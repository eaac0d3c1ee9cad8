"""What a process sees of a region through files that stand for parts of it.

For: a region's range that shows a file object is, in a client, a mapping of another file of the
mount than the region's own (a *placement*). Whoever looks at a client wants to know of it as a
mapping of the region, at the region's offset.

Promises: no I/O. A mapping of a placement says by its inode alone which region it belongs to, what it
shows, and whether the client may be given a right to store there: so it is known after a fork too,
and nobody has to remember what was laid where. Where the filesystem of the object puts a file of its
own into the mapping (overlayfs), /proc/PID/maps lists that file instead; those mappings are known
by the addresses at which they were laid, which a fork keeps as well. One that its process moves with
mremap(2) is lost.

Leaves out: making placements, and opening them (the service does), laying them (lay.py).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from msharefs.clients.procmap import MappedRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from msharefs.region.demand import Source


@attrs.frozen
class Shown:
    """What one placement stands for.

    ``region``: the region's inode. ``delta``: the offset in the region minus that in the placement,
    bytes. ``writable``: what it was laid over might be stored to, as far as the client's own
    descriptor of the region goes, whatever the object allows.
    """

    region: int
    source: Source
    delta: int
    writable: bool


class Placed:
    """All placements of a mount. May be changed by another thread while it is being read.

    A mapping of a placement is listed with the placement's own inode, or, where the filesystem
    below puts a file of its own into the mapping, with that file's device and inode. Then it is
    known by its *shift*: its address less the offset in that file, as it was laid, which a fork
    keeps and a mapping that somebody else makes of the same file has by no chance worth speaking of.
    """

    def __init__(self) -> None:
        self.by_inode: Final[dict[int, Shown]] = {}
        self.devices: tuple[int, ...] = ()
        """Of the files (as ``st_dev``) that mappings are listed with instead."""
        self.changes = 0
        """Goes up as what such mappings stand for changes."""
        self.doubtful = False
        """Whether anywhere one shift stands for two placements."""
        self._elsewhere: dict[tuple[int, int], dict[int, tuple[Shown, ...]]] = {}

    def __len__(self) -> int:
        return len(self.by_inode)

    def lay(self, listed: tuple[int, int], shift: int, shown: Shown) -> None:
        """Mappings listed with that device and inode, of that shift, are ``shown`` from now on."""
        shifts = self._elsewhere.get(listed)
        if shifts is None:
            shifts = self._elsewhere[listed] = {}
            self._look_at_devices()
        others = tuple(other for other in shifts.get(shift, ()) if other != shown)
        shifts[shift] = (*others, shown)
        self.doubtful = self.doubtful or bool(others)
        self.changes += 1

    def lift(self, listed: tuple[int, int], shift: int, shown: Shown) -> None:
        """No such mapping is left."""
        shifts = self._elsewhere[listed]
        others = tuple(other for other in shifts[shift] if other != shown)
        if others:
            shifts[shift] = others
        else:
            del shifts[shift]
            if not shifts:
                del self._elsewhere[listed]
                self._look_at_devices()
        self.changes += 1

    def _look_at_devices(self) -> None:
        self.devices = tuple(sorted({device for device, _ in self._elsewhere}))
        self.doubtful = self.doubtful and bool(self.devices)

    def find(self, device: int, mapped: MappedRange, own: Own) -> Shown | None:
        """What a mapping of another device's file is. ``own`` decides where there are several."""
        shifts = self._elsewhere.get((device, mapped.inode))
        if shifts is None or not mapped.shared:
            return None
        shift = mapped.start - mapped.offset
        found = shifts.get(shift, ())
        if len(found) > 1 and (laid := own.get((device, mapped.inode, shift))) in found:
            return laid
        return found[-1] if found else None


Own: TypeAlias = "Mapping[tuple[int, int, int], Shown]"
"""What was laid in one address space, by device and inode as listed, and shift."""

NOTHING: Final = Placed()
_NONE: Final[Own] = MappingProxyType({})


def translate(
    found: list[MappedRange],
    placed: Placed,
    elsewhere: Iterable[tuple[int, list[MappedRange]]] = (),
    own: Own = _NONE,
) -> list[MappedRange]:
    """Mappings of a mount's files, with those of placements as mappings of their regions.

    ``elsewhere``: of those devices (``Placed.devices``), all shared mappings. Lowest address first.
    """
    if not placed:
        return found
    by_inode = placed.by_inode
    seen = [
        mapped if (shown := by_inode.get(mapped.inode)) is None else _seen(mapped, shown)
        for mapped in found
    ]
    more = [
        _seen(mapped, shown)
        for device, others in elsewhere
        for mapped in others
        if (shown := placed.find(device, mapped, own)) is not None
    ]
    if more:
        seen = sorted([*seen, *more], key=_start)
    return seen


def _start(mapped: MappedRange) -> int:
    return mapped.start


def _seen(mapped: MappedRange, shown: Shown) -> MappedRange:
    return MappedRange(
        mapped.pid,
        mapped.start,
        mapped.end,
        mapped.prot,
        mapped.shared,
        mapped.offset + shown.delta,
        shown.region,
        shown,
    )


def source_of(window: MappedRange) -> Source:
    """What a mapping of a region shows."""
    return window.shown.source if window.shown is not None else None
