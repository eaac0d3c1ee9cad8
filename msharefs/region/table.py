"""The mapping table of one region.

For: which object lies at which offset with which protection, and what a change of that would
mean. Mappings never overlap, and two neighbours that could be one mapping are one mapping.

Promises: planning changes nothing; a :class:`Change` describes the whole effect, and applying its
inverse right after it restores the table exactly. The cost of an operation grows with the number
of mappings it touches, and with the table only as a binary search does: microseconds at 100,000
mappings.

Leaves out: sizes, rights of descriptors, memory. Those are ``region.py`` and ``memory/``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

from msharefs.region.errors import HoleInRange, NothingThere, ObjectAccess, Occupied, StaleChange
from msharefs.region.mapping import PROTS, Change, Mapping, RangeChange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from msharefs.abi import Prot


class MappingTable:
    """Mappings by start offset. Ranges are given as checked, page-aligned ``[start, end)``."""

    def __init__(self) -> None:
        self._by_start: SortedDict = SortedDict()
        self._count_of_prot = [0] * len(PROTS)
        self.mapped = 0
        """Bytes mapped in all."""
        self.version = 0
        """Goes up by one with every change applied."""

    def __len__(self) -> int:
        return len(self._by_start)

    def __iter__(self) -> Iterator[Mapping]:
        """The mappings, lowest offset first."""
        return iter(self._by_start.values())

    @property
    def rights(self) -> Prot:
        """The union of the protections inside."""
        return self._union(self._count_of_prot)

    # -- looking

    def at(self, offset: int) -> Mapping | None:
        """The mapping that covers ``offset``."""
        index = self._by_start.bisect_right(offset) - 1
        if index < 0:
            return None
        mapping: Mapping = self._by_start.peekitem(index)[1]
        return mapping if offset < mapping.end else None

    def at_or_after(self, offset: int) -> Mapping | None:
        """The mapping that covers ``offset``, else the next one above."""
        covering = self.at(offset)
        if covering is not None:
            return covering
        index = self._by_start.bisect_left(offset)
        if index == len(self._by_start):
            return None
        following: Mapping = self._by_start.peekitem(index)[1]
        return following

    def query(self, offset: int, *, or_next: bool = False) -> Mapping:
        """As PROCMAP_QUERY of proc_pid_maps(5): raises NothingThere instead of ENOENT."""
        found = self.at_or_after(offset) if or_next else self.at(offset)
        if found is None:
            where = "at or after" if or_next else "at"
            raise NothingThere(f"nothing is mapped {where} {offset:#x}")
        return found

    def overlapping(self, start: int, end: int) -> list[Mapping]:
        """The mappings that share a byte with ``[start, end)``, whole, lowest first."""
        found: list[Mapping] = []
        first = self._by_start.bisect_right(start) - 1
        if first >= 0:
            mapping: Mapping = self._by_start.peekitem(first)[1]
            if start < mapping.end:
                found.append(mapping)
        by_start = self._by_start
        found.extend(by_start[key] for key in by_start.irange(start, end, (False, False)))
        # A mapping that starts exactly at ``start`` is the one bisect_right found.
        return found

    # -- planning

    def plan_map(self, mapping: Mapping, *, replace: bool = True) -> Change:
        """Put ``mapping`` in, over whatever is there, as MAP_FIXED does.

        The content of the range is new even where an equal mapping was. With ``replace`` false
        raises Occupied if anything is there, as MAP_FIXED_NOREPLACE does (mmap(2)).
        """
        old = self.overlapping(mapping.start, mapping.end)
        if old and not replace:
            raise Occupied(f"{old[0].start:#x}-{old[0].end:#x} is mapped already")
        ranges = [
            RangeChange(start, end, before, mapping.clip(start, end), replaced=before is not None)
            for start, end, before in _pieces(old, mapping.start, mapping.end)
        ]
        return self._change(old, mapping.start, mapping.end, (mapping,), ranges)

    def plan_unmap(self, start: int, end: int) -> Change:
        """Take out whatever lies in the range; holes are fine, as in munmap(2)."""
        old = self.overlapping(start, end)
        ranges = [
            RangeChange(low, high, before, None, replaced=True)
            for low, high, before in _pieces(old, start, end)
            if before is not None
        ]
        return self._change(old, start, end, (), ranges)

    def plan_protect(self, start: int, end: int, prot: Prot) -> Change:
        """Set the protection of the range.

        Raises HoleInRange if any of it is not mapped (mprotect(2): ENOMEM) and ObjectAccess if an
        object does not allow ``prot`` (EACCES); nothing is changed then.
        """
        old = self.overlapping(start, end)
        new: list[Mapping] = []
        ranges: list[RangeChange] = []
        for low, high, before in _pieces(old, start, end):
            if before is None:
                raise HoleInRange(f"{low:#x}-{high:#x} is not mapped")
            excess = int(prot) & ~int(before.max_prot)
            if excess:
                raise ObjectAccess(
                    f"the object at {before.start:#x} was mapped without {PROTS[excess].text()}"
                )
            after = before if before.prot == prot else before.with_prot(prot)
            new.append(after)
            if after is not before:
                ranges.append(RangeChange(low, high, before, after, replaced=False))
        return self._change(old, start, end, new, ranges)

    def _change(
        self,
        old: list[Mapping],
        start: int,
        end: int,
        new: Iterable[Mapping],
        ranges: Iterable[RangeChange],
    ) -> Change:
        """Work out the whole mappings that go and come when ``new`` fills ``[start, end)``."""
        pieces: list[Mapping] = []
        removed = list(old)
        if old and old[0].start < start:
            pieces.append(old[0].clip(old[0].start, start))
        elif (before := self.at(start - 1) if start else None) is not None:
            removed.insert(0, before)
            pieces.append(before)
        pieces.extend(new)
        if old and old[-1].end > end:
            pieces.append(old[-1].clip(end, old[-1].end))
        elif (after := self.at(end)) is not None:
            removed.append(after)
            pieces.append(after)
        added = _merged(pieces)
        # Neighbours looked at for merging and left as they were are no part of the change.
        low = high = 0
        while low < min(len(removed), len(added)) and removed[low] == added[low]:
            low += 1
        while high < min(len(removed), len(added)) - low and removed[-1 - high] == added[-1 - high]:
            high += 1
        gone = tuple(removed[low : len(removed) - high])
        come = tuple(added[low : len(added) - high])
        counts = self._count_of_prot.copy()
        for mapping in gone:
            counts[mapping.prot] -= 1
        for mapping in come:
            counts[mapping.prot] += 1
        return Change(
            version=self.version,
            removed=gone,
            added=come,
            ranges=tuple(ranges),
            rights_before=self.rights,
            rights_after=self._union(counts),
        )

    # -- applying

    def apply(self, change: Change) -> None:
        """Carry a change out. Raises StaleChange if the table has moved on since it was planned."""
        if change.version != self.version:
            raise StaleChange(
                f"planned for version {change.version}, the table is at {self.version}"
            )
        for mapping in change.removed:
            del self._by_start[mapping.start]
            self._count_of_prot[mapping.prot] -= 1
            self.mapped -= mapping.size
        for mapping in change.added:
            self._by_start[mapping.start] = mapping
            self._count_of_prot[mapping.prot] += 1
            self.mapped += mapping.size
        self.version += 1

    @staticmethod
    def _union(counts: list[int]) -> Prot:
        union = 0
        for prot, count in enumerate(counts):
            if count:
                union |= prot
        return PROTS[union]


def _pieces(
    mappings: list[Mapping], start: int, end: int
) -> Iterator[tuple[int, int, Mapping | None]]:
    """Cut ``[start, end)`` where mappings begin and end; None stands for a hole."""
    at = start
    for mapping in mappings:
        if at < mapping.start:
            yield at, mapping.start, None
        piece = mapping.clip(start, end)
        yield piece.start, piece.end, piece
        at = piece.end
    if at < end:
        yield at, end, None


def _merged(pieces: list[Mapping]) -> list[Mapping]:
    merged: list[Mapping] = []
    for piece in pieces:
        if merged and piece.continues(merged[-1]):
            merged[-1] = merged[-1].joined(piece)
        else:
            merged.append(piece)
    return merged
