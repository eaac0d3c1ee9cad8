"""A set of page ranges.

For: which parts of a region something holds for that the table does not say (which of them are
protected by faults). Ranges never overlap, and ranges that touch are one range.

Promises: pure; adding and removing cost a binary search and what they touch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class SpanSet:
    """Half-open ranges ``[start, end)`` in bytes, lowest first."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def copy(self) -> SpanSet:
        other = SpanSet()
        other._starts, other._ends = self._starts.copy(), self._ends.copy()
        return other

    def add(self, start: int, end: int) -> None:
        """Put ``[start, end)`` in; nothing happens if it is empty."""
        if start >= end:
            return
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]

    def remove(self, start: int, end: int) -> None:
        """Take ``[start, end)`` out; what was not in it is no error."""
        if start >= end:
            return
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        starts: list[int] = []
        ends: list[int] = []
        if low < high:
            if self._starts[low] < start:
                starts.append(self._starts[low])
                ends.append(start)
            if end < self._ends[high - 1]:
                starts.append(end)
                ends.append(self._ends[high - 1])
        self._starts[low:high] = starts
        self._ends[low:high] = ends

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of the set inside ``[start, end)``, clipped to it."""
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        return [(max(start, self._starts[i]), min(end, self._ends[i])) for i in range(low, high)]
