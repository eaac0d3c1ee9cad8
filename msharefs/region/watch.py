"""The watched ranges of a region, and what becomes of an access to one.

For: which offsets are watched and how (MSHAREFS_NOTIFY), and the verdict on one access, given the
protection there.

Promises: pure. Watches never overlap; arming a range replaces what was armed in it, and forgets
what was reported of its pages, so that each is reported anew.

Leaves out: how accesses are caught (``clients/faults.py``), who decides on a held one
(``service/notifications.py``).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from enum import Enum
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.abi import PAGE_SIZE, NotifyEvent, NotifyMode, OnTimeout, Prot
from msharefs.region.demand import SCANNED, SIGNALLED, Grasp, grasp_of
from msharefs.region.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator

    from msharefs.region.mapping import Mapping

_READ, _WRITE = int(NotifyEvent.READ), int(NotifyEvent.WRITE)
_PROT_WRITE: Final = int(Prot.WRITE)
SIGSEGV: Final = 11


@attrs.frozen
class Watch:
    """How ``[start, end)`` is watched, in bytes, page-aligned.

    ``events``: WRITE watches stores. READ watches loads, and with them the first store to each
    page: a page that can be written can be read, so the processor tells of no load after it.
    ``signo`` has a meaning in mode SIGNAL; ``timeout_ms`` (0: for ever) and ``on_timeout`` in HOLD;
    ``scan`` in LOG: stores are noted by the kernel, to be looked for now and then.
    """

    start: int
    end: int
    events: NotifyEvent = NotifyEvent.WRITE
    mode: NotifyMode = NotifyMode.LOG
    signo: int = 0
    timeout_ms: int = 0
    on_timeout: OnTimeout = OnTimeout.DENY
    scan: bool = False

    @property
    def asks(self) -> int:
        """What it asks of those who map the range (``demand.serve``)."""
        signals = SIGNALLED if self.mode is NotifyMode.SIGNAL else 0
        return int(self.events) | signals | (SCANNED if self.scan else 0)

    def clip(self, start: int, end: int) -> Watch:
        """The part of it within ``[start, end)``, which must overlap it."""
        if start <= self.start and self.end <= end:
            return self
        return attrs.evolve(self, start=max(start, self.start), end=min(end, self.end))

    def continues(self, before: Watch) -> bool:
        """Whether this and ``before`` are one watch seen in two halves."""
        return before.end == self.start and attrs.evolve(before, start=0, end=0) == attrs.evolve(
            self, start=0, end=0
        )


class Watches:
    """The watches of one region, by offset."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []
        self._starts: list[int] = []
        self._reported: dict[int, set[int]] = {_READ: set(), _WRITE: set()}

    def __len__(self) -> int:
        return len(self._watches)

    def __iter__(self) -> Iterator[Watch]:
        """Lowest offset first."""
        return iter(self._watches)

    def at(self, offset: int) -> Watch | None:
        """The watch that covers ``offset``."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        watch = self._watches[index]
        return watch if offset < watch.end else None

    def within(self, start: int, end: int) -> list[Watch]:
        """What is watched of ``[start, end)``, clipped to it, lowest first."""
        low, high = self._span(start, end)
        return [watch.clip(start, end) for watch in self._watches[low:high]]

    def arm(self, watch: Watch) -> None:
        """Watch a range, instead of whatever was armed in it. Its pages count as unreported."""
        self._put(watch.start, watch.end, watch)

    def disarm(self, start: int, end: int) -> list[Watch]:
        """Watch nothing of ``[start, end)`` any more. What was watched there."""
        gone = self.within(start, end)
        if gone:
            self._put(start, end, None)
        return gone

    def first_of(self, start: int, end: int, access: NotifyEvent) -> bool:
        """As :meth:`first`, for all pages of a range at once: whether there was one."""
        pages = self._reported[int(access)]
        known = len(pages)
        pages.update(range(start // PAGE_SIZE, (end + PAGE_SIZE - 1) // PAGE_SIZE))
        return len(pages) > known

    def fresh(self, start: int, end: int, access: NotifyEvent) -> list[tuple[int, int]]:
        """As :meth:`first`, for all pages of a range: those that had not been, as ranges."""
        pages = self._reported[int(access)]
        found: list[tuple[int, int]] = []
        for page in range(start // PAGE_SIZE, (end + PAGE_SIZE - 1) // PAGE_SIZE):
            if page in pages:
                continue
            pages.add(page)
            at = page * PAGE_SIZE
            if found and found[-1][1] == at:
                found[-1] = found[-1][0], at + PAGE_SIZE
            else:
                found.append((at, at + PAGE_SIZE))
        return found

    def first(self, offset: int, access: NotifyEvent) -> bool:
        """Whether no access of that kind to that page has been reported since it was armed.

        Counts it as reported.
        """
        pages, page = self._reported[int(access)], offset // PAGE_SIZE
        if page in pages:
            return False
        pages.add(page)
        return True

    def copy(self) -> Watches:
        """To go back to."""
        other = Watches()
        other._watches, other._starts = self._watches.copy(), self._starts.copy()
        other._reported = {access: pages.copy() for access, pages in self._reported.items()}
        return other

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """The watches that share a byte with the range, as indices."""
        low = bisect_right(self._starts, start)
        if low and self._watches[low - 1].end > start:
            low -= 1
        return low, bisect_left(self._starts, end)

    def _put(self, start: int, end: int, new: Watch | None) -> None:
        low, high = self._span(start, end)
        if new is not None:  # so that a neighbour which is the same watch becomes one with it
            low -= low > 0 and self._watches[low - 1].end == start
            high += high < len(self._watches) and self._starts[high] == end
        pieces: list[Watch] = []
        for old in self._watches[low:high]:
            if old.start < start:
                pieces.append(old.clip(old.start, start))
            if old.end > end:
                pieces.append(old.clip(end, old.end))
        if new is not None:
            pieces.append(new)
        merged: list[Watch] = []
        for piece in sorted(pieces, key=lambda watch: watch.start):
            if merged and piece.continues(merged[-1]):
                merged[-1] = attrs.evolve(merged[-1], end=piece.end)
            else:
                merged.append(piece)
        self._watches[low:high] = merged
        self._starts[low:high] = [watch.start for watch in merged]
        self._forget(start // PAGE_SIZE, end // PAGE_SIZE)

    def _forget(self, first: int, last: int) -> None:
        for pages in self._reported.values():
            if last - first < len(pages):
                pages.difference_update(range(first, last))
            else:
                pages.difference_update([page for page in pages if first <= page < last])


def check_watchable(watch: Watch, mapping: Mapping, *, notes: bool) -> None:
    """Raises Unsupported if accesses to what a mapping shows cannot be watched so.

    ``notes``: the kernel can note stores.
    Source: the kinds of memory in userfaultfd(2), and what a read-only mapping does.
    """
    grasp = grasp_of(mapping)
    if grasp is Grasp.FAULTS:
        return
    where = f"the file at {mapping.start:#x}"
    if watch.events & NotifyEvent.READ:
        why = "is read-only" if grasp is Grasp.NONE else "is on storage"
        raise Unsupported(f"{where} {why}: loads cannot be watched")
    if grasp is Grasp.NONE:
        return
    if watch.mode is NotifyMode.HOLD:
        raise Unsupported(f"{where} is on storage: stores cannot be held")
    if watch.mode is NotifyMode.SIGNAL and watch.signo != SIGSEGV:
        raise Unsupported(f"{where} is on storage: no signal but SIGSEGV can be sent")
    if watch.mode is NotifyMode.LOG and not notes:
        raise Unsupported(f"{where} is on storage: this kernel cannot note stores to it")


# -- one access


class Action(Enum):
    """What becomes of an access."""

    GO = "go"
    DENY = "deny"
    SIGNAL = "signal"
    """Let go, and the chosen signal sent."""
    HOLD = "hold"


@attrs.frozen
class Verdict:
    """``once``: to be reported unless its page has been (:meth:`Watches.first`)."""

    action: Action
    report: bool = False
    once: bool = False


_GO: Final = Verdict(Action.GO)
_DENIED: Final = Verdict(Action.DENY)
_DENIED_WATCHED: Final = Verdict(Action.DENY, report=True)
_OF_MODE: Final = {
    int(NotifyMode.LOG): Verdict(Action.GO, report=True, once=True),
    int(NotifyMode.SIGNAL): Verdict(Action.SIGNAL, report=True),
    int(NotifyMode.HOLD): Verdict(Action.HOLD, report=True),
}


def judge(prot: Prot, watch: Watch | None, access: NotifyEvent) -> Verdict:
    """The verdict on a load (READ) or store (WRITE) where the protection is ``prot``.

    A hole is Prot.NONE. Protection comes first: what it forbids is denied whatever the mode, and
    reported each time if accesses of that kind are watched. Loads are allowed by any protection but
    NONE, as on the processor.
    """
    rights, store = int(prot), access == _WRITE
    watched = watch is not None and bool(int(watch.events) & (int(access) | (store and _READ)))
    if not (rights & _PROT_WRITE if store else rights):
        return _DENIED_WATCHED if watched else _DENIED
    if watch is None or not watched:
        return _GO
    return _OF_MODE[int(watch.mode)]
