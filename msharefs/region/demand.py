"""What a region's table, its watches and the way of protecting ask of a process that maps it.

For: turning "this range is read-only and watched for stores" into what the process's own mapping
must be: the protection of the mapping itself, and which accesses are caught by a userfaultfd
before they happen.

Promises: pure. An access that the table forbids is either outside the mapping's protection or
caught; an access that is caught is one that somebody wants to hear of, or one that is denied.

Leaves out: addresses, processes, and how either is brought about.
"""

from __future__ import annotations

from enum import IntFlag
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.abi import NotifyEvent, Prot
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from msharefs.region.spans import SpanSet
    from msharefs.region.table import MappingTable


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


CAUGHT: Final = tuple(Caught(value) for value in range(8))
"""Caught by number, as PROTS is."""

READ: Final = int(Prot.READ)
WRITE: Final = int(Prot.WRITE)
READ_WRITE: Final = READ | WRITE

_STORES: Final = int(Caught.STORES)
_DENIED: Final = int(Caught.DENIED)
_ALL: Final = int(Caught.ACCESSES | Caught.STORES)
_WATCH_WRITE: Final = int(NotifyEvent.WRITE)
_WATCH_READ: Final = int(NotifyEvent.READ)


@attrs.frozen
class Demand:
    """``[start, end)`` of the region, in bytes: the mapping's protection, and what is caught."""

    start: int
    end: int
    prot: Prot
    caught: Caught = Caught.NOTHING


def serve(prot: Prot, watched: int, *, by_fault: bool) -> tuple[int, int]:
    """How one mapped range is served: the protection of the mapping, and what is caught.

    ``watched`` is a :class:`NotifyEvent` set. A watched range has a mapping that would allow what
    is to be reported; the table's rule is kept by what is caught. ``by_fault`` says that a range
    without PROT_WRITE is protected that way although nobody watches it.
    """
    has = int(prot)
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


def demands(
    table: MappingTable,
    start: int,
    end: int,
    watched: Iterable[tuple[int, int, int]] = (),
    by_fault: SpanSet | None = None,
) -> list[Demand]:
    """What ``[start, end)`` demands: every byte of it exactly once, equal neighbours joined.

    ``watched`` are ``(start, end, events)``, sorted and disjoint. Holes demand PROT_NONE.
    """
    if start >= end:
        return []
    faulting = by_fault.within(start, end) if by_fault else []
    if not watched and not faulting:
        return _joined(_plain(table, start, end))
    return _joined(_pieces(table, start, end, list(watched), faulting))


def _plain(table: MappingTable, start: int, end: int) -> Iterator[Demand]:
    at = start
    for mapping in table.overlapping(start, end):
        low, high = max(start, mapping.start), min(end, mapping.end)
        if at < low:
            yield Demand(at, low, Prot.NONE)
        yield Demand(low, high, mapping.prot)
        at = high
    if at < end:
        yield Demand(at, end, Prot.NONE)


def _pieces(
    table: MappingTable,
    start: int,
    end: int,
    watched: list[tuple[int, int, int]],
    faulting: list[tuple[int, int]],
) -> Iterator[Demand]:
    cuts = {start, end}
    for low, high, *_ in (*watched, *faulting):
        cuts |= {low, high}
    for mapping in table.overlapping(start, end):
        cuts |= {mapping.start, mapping.end}
    edges = sorted(cut for cut in cuts if start <= cut <= end)
    at_watch = at_fault = 0
    for low, high in pairwise(edges):
        while at_watch < len(watched) and watched[at_watch][1] <= low:
            at_watch += 1
        while at_fault < len(faulting) and faulting[at_fault][1] <= low:
            at_fault += 1
        events = 0
        if at_watch < len(watched) and watched[at_watch][0] <= low:
            events = watched[at_watch][2]
        faults = at_fault < len(faulting) and faulting[at_fault][0] <= low
        found = table.at(low)
        if found is None:
            yield Demand(low, high, Prot.NONE)
            continue
        prot, caught = serve(found.prot, events, by_fault=faults)
        yield Demand(low, high, PROTS[prot], CAUGHT[caught])


def _joined(pieces: Iterable[Demand]) -> list[Demand]:
    joined: list[Demand] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.prot == piece.prot and last.caught == piece.caught:
            joined[-1] = Demand(last.start, piece.end, last.prot, last.caught)
        else:
            joined.append(piece)
    return joined


def both(old: list[Demand], new: list[Demand]) -> list[Demand]:
    """The rights that ``old`` and ``new`` both give, and whatever either of them catches.

    Both must cover the same range. It is what holds while one is replaced by the other.
    """
    met: list[Demand] = []
    i = j = 0
    while i < len(old) and j < len(new):
        one, other = old[i], new[j]
        low, high = max(one.start, other.start), min(one.end, other.end)
        prot = PROTS[int(one.prot) & int(other.prot)]
        met.append(Demand(low, high, prot, CAUGHT[int(one.caught) | int(other.caught)]))
        i += one.end == high
        j += other.end == high
    return _joined(met)
