"""What a region's table, its watches and the way of protecting ask of a process that maps it.

For: turning "this range is read-only and watched for stores" into what the process's own mapping
must be: what the mapping shows, its protection, and which accesses are caught by a userfaultfd
before they happen.

Promises: pure. An access that the table forbids is either outside the mapping's protection or
caught; an access that is caught is one that somebody wants to hear of, or one that is denied.

Leaves out: addresses, processes, and how either is brought about.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from enum import IntEnum, IntFlag
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import attrs

from msharefs.abi import Kind, NotifyEvent, Prot
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from msharefs.region.mapping import Mapping, RangeChange
    from msharefs.region.spans import SpanSet
    from msharefs.region.table import MappingTable


Source: TypeAlias = "tuple[int, int] | None"
"""What is to be seen: the region's own memory (None), or a file object: its ident, and the offset
in the region minus that in the file, in bytes."""

Piece: TypeAlias = "tuple[int, int, Prot | None, Source, Grasp]"
"""``[start, end)`` of a region, its protection (None is a hole), what it shows, and what can be
known of accesses to that."""

_Span = TypeVar("_Span", bound=tuple[Any, ...])


class Grasp(IntEnum):
    """What the kernel lets us know of accesses to what is shown. Source: userfaultfd(2)."""

    NONE = 0
    """A file that was opened for reading only: nobody can store to its mappings either."""
    NOTES = 1
    """A file on storage: that a page was stored to, afterwards."""
    FAULTS = 2
    """Memory, or a file that is memory: each access, before it happens."""


class Caught(IntFlag):
    """Which accesses a userfaultfd catches. Source: userfaultfd(2), ioctl_userfaultfd(2)."""

    NOTHING = 0
    STORES = 1
    """By write-protection: loads are not slowed down."""
    ACCESSES = 2
    """The first access to a page that the process does not have in its page tables."""
    DENIED = 4
    """Whatever is caught there is denied, none of it let go: system calls are best left to fail
    with EFAULT by themselves (a userfaultfd for user mode only)."""
    NOTED = 8
    """No access: stores are noted by the kernel, page by page (a userfaultfd with WP_ASYNC)."""


CAUGHT: Final = tuple(Caught(value) for value in range(16))
"""Caught by number, as PROTS is."""

READ: Final = int(Prot.READ)
WRITE: Final = int(Prot.WRITE)
READ_WRITE: Final = READ | WRITE

SCANNED: Final = 4
"""Beside the bits of NotifyEvent: whoever watches wants stores noted, and none caught."""
SIGNALLED: Final = 8
"""Beside them, too: whoever watches wants a signal sent. Of what can only be noted the mapping is
read-only then, so that the kernel sends its own."""

_STORES: Final = int(Caught.STORES)
_NOTED: Final = int(Caught.NOTED)
_DENIED: Final = int(Caught.DENIED)
_ALL: Final = int(Caught.ACCESSES | Caught.STORES)
_WATCH_WRITE: Final = int(NotifyEvent.WRITE)
_WATCH_READ: Final = int(NotifyEvent.READ)


@attrs.frozen
class Demand:
    """``[start, end)`` of the region, in bytes: what a mapping shows, its protection, what is caught.

    A hole shows memory, with PROT_NONE.
    """

    start: int
    end: int
    prot: Prot
    caught: Caught = Caught.NOTHING
    source: Source = None

    @property
    def shut(self) -> bool:
        """Whether a program sees nothing there: what it does not see does not matter."""
        return not int(self.prot) and not int(self.caught)


def serve(
    prot: Prot, watched: int, *, by_fault: bool, grasp: Grasp = Grasp.FAULTS
) -> tuple[int, int]:
    """How one mapped range is served: the protection of the mapping, and what is caught.

    ``watched`` is a :class:`NotifyEvent` set, with SCANNED and SIGNALLED. A watched range has a
    mapping that would allow what is to be reported; the table's rule is kept by what is caught.
    ``by_fault`` says that a range without PROT_WRITE is protected that way although nobody watches
    it. What cannot be caught is protected by its mapping, and nobody is told of what that denies.
    """
    has = int(prot)
    if grasp != Grasp.FAULTS or watched & SCANNED:
        return _unfaulting(has, watched, grasp)
    watched &= _WATCH_READ | _WATCH_WRITE
    if not has:
        return (READ_WRITE, _ALL | _DENIED) if watched else (0, 0)
    caught = 0
    if watched & _WATCH_READ:
        caught |= Caught.ACCESSES
        if not has & WRITE:
            caught |= Caught.STORES
    if watched & _WATCH_WRITE or (by_fault and not has & WRITE):
        caught |= Caught.STORES
    if caught == _STORES and not has & WRITE:
        caught |= _DENIED
    return (has | READ_WRITE, caught) if caught else (has, 0)


def _unfaulting(has: int, watched: int, grasp: Grasp) -> tuple[int, int]:
    if not has & WRITE or grasp == Grasp.NONE:
        return has, 0
    if watched & SIGNALLED:
        return has & ~WRITE | READ, 0
    return has, _NOTED if watched & _WATCH_WRITE else 0


def source_of(mapping: Mapping | None) -> Source:
    """What a mapping shows."""
    if mapping is None or mapping.object.kind is not Kind.FILE:
        return None
    return mapping.object.ident, mapping.start - mapping.object_offset


def grasp_of(mapping: Mapping | None) -> Grasp:
    """What can be known of accesses to what a mapping shows."""
    if mapping is None or mapping.object.kind is not Kind.FILE:
        return Grasp.FAULTS
    if not int(mapping.max_prot) & WRITE:
        return Grasp.NONE
    return Grasp.NOTES if mapping.object.stored else Grasp.FAULTS


def cover(table: MappingTable, start: int, end: int) -> list[Piece]:
    """The protections of ``[start, end)`` as the table has them, holes and all."""
    pieces: list[Piece] = []
    at = start
    for mapping in table.overlapping(start, end) if start < end else ():
        low, high = max(start, mapping.start), min(end, mapping.end)
        if at < low:
            pieces.append((at, low, None, None, Grasp.FAULTS))
        pieces.append((low, high, mapping.prot, source_of(mapping), grasp_of(mapping)))
        at = high
    if at < end:
        pieces.append((at, end, None, None, Grasp.FAULTS))
    return pieces


def changed(pieces: Iterable[Piece], ranges: Sequence[RangeChange]) -> list[Piece]:
    """``pieces`` as they will be once ``ranges``, a planned change's, have been applied."""
    new: list[Piece] = []
    index = 0
    for start, end, prot, source, grasp in pieces:
        at = start
        while index < len(ranges) and ranges[index].start < end:
            part = ranges[index]
            low, high = max(at, part.start), min(end, part.end)
            if at < low:
                new.append((at, low, prot, source, grasp))
            if low < high:
                prot_now = part.new.prot if part.new is not None else None
                new.append((low, high, prot_now, source_of(part.new), grasp_of(part.new)))
                at = high
            if part.end > end:
                break  # goes on in the next piece
            index += 1
        if at < end:
            new.append((at, end, prot, source, grasp))
    return new


def demands(
    pieces: Sequence[Piece],
    watched: Sequence[tuple[int, int, int]] = (),
    by_fault: SpanSet | None = None,
) -> list[Demand]:
    """What a covered range demands: every byte of it exactly once, equal neighbours joined.

    ``watched`` are ``(start, end, asks)`` as :func:`serve` takes them, sorted and disjoint. Holes demand PROT_NONE.
    """
    if not pieces:
        return []
    faulting = by_fault.within(pieces[0][0], pieces[-1][1]) if by_fault else []
    if not watched and not faulting:
        return _joined(
            Demand(start, end, prot or Prot.NONE, Caught.NOTHING, source)
            for start, end, prot, source, _ in pieces
        )
    return _joined(_served(pieces, watched, faulting))


def _served(
    pieces: Sequence[Piece],
    watched: Sequence[tuple[int, int, int]],
    faulting: Sequence[tuple[int, int]],
) -> Iterator[Demand]:
    cuts = {cut for low, high, *_ in (*watched, *faulting) for cut in (low, high)}
    edges = sorted(cuts)
    for start, end, prot, source, grasp in pieces:
        inner = edges[bisect_right(edges, start) : bisect_left(edges, end)]
        for low, high in pairwise([start, *inner, end]):
            if prot is None:
                yield Demand(low, high, Prot.NONE)
                continue
            events = next((bits for a, b, bits in _from(watched, low) if a <= low < b), 0)
            faults = any(a <= low < b for a, b in _from(faulting, low))
            has, caught = serve(prot, events, by_fault=faults, grasp=grasp)
            yield Demand(low, high, PROTS[has], CAUGHT[caught], source)


def _from(spans: Sequence[_Span], offset: int) -> Sequence[_Span]:
    """The span that may cover ``offset``: the last one that begins at or before it."""
    index = bisect_right(spans, offset, key=itemgetter(0))
    return spans[max(index - 1, 0) : index]


def _joined(pieces: Iterable[Demand]) -> list[Demand]:
    joined: list[Demand] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.prot == piece.prot
            and last.caught == piece.caught
            and last.source == piece.source
        ):
            joined[-1] = Demand(last.start, piece.end, last.prot, last.caught, last.source)
        else:
            joined.append(piece)
    return joined


def both(old: list[Demand], new: list[Demand]) -> list[Demand]:
    """The rights that ``old`` and ``new`` both give, and whatever either of them catches.

    Both must cover the same range. It is what holds while one is replaced by the other. What is
    shown is what ``new`` shows, but where ``old`` lets nobody see anything: there nothing has to
    be done before the new rights are given.
    """
    met: list[Demand] = []
    i = j = 0
    while i < len(old) and j < len(new):
        one, other = old[i], new[j]
        low, high = max(one.start, other.start), min(one.end, other.end)
        prot = PROTS[int(one.prot) & int(other.prot)]
        source = one.source if one.shut else other.source
        met.append(Demand(low, high, prot, CAUGHT[int(one.caught) | int(other.caught)], source))
        i += one.end == high
        j += other.end == high
    return _joined(met)
