"""What a process has to do to its own address space so that it obeys the region's table.

For: comparing what /proc says a process has mapped with what the table demands, and making of the
difference the fewest calls: mprotect() where only the protection is wrong, mmap() with MAP_FIXED
where something else is shown than what is demanded.

Promises: pure. Each page is set at most once, straight to what is demanded, so no order of the
steps shows more than the old and the new rights together. Every window obeys: one that shows a
part of the region, several of one region, overlapping ones, and one that the process itself has
narrowed. Nothing is done where it is right already, nor to what shows another part of the region
than the one that was asked about. Applying the steps and comparing again yields none.

Leaves out: what is caught by faults (``Demand.caught``); who makes the calls, and when.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from msharefs.abi import PROT_ALL
from msharefs.clients.shown import source_of
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from msharefs.abi import Prot
    from msharefs.clients.procmap import MappedRange
    from msharefs.region.demand import Demand, Source

_CACHED_LAYOUTS: Final = 64

_Numbers = tuple[int, ...]
_Layout = tuple[_Numbers, _Numbers, _Numbers, tuple["Prot", ...], tuple["Source", ...]]
"""Starts, ends, offsets, protections and sources: lists that are made and hashed faster than one.
The last is empty where memory alone is shown."""


@attrs.define(unsafe_hash=True)
class Protect:
    """mprotect(address, size, prot). Bytes. A value, though not frozen, as MappedRange."""

    address: int
    size: int
    prot: Prot


@attrs.define(unsafe_hash=True)
class Map:
    """mmap(address, size, prot, MAP_SHARED | MAP_FIXED) of what ``source`` is.

    ``offset`` of the region is then seen at ``address``. Within one mapping of the process. Bytes.
    """

    address: int
    size: int
    prot: Prot
    source: Source
    offset: int


Step: TypeAlias = Protect | Map
"""One call that the process has to make."""

_Call = tuple[int, int, "Prot", int, "Source"]
"""Start, end, protection; for a Map the offset in the region, else -1; what to show."""


class Comparison:
    """One demand, compared with any number of processes.

    Processes forked from one another have the same windows at the same distances: what one of
    them has to do is worked out once and moved to where the others have theirs.
    """

    def __init__(self, demands: Sequence[Demand], *, within: Prot = PROT_ALL) -> None:
        """``demands`` sorted and disjoint; what lies between them is not asked about.

        ``within``: rights that are left out of all demands where they are not in it.
        """
        self._starts = [demand.start for demand in demands]
        self._ends = [demand.end for demand in demands]
        self._prots = [PROTS[int(demand.prot) & int(within)] for demand in demands]
        self._sources = [demand.source for demand in demands]
        self._known: dict[_Layout, list[_Call]] = {}

    def steps(self, windows: Iterable[MappedRange]) -> list[Step]:
        """What the process with these windows, of the region alone, has to do. Lowest first."""
        ordered = sorted(windows, key=_start)
        if not ordered:
            return []
        base = ordered[0].start
        sources: tuple[Source, ...] = ()
        if any(w.shown for w in ordered):
            sources = tuple([source_of(w) for w in ordered])
        layout = (
            tuple([w.start - base for w in ordered]),
            tuple([w.end - base for w in ordered]),
            tuple([w.offset for w in ordered]),
            tuple([w.prot for w in ordered]),
            sources,
        )
        calls = self._known.get(layout)
        if calls is None:
            calls = self._calls(layout)
            if len(self._known) < _CACHED_LAYOUTS:
                self._known[layout] = calls
        return [
            Protect(base + start, end - start, prot)
            if offset < 0
            else Map(base + start, end - start, prot, source, offset)
            for start, end, prot, offset, source in calls
        ]

    def _calls(self, layout: _Layout) -> list[_Call]:
        starts, ends, prots, sources = self._starts, self._ends, self._prots, self._sources
        *numbers, shown = layout
        calls: list[_Call] = []
        # The run of neighbouring addresses that are to have one protection, and the part of it
        # from the first byte to the last that does not have it yet.
        run_end = -1
        run_prot: Prot | None = None
        first = last = 0

        def end_run() -> None:
            nonlocal first, last
            if first < last:
                assert run_prot is not None, "a run has a protection"
                calls.append((first, last, run_prot, -1, None))
            first = last = 0

        for start, end, offset, has, source in zip(
            *numbers, shown or (None,) * len(numbers[0]), strict=True
        ):
            shift = start - offset
            top = offset + end - start
            index = max(bisect_right(starts, offset) - 1, 0)
            while index < len(starts) and starts[index] < top:
                low = max(starts[index], offset) + shift
                high = min(ends[index], top) + shift
                wanted, to_show = prots[index], sources[index]
                index += 1
                if low >= high:
                    continue
                if to_show != source:
                    end_run()
                    run_end = -1
                    calls.append((low, high, wanted, low - shift, to_show))
                    continue
                if low != run_end or wanted != run_prot:
                    end_run()
                    run_prot = wanted
                run_end = high
                if has != wanted:
                    if first == last:
                        first = low
                    last = high
        end_run()
        return calls


def steps(
    windows: Iterable[MappedRange], demands: Sequence[Demand], *, within: Prot = PROT_ALL
) -> list[Step]:
    """What one process has to do; see :class:`Comparison`, which is for many."""
    return Comparison(demands, within=within).steps(windows)


def is_replica(windows: Iterable[MappedRange], demands: Sequence[Demand]) -> bool:
    """Whether the process obeys already, as one does that was forked from one that did."""
    return not steps(windows, demands)


def _start(window: MappedRange) -> int:
    return window.start
