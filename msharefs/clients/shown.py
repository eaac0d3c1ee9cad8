"""What a process sees of a region through files that stand for parts of it.

For: a region's range that shows a file object is, in a client, a mapping of another file of the
mount than the region's own (a *placement*). Whoever looks at a client wants to know of it as a
mapping of the region, at the region's offset.

Promises: pure. A mapping of a placement says by its inode alone which region it belongs to, what it
shows, and whether the client may be given a right to store there: so it is known after a fork too,
and nobody has to remember what was laid where.

Leaves out: making placements, and opening them (the service does), laying them (lay.py).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from msharefs.clients.procmap import MappedRange

if TYPE_CHECKING:
    from collections.abc import Mapping

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


Placed: TypeAlias = "Mapping[int, Shown]"
"""All placements of a mount, by inode. May be changed by another thread while it is being read."""

NOTHING: Final[Placed] = MappingProxyType({})


def translate(found: list[MappedRange], placed: Placed) -> list[MappedRange]:
    """Mappings of a mount's files, with those of placements as mappings of their regions."""
    if not placed:
        return found
    return [
        mapped if (shown := placed.get(mapped.inode)) is None else _seen(mapped, shown)
        for mapped in found
    ]


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
