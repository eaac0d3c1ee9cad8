"""What a region demands of the processes that map it, now and after a planned change.

For: ``enforce.py``. Pure. Leaves out: how the demands come about (``region/demand.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from msharefs.region.demand import SIGNALLED, Caught, Demand, Grasp, changed, cover, demands

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msharefs.region.mapping import RangeChange
    from msharefs.region.region import Region
    from msharefs.region.spans import SpanSet
    from msharefs.region.watch import Watches
    from msharefs.service.changes import RegionState

END: Final = 1 << 62
"""Bytes. Past the end of every region, and within what a file offset can be."""


@attrs.frozen
class Layout:
    """What a range of the region demands: by the table, and with what is caught."""

    plain: list[Demand]
    served: list[Demand]

    @property
    def shows_files(self) -> bool:
        return any(demand.source for demand in self.plain)


@attrs.frozen
class After:
    """What else a change changes: what is protected by faults, and what is watched."""

    by_fault: SpanSet
    watches: Watches


def layout_of(
    region: Region,
    state: RegionState,
    start: int = 0,
    end: int = END,
    ranges: Sequence[RangeChange] = (),
    after: After | None = None,
    *,
    limit: int | None = None,
) -> Layout:
    """The layout of ``[start, end)``, as it will be once the planned ``ranges`` are applied.

    With ``limit`` the region ends there, as it will when it has shrunk.
    What lies past the region's end is what ``Semantics.beyond`` says.
    """
    if limit is None:
        limit = max(region.limit, ranges[-1].end if ranges else 0)
    pieces = cover(region.table, start, min(end, limit))
    if ranges:
        pieces = changed(pieces, ranges)
    if end > limit:
        pieces.append((max(start, limit), end, region.semantics.beyond or None, None, Grasp.FAULTS))
    watches = state.watches if after is None else after.watches
    watched = [(w.start, w.end, w.asks) for w in watches.within(start, end)]
    faulting = state.by_fault if after is None else after.by_fault
    signalled = [(low, high, SIGNALLED) for low, high, asks in watched if asks & SIGNALLED]
    plain = demands(pieces, signalled)
    return Layout(plain, demands(pieces, watched, faulting) if watched or faulting else plain)


def put(base: Layout, part: Layout) -> Layout:
    """``base``, but where ``part`` says something what that says."""
    return Layout(_put(base.plain, part.plain), _put(base.served, part.served))


def _put(base: list[Demand], part: list[Demand]) -> list[Demand]:
    if not part:
        return base
    start, end = part[0].start, part[-1].end
    before = [attrs.evolve(d, end=min(d.end, start)) for d in base if d.start < start]
    behind = [attrs.evolve(d, start=max(d.start, end)) for d in base if d.end > end]
    return [*before, *part, *behind]


def anything(layout: Layout) -> list[Demand]:
    """The range of ``layout``, as if everything were caught there: for when nobody knows."""
    caught = Caught.STORES | Caught.ACCESSES
    return [attrs.evolve(demand, caught=caught) for demand in layout.plain]


def newly(before: Sequence[Demand], after: Sequence[Demand]) -> list[Demand]:
    """What ``after`` catches and ``before`` did not, or not all of it. ``before`` covers it."""
    return [_part(n, *r) for o, n, *r in _met(before, after) if n.caught & ~o.caught]


def no_longer(before: Sequence[Demand], after: Sequence[Demand]) -> list[Demand]:
    """What ``before`` caught and ``after`` does not, with what it does catch there."""
    return [_part(n, *r) for o, n, *r in _met(before, after) if o.caught & ~n.caught]


def _part(demand: Demand, start: int, end: int) -> Demand:
    """Few of what meets are asked for, and a region may hold thousands: made only then."""
    return attrs.evolve(demand, start=start, end=end)


def _met(
    before: Sequence[Demand], after: Sequence[Demand]
) -> Iterator[tuple[Demand, Demand, int, int]]:
    """The two and where they meet, cut where either of them changes, where both say something."""
    i = j = 0
    while i < len(before) and j < len(after):
        old, new = before[i], after[j]
        low, high = max(old.start, new.start), min(old.end, new.end)
        if low < high:
            yield old, new, low, high
        i += old.end <= new.end
        j += new.end <= old.end
