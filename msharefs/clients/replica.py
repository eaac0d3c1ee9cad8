"""What a process has to do to its own address space so that it obeys the region's table.

For: comparing what /proc says a process has mapped with what the table demands, and making of the
difference the fewest mprotect() calls.

Promises: pure. Each page is set at most once, straight to what is demanded, so no order of the
steps shows more than the old and the new rights together. Every window obeys: one that shows a
part of the region, several of one region, overlapping ones, and one that the process itself has
narrowed. Nothing is done where it is right already, nor to what shows another part of the region
than the one that was asked about. Applying the steps and comparing again yields none.

Leaves out: what is caught by faults (``Demand.caught``); who makes the calls, and when.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.abi import PROT_ALL
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from msharefs.abi import Prot
    from msharefs.clients.procmap import MappedRange
    from msharefs.region.demand import Demand

_CACHED_LAYOUTS: Final = 64

_Numbers = tuple[int, ...]
_Layout = tuple[_Numbers, _Numbers, _Numbers, tuple["Prot", ...]]
"""Starts, ends, offsets and protections: four lists, which are made and hashed faster than one."""


@attrs.define(unsafe_hash=True)
class Protect:
    """mprotect(address, size, prot). Bytes. A value, though not frozen, as MappedRange."""

    address: int
    size: int
    prot: Prot


Step = Protect
"""One call that the process has to make. A union, once there are calls of other kinds."""


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
        self._known: dict[_Layout, list[tuple[int, int, Prot]]] = {}

    def steps(self, windows: Iterable[MappedRange]) -> list[Step]:
        """What the process with these windows, of the region alone, has to do. Lowest first."""
        ordered = sorted(windows, key=_start)
        if not ordered:
            return []
        base = ordered[0].start
        layout = (
            tuple([w.start - base for w in ordered]),
            tuple([w.end - base for w in ordered]),
            tuple([w.offset for w in ordered]),
            tuple([w.prot for w in ordered]),
        )
        calls = self._known.get(layout)
        if calls is None:
            calls = self._calls(layout)
            if len(self._known) < _CACHED_LAYOUTS:
                self._known[layout] = calls
        return [Protect(base + start, end - start, prot) for start, end, prot in calls]

    def _calls(self, layout: _Layout) -> list[tuple[int, int, Prot]]:
        starts, ends, prots = self._starts, self._ends, self._prots
        calls: list[tuple[int, int, Prot]] = []
        # The run of neighbouring addresses that are to have one protection, and the part of it
        # from the first byte to the last that does not have it yet.
        run_end, run_prot = -1, None
        first, last = 0, 0
        for start, end, offset, has in zip(*layout, strict=True):
            shift = start - offset
            top = offset + end - start
            index = max(bisect_right(starts, offset) - 1, 0)
            while index < len(starts) and starts[index] < top:
                low = max(starts[index], offset) + shift
                high = min(ends[index], top) + shift
                wanted = prots[index]
                index += 1
                if low >= high:
                    continue
                if low != run_end or wanted != run_prot:
                    if first < last:
                        assert run_prot is not None, "a run has a protection"
                        calls.append((first, last, run_prot))
                    first = last = 0
                    run_prot = wanted
                run_end = high
                if has != wanted:
                    if first == last:
                        first = low
                    last = high
        if first < last:
            assert run_prot is not None, "a run has a protection"
            calls.append((first, last, run_prot))
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
