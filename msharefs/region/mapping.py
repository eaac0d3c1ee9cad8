"""The values of a mapping table: objects, mappings, and changes of mappings."""

from __future__ import annotations

from typing import Final

import attrs

from msharefs.abi import PROT_ALL, Kind, MapFlag, Prot

PROTS: Final = tuple(Prot(value) for value in range(8))
"""Prot by number. Building an IntFlag costs a microsecond, looking it up does not."""

_ANON: Final = Kind.ANON


@attrs.frozen
class ObjectRef:
    """What a mapping shows: the region's own memory, or a file.

    ``ident`` tells two descriptors of one file apart (they may differ in access mode); the
    device and inode are the file's own, as ``/proc/PID/maps`` prints them, 0 for memory. ``stored``:
    a file with storage behind it, not on tmpfs.
    """

    kind: Kind
    ident: int = 0
    dev_major: int = 0
    dev_minor: int = 0
    ino: int = 0
    stored: bool = False


ANON: Final = ObjectRef(Kind.ANON)
"""The region's own memory: zeroes when mapped, gone when unmapped."""


@attrs.frozen
class Mapping:
    """One object over ``[start, end)`` of a region, in bytes, page-aligned.

    ``max_prot`` is what PROTECT may at most give (a file opened read-only never becomes
    writable). ``object_offset`` is the object's offset at ``start``; 0 for memory, which has no
    offsets of its own.
    """

    start: int
    end: int
    prot: Prot
    object: ObjectRef = ANON
    object_offset: int = 0
    max_prot: Prot = PROT_ALL
    flags: int = MapFlag.SHARED | MapFlag.ANONYMOUS

    @property
    def size(self) -> int:
        return self.end - self.start

    def clip(self, start: int, end: int) -> Mapping:
        """The part of this mapping within ``[start, end)``, which must overlap it."""
        if start <= self.start and self.end <= end:
            return self
        low, high = max(start, self.start), min(end, self.end)
        offset = self.object_offset
        if self.object.kind is not _ANON:
            offset += low - self.start
        return Mapping(low, high, self.prot, self.object, offset, self.max_prot, self.flags)

    def with_prot(self, prot: Prot) -> Mapping:
        return Mapping(
            self.start,
            self.end,
            prot,
            self.object,
            self.object_offset,
            self.max_prot,
            self.flags,
        )

    def continues(self, before: Mapping) -> bool:
        """Whether this mapping and ``before`` are one mapping seen in two halves."""
        return (
            before.end == self.start
            and before.prot == self.prot
            and before.object == self.object
            and before.max_prot == self.max_prot
            and before.flags == self.flags
            and (
                self.object.kind is _ANON
                or before.object_offset + before.size == self.object_offset
            )
        )

    def joined(self, after: Mapping) -> Mapping:
        """This mapping and ``after``, which continues it, as one."""
        return Mapping(
            self.start,
            after.end,
            self.prot,
            self.object,
            self.object_offset,
            self.max_prot,
            self.flags,
        )


@attrs.frozen
class RangeChange:
    """What a change means for one range: what lay there, what will, which rights come and go.

    ``old`` and ``new`` are clipped to ``[start, end)``; None is a hole. ``replaced`` says that
    the content goes as well (the range is unmapped, or another object takes its place).
    """

    start: int
    end: int
    old: Mapping | None
    new: Mapping | None
    replaced: bool = False

    @property
    def gained(self) -> Prot:
        """Rights that the range did not give before."""
        return PROTS[_rights(self.new) & ~_rights(self.old)]

    @property
    def lost(self) -> Prot:
        """Rights that the range gives no longer. All of the old ones if the content goes."""
        if self.replaced:
            return PROTS[_rights(self.old)]
        return PROTS[_rights(self.old) & ~_rights(self.new)]

    def inverse(self) -> RangeChange:
        """The way back. What had come over a hole goes, and over a hole nothing goes."""
        replaced = self.new is not None and (self.replaced or self.old is None)
        return RangeChange(self.start, self.end, self.new, self.old, replaced)


@attrs.frozen
class Change:
    """A planned change of a table, complete before anything is applied.

    ``removed`` and ``added`` are whole mappings, sorted and disjoint, such that taking out the
    one and putting in the other turns the table of ``version`` into the next. ``ranges`` says the
    same from the programs' point of view; ranges where nothing changes do not appear, so a change
    without ranges is none. ``rights_before`` and ``rights_after`` are the union of the
    protections in the whole region.
    """

    version: int
    removed: tuple[Mapping, ...]
    added: tuple[Mapping, ...]
    ranges: tuple[RangeChange, ...]
    rights_before: Prot
    rights_after: Prot

    @property
    def gained(self) -> Prot:
        """Rights that the region as a whole did not give before."""
        return PROTS[int(self.rights_after) & ~int(self.rights_before)]

    @property
    def mapped_delta(self) -> int:
        """Bytes mapped after minus bytes mapped before."""
        return sum(m.size for m in self.added) - sum(m.size for m in self.removed)

    def inverse(self) -> Change:
        """The change that undoes this one, to be applied right after it."""
        return Change(
            version=self.version + 1,
            removed=self.added,
            added=self.removed,
            ranges=tuple(r.inverse() for r in self.ranges),
            rights_before=self.rights_after,
            rights_after=self.rights_before,
        )


def _rights(mapping: Mapping | None) -> int:
    return 0 if mapping is None else int(mapping.prot)
