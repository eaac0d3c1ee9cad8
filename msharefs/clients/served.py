"""What is known of the clients that are served by userfaultfds, and who is asked about them.

For: ``faults.py`` and what works beside it. A client (:class:`Served`) has up to two descriptors
(:class:`Half`), each of which catches accesses in some ranges (:class:`Span`) of its address space.

Promises: what is noted here as caught, and is not in doubt, is caught: no store that should be can
land uncaught. What is in doubt may be or not, and is brought anew by whoever relies on it.

Leaves out: calls of the kernel. Regions are numbers, and clients whatever the host says they are.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from msharefs.clients.identity import children_of, identify, identify_inside
from msharefs.clients.lanes import Lane
from msharefs.clients.userfault import Mode
from msharefs.region.demand import CAUGHT, Caught
from msharefs.region.events import Actor
from msharefs.region.pages import page_down
from msharefs.region.spans import SpanSet

if TYPE_CHECKING:
    from msharefs.clients.userfault import PageFault, Userfault

ACTORS_REMEMBERED: Final = 1024

STORES: Final = int(Caught.STORES)
DENIED: Final = int(Caught.DENIED)


def _mode(caught: int) -> int:
    mode = int(Mode.WP) if caught & STORES else 0
    return mode | int(Mode.MINOR | Mode.MISSING) if caught & int(Caught.ACCESSES) else mode


MODES: Final = tuple(_mode(caught) for caught in range(8))
"""The registration that catches it, by number of :class:`~msharefs.region.demand.Caught`.

Loads are caught while their page is not mapped, so what is mapped already has to be taken out of
the page tables then (madvise, MADV_DONTNEED, by the client: its contents stay).
"""


@attrs.frozen(order=True)
class Span:
    """``size`` bytes at ``address`` of a client show the region ``region`` from ``offset``.

    ``caught``: what is caught there; with DENIED by the descriptor for user mode, else by the
    other one, if there are both.
    """

    address: int
    size: int
    region: int
    offset: int
    caught: Caught = CAUGHT[0]

    @property
    def end(self) -> int:
        return self.address + self.size

    def clip(self, start: int, end: int) -> Span:
        """The part within ``[start, end)``, addresses, which must overlap it."""
        low, high = max(start, self.address), min(end, self.end)
        if (low, high) == (self.address, self.end):
            return self
        return attrs.evolve(
            self, address=low, size=high - low, offset=self.offset + low - self.address
        )


class Answer(Enum):
    """What the host says to an access."""

    GO = "go"
    DENY = "deny"
    WAIT = "wait"
    """The host will call ``Faults.settle`` for the page, sooner or later."""


@attrs.frozen(eq=False)
class Access:
    """A caught access. ``offset`` and ``fault.address`` are exact."""

    half: Half
    region: int
    offset: int
    fault: PageFault

    @property
    def served(self) -> Served:
        return self.half.served

    @property
    def store(self) -> bool:
        return self.fault.write

    @property
    def tid(self) -> int:
        return self.fault.tid

    @property
    def page(self) -> int:
        """The address of its page."""
        return page_down(self.fault.address)

    @property
    def actor(self) -> Actor:
        return self.served.actor(self.fault.tid)


class Host(Protocol):
    """Whoever decides. Called in the loop; must not wait."""

    def judge(self, access: Access) -> Answer:
        """What becomes of an access. During a change: by the rights that are in both tables."""

    def forked(self, parent: Served, child: Served) -> None:
        """A child begins with its parent's mappings, served already; it has not run yet.

        To be noted: ``child.client``. ``child.pid`` is unknown until its first access.
        """

    def moved(self, served: Served) -> None:
        """The client moved or unmapped memory that is served; ``served.spans`` is up to date."""

    def abandoned(self, served: Served, page: int) -> None:
        """Nobody waits for that page any more: it is unmapped, or the client is not served."""

    def given_up(self, served: Served, page: int) -> None:
        """Who waited for that page goes on, as it is not to be caught any more."""

    def ended(self, served: Served, why: str) -> None:
        """Not served any more: the address space has ended, or something went wrong with it."""


@attrs.define(eq=False)
class Half:
    """One of a client's descriptors."""

    served: Served
    userfault: Userfault
    spans: list[Span] = attrs.field(factory=list)
    """What is caught by it, by address; never overlapping."""
    closed: bool = False
    opening: set[int] = attrs.field(factory=set)
    """Pages that the lane is about to let go: whoever asks for one will be woken."""

    def span_at(self, address: int) -> Span | None:
        index = bisect_right(self.spans, address, key=_address) - 1
        if index < 0:
            return None
        span = self.spans[index]
        return span if address < span.end else None

    def within(self, start: int, end: int) -> list[Span]:
        """What is caught in ``[start, end)``, addresses, clipped to it."""
        return [s.clip(start, end) for s in self.spans if s.address < end and start < s.end]

    def set_span(self, new: Span) -> None:
        """Note what is caught there from now on."""
        self.cut(new.address, new.end)
        insort(self.spans, new)

    def cut(self, start: int, end: int) -> list[Span]:
        """Nothing is caught in ``[start, end)`` any more. What was."""
        gone = self.within(start, end)
        if gone:
            kept: list[Span] = []
            for span in self.spans:
                if span.address < start:
                    kept.append(span.clip(span.address, min(span.end, start)))
                if span.end > end:
                    kept.append(span.clip(max(span.address, end), span.end))
            self.spans = kept
        return gone


@attrs.define(eq=False)
class Served:
    """A client that is served; ``client`` is the host's.

    It has up to two descriptors (``userfault.make``), and what waits for its mmap_lock waits in
    one lane.
    """

    client: object
    pid: int | None
    """The process, as seen from here; None for a forked child that has not been met yet."""
    halves: list[Half] = attrs.field(factory=list)
    faults: int = 0
    """Accesses caught so far."""
    waiting: dict[int, dict[int, Access]] = attrs.field(factory=dict)
    """Who waits for which page, by thread."""
    newborn: Served | None = None
    """A child that has got one of its descriptors so far."""
    parent: Served | None = None
    """Of a forked child that has not been met yet."""
    foreign: bool = False
    """Whether it lives in a pid namespace below ours."""
    adopted: bool = True
    """Whether the host drops it when its process ends; of a forked child, once it says so."""
    doubt: SpanSet = attrs.field(factory=SpanSet)
    """Addresses where calls are under way, or failed, so that ``spans`` may be true or not; and pages
    that were let go though all is to be denied there."""
    stamps: dict[int, int] = attrs.field(factory=dict)
    """The number of the last change that had all of a region caught anew there, by region."""
    lane: Lane = attrs.field(factory=Lane)
    _actors: dict[int, Actor] = attrs.field(factory=dict)

    @property
    def spans(self) -> list[Span]:
        """What is caught, by address."""
        return sorted(span for half in self.halves for span in half.spans)

    def catches(self, span: Span) -> bool:
        """Whether all that is to be caught there is, for certain."""
        if self.doubt.within(span.address, span.end):
            return False
        found, wanted = 0, int(span.caught)
        for half in self.halves:
            for known in half.within(span.address, span.end):
                found += 0 if wanted & ~int(known.caught) else known.size
        return found == span.size

    def part_with(self, half: Half) -> Served:
        """The descriptor is of another child, whom nobody has met.

        Who waits already is still to be answered by way of this one, as the host knows it.
        """
        other = Served(self.client, None, parent=self.parent, adopted=False, lane=self.lane)
        other.doubt, other.stamps = self.doubt.copy(), dict(self.stamps)
        self.halves.remove(half)
        other.halves.append(half)
        half.served = other
        return other

    def catches_any(self, span: Span) -> bool:
        """Whether anything is caught there, or may be."""
        return any(half.within(span.address, span.end) for half in self.halves)

    def inherit(self, parent: Served, spans: list[Span]) -> None:
        """It was forked by ``parent``, of one descriptor of which we have just read so.

        A call that protects fails while that is still to be read (EAGAIN). So what was protected
        for certain by now was so before the fork, and was inherited; what is under way may not have
        been. Of ranges where stores are not caught there is no such certainty.
        """
        if not self.halves:  # the first of its descriptors tells what is the older of the two
            self.stamps = {} if parent.doubt else dict(parent.stamps)
        for start, end in parent.doubt:
            self.doubt.add(start, end)
        for span in spans:
            if not int(span.caught) & STORES:
                self.doubt.add(span.address, span.end)

    def waited_for(self, start: int, end: int) -> list[int]:
        """The pages in ``[start, end)``, addresses, that somebody waits for."""
        return [page for page in self.waiting if start <= page < end]

    def actor(self, tid: int) -> Actor:
        """Who the thread is, as of its first access: another program has other memory."""
        known = self._actors.get(tid)
        if known is None:
            if len(self._actors) >= ACTORS_REMEMBERED:
                self._actors.clear()
            known = self._actors[tid] = self._identify(tid)
        return known

    def _identify(self, tid: int) -> Actor:
        """Threads are told of by their numbers in their own pid namespace."""
        above = self.parent
        if self.pid is None and above is not None and above.pid is not None and above.foreign:
            for pid in children_of(above.pid):
                found = identify_inside(pid, tid)
                if found is not None:
                    return found
        if self.pid is not None and self.foreign:
            found = identify_inside(self.pid, tid)
            return found or Actor(self.pid, self.pid, "")
        return identify(tid)

    def half_for(self, caught: Caught) -> Half:
        """The descriptor that is to catch it."""
        wanted = bool(int(caught) & DENIED)
        for half in self.halves:
            if half.userfault.user_mode_only == wanted:
                return half
        return self.halves[0]


def _address(span: Span) -> int:
    return span.address
