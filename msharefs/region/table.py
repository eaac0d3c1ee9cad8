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

from itertools import compress
from typing import TYPE_CHECKING, Final

from sortedcontainers import SortedList

from msharefs.abi import Kind, MapFlag, Prot
from msharefs.region.errors import HoleInRange, NothingThere, ObjectAccess, Occupied, StaleChange
from msharefs.region.mapping import PROTS, Change, Mapping, RangeChange

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPEN: Final = (False, False)
_FILE: Final = Kind.FILE
_HUGETLB: Final = int(MapFlag.HUGETLB)


class MappingTable:
    """Mappings by start offset. Ranges are given as checked, page-aligned ``[start, end)``."""

    def __init__(self) -> None:
        # Most lookups and changes begin and end where a mapping does. Two plain dicts answer those;
        # the sorted starts are searched only for offsets within mappings and holes, and touched
        # only when a mapping begins at a new place.
        self._by_start: dict[int, Mapping] = {}
        self._by_end: dict[int, Mapping] = {}
        self._starts: SortedList = SortedList()
        self._count_of_prot = [0] * len(PROTS)
        self.rights = Prot.NONE
        """The union of the protections inside."""
        self.mapped = 0
        """Bytes mapped in all."""
        self.files = 0
        """How many of the mappings show a file."""
        self.huge = 0
        """How many of the mappings ask for huge pages."""
        self.version = 0
        """Goes up by one with every change applied."""

    def __len__(self) -> int:
        return len(self._by_start)

    def __iter__(self) -> Iterator[Mapping]:
        """The mappings, lowest offset first."""
        return map(self._by_start.__getitem__, self._starts)

    # -- looking

    def at(self, offset: int) -> Mapping | None:
        """The mapping that covers ``offset``."""
        mapping = self._by_start.get(offset)
        if mapping is not None:
            return mapping
        index = self._starts.bisect_left(offset)
        if not index:
            return None
        mapping = self._by_start[self._starts[index - 1]]
        return mapping if offset < mapping.end else None

    def at_or_after(self, offset: int) -> Mapping | None:
        """The mapping that covers ``offset``, else the next one above."""
        mapping = self._by_start.get(offset)
        if mapping is not None:
            return mapping
        index = self._starts.bisect_left(offset)
        if index:
            mapping = self._by_start[self._starts[index - 1]]
            if offset < mapping.end:
                return mapping
        return self._by_start[self._starts[index]] if index < len(self._starts) else None

    def query(self, offset: int, *, or_next: bool = False) -> Mapping:
        """As PROCMAP_QUERY of proc_pid_maps(5): raises NothingThere instead of ENOENT."""
        found = self.at_or_after(offset) if or_next else self.at(offset)
        if found is None:
            where = "at or after" if or_next else "at"
            raise NothingThere(f"nothing is mapped {where} {offset:#x}")
        return found

    def overlapping(self, start: int, end: int) -> list[Mapping]:
        """The mappings that share a byte with ``[start, end)``, whole, lowest first."""
        first = self.at(start)
        if first is not None and end <= first.end:
            return [first]
        found = [] if first is None else [first]
        found.extend(map(self._by_start.__getitem__, self._starts.irange(start, end, _OPEN)))
        return found

    def asking_for_huge(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of the range where huge pages are asked for, lowest first."""
        if not self.huge or start >= end:
            return []
        return [
            (max(start, mapping.start), min(end, mapping.end))
            for mapping in self.overlapping(start, end)
            if mapping.flags & _HUGETLB
        ]

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
        return self._change(old, mapping.start, mapping.end, [mapping], ranges)

    def plan_unmap(self, start: int, end: int) -> Change:
        """Take out whatever lies in the range; holes are fine, as in munmap(2)."""
        old = self.overlapping(start, end)
        ranges = [
            RangeChange(low, high, before, None, replaced=True)
            for low, high, before in _pieces(old, start, end)
            if before is not None
        ]
        return self._change(old, start, end, [], ranges)

    def plan_protect(self, start: int, end: int, prot: Prot) -> Change:
        """Set the protection of the range.

        Raises HoleInRange if any of it is not mapped (mprotect(2): ENOMEM) and ObjectAccess if an
        object does not allow ``prot`` (EACCES); nothing is changed then.
        """
        old = self.overlapping(start, end)
        wanted = int(prot)
        new: list[Mapping] = []
        ranges: list[RangeChange] = []
        for low, high, before in _pieces(old, start, end):
            if before is None:
                raise HoleInRange(f"{low:#x}-{high:#x} is not mapped")
            excess = wanted & ~int(before.max_prot)
            if excess:
                raise ObjectAccess(
                    f"the object at {before.start:#x} was mapped without {PROTS[excess].text()}"
                )
            after = before if before.prot == prot else before.with_prot(prot)
            new.append(after)
            if after is not before:
                ranges.append(RangeChange(low, high, before, after))
        return self._change(old, start, end, new, ranges)

    def _change(
        self,
        old: list[Mapping],
        start: int,
        end: int,
        new: list[Mapping],
        ranges: list[RangeChange],
    ) -> Change:
        """Work out the whole mappings that go and come when ``new`` fills ``[start, end)``.

        ``old`` is what overlaps the range. Where it reaches out of it the rest stays, as a
        mapping of its own; a neighbour goes too if it and the new mapping are to be one.
        """
        if not ranges:
            return Change(self.version, (), (), (), self.rights, self.rights)
        removed = old
        pieces = new
        if old and old[0].start < start:
            pieces = [old[0].clip(old[0].start, start), *pieces]
        elif new and (below := self._by_end.get(start)) and new[0].continues(below):
            removed = [below, *removed]
            pieces = [below, *pieces]
        if old and old[-1].end > end:
            pieces = [*pieces, old[-1].clip(end, old[-1].end)]
        elif new and (above := self._by_start.get(end)) and above.continues(new[-1]):
            removed = [*removed, above]
            pieces = [*pieces, above]
        added = pieces if len(pieces) == 1 else _merged(pieces)
        counts = self._count_of_prot.copy()
        for mapping in removed:
            counts[mapping.prot] -= 1
        for mapping in added:
            counts[mapping.prot] += 1
        return Change(
            self.version, tuple(removed), tuple(added), tuple(ranges), self.rights, _union(counts)
        )

    # -- applying

    def apply(self, change: Change) -> None:
        """Carry a change out. Raises StaleChange if the table has moved on since it was planned."""
        if change.version != self.version:
            raise StaleChange(
                f"planned for version {change.version}, the table is at {self.version}"
            )
        removed, added = change.removed, change.added
        starts, by_start, by_end = self._starts, self._by_start, self._by_end
        counts, mapped, files = self._count_of_prot, self.mapped, self.files
        huge = self.huge
        for mapping in added:
            if mapping.start not in by_start:
                starts.add(mapping.start)
        for mapping in removed:
            del by_start[mapping.start], by_end[mapping.end]
            counts[mapping.prot] -= 1
            mapped -= mapping.end - mapping.start
            files -= mapping.object.kind is _FILE
            huge -= mapping.flags & _HUGETLB != 0
        for mapping in added:
            by_start[mapping.start] = by_end[mapping.end] = mapping
            counts[mapping.prot] += 1
            mapped += mapping.end - mapping.start
            files += mapping.object.kind is _FILE
            huge += mapping.flags & _HUGETLB != 0
        for mapping in removed:
            if mapping.start not in by_start:
                starts.remove(mapping.start)
        self.mapped, self.files, self.huge = mapped, files, huge
        self.rights = change.rights_after
        self.version += 1


def _union(count_of_prot: list[int]) -> Prot:
    union = 0
    for prot in compress(range(len(PROTS)), count_of_prot):
        union |= prot
    return PROTS[union]


def _pieces(mappings: list[Mapping], start: int, end: int) -> list[tuple[int, int, Mapping | None]]:
    """Cut ``[start, end)`` where mappings begin and end; None stands for a hole."""
    pieces: list[tuple[int, int, Mapping | None]] = []
    at = start
    for mapping in mappings:
        if at < mapping.start:
            pieces.append((at, mapping.start, None))
        piece = mapping.clip(start, end)
        at = piece.end
        pieces.append((piece.start, at, piece))
    if at < end:
        pieces.append((at, end, None))
    return pieces


def _merged(pieces: list[Mapping]) -> list[Mapping]:
    merged: list[Mapping] = []
    for piece in pieces:
        if merged and piece.continues(merged[-1]):
            merged[-1] = merged[-1].joined(piece)
        else:
            merged.append(piece)
    return merged
