"""Serves the userfaultfds of all clients: accesses are caught, judged and answered.

For: watched ranges, and protections enforced by faults. Who decides is the :class:`Host`; this
module carries it out and knows regions as numbers and clients as whatever the host says they are.

Promises: one client cannot hold up another or the loop: messages are read without waiting, and
calls that wait for a client's mmap_lock run in a lane of the client's own, in order. A thread whose
access was caught is let go, denied, or known to wait; it is never forgotten. What goes wrong with
one client ends the serving of that client (its accesses go on uncaught) and of no other.

If the daemon dies, the kernel closes the descriptors: what waited goes on, nothing is caught.

Leaves out: making descriptors (``userfault.make``), protections of mappings (``replica.py``).

Source: userfaultfd(2), and for denying rt_tgsigqueueinfo(2), proc_pid_syscall(5).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import time
from bisect import bisect_right, insort
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from msharefs.clients import native
from msharefs.clients.errands import Errands, Kind
from msharefs.clients.identity import (
    children_of,
    identify,
    identify_inside,
    in_own_namespace,
    parent_of,
)
from msharefs.clients.lanes import Lane, Workers
from msharefs.clients.signals import Stand, kill, segv, stand_of
from msharefs.clients.userfault import (
    Forked,
    Mode,
    Moved,
    Outcome,
    PageFault,
    Userfault,
    outcome_of,
)
from msharefs.region.demand import CAUGHT, Caught
from msharefs.region.errors import ClientStuck
from msharefs.region.events import Actor
from msharefs.region.pages import page_down

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from msharefs.clients.errands import Call
    from msharefs.clients.userfault import Message

log = logging.getLogger(__name__)

PAGE: Final = 4096
DESCRIPTORS_A_TICK: Final = 64
RETRY_PAUSE: Final = 0.000_2
"""Seconds. How long a lane leaves an address space alone that was just changing."""
BURIAL_PAUSE: Final = 0.5
"""Seconds between two looks at children that nobody has met: each costs a switch to a thread."""
REST: Final = 0.005
"""Seconds. How long a descriptor is left alone that says nothing new."""
ACTORS_REMEMBERED: Final = 1024


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
    caught: Caught = Caught.NOTHING

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


def mode_of(caught: Caught) -> Mode:
    """The registration that catches it.

    Loads are caught while their page is not mapped, so what is mapped already has to be taken out
    of the page tables then (madvise, MADV_DONTNEED, by the client: its contents stay).
    """
    mode = Mode.WP if caught & Caught.STORES else Mode(0)
    return mode | Mode.MINOR | Mode.MISSING if caught & Caught.ACCESSES else mode


class Answer(Enum):
    """What the host says to an access."""

    GO = "go"
    DENY = "deny"
    WAIT = "wait"
    """The host will call :meth:`Faults.settle` for the page, sooner or later."""


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
    lane: Lane = attrs.field(factory=Lane)
    _actors: dict[int, Actor] = attrs.field(factory=dict)

    @property
    def spans(self) -> list[Span]:
        """What is caught, by address."""
        return sorted(span for half in self.halves for span in half.spans)

    def catches(self, span: Span) -> bool:
        """Whether all that is to be caught there is, by what is known here."""
        found = 0
        for half in self.halves:
            for known in half.within(span.address, span.end):
                found += 0 if span.caught & ~known.caught else known.size
        return found == span.size

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
        wanted = bool(caught & Caught.DENIED)
        for half in self.halves:
            if half.userfault.user_mode_only == wanted:
                return half
        return self.halves[0]


class Faults:
    """All descriptors of a mount. Everything but :meth:`run` may be called before it runs."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._epoll = select.epoll()
        self._halves: dict[int, Half] = {}
        self._workers = Workers()
        self._token: trio.lowlevel.TrioToken | None = None
        self._resting: list[Half] = []

    def __len__(self) -> int:
        """How many descriptors there are."""
        return len(self._halves)

    def __iter__(self) -> Iterator[Served]:
        """Whom we serve."""
        return iter({half.served: None for half in self._halves.values()})

    # -- life

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; every descriptor is closed then."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bury)
                task_status.started()
                while True:
                    await self._something()
                    for fd, _ in self._epoll.poll(0, DESCRIPTORS_A_TICK):
                        half = self._halves.get(fd)
                        if half is not None:
                            self._take(half)
        finally:
            self.close()

    def close(self) -> None:
        """Let everybody go on. Idempotent."""
        self._token = None
        for served in list(self):
            self.drop(served)
        self._workers.close()
        self._epoll.close()

    def add(self, client: object, userfaults: Sequence[Userfault], pid: int | None) -> Served:
        """Serve one more client by its descriptors, ours from now on. Nothing is caught yet."""
        served = Served(client, pid)
        served.foreign = pid is not None and not in_own_namespace(pid)
        for userfault in userfaults:
            self._attach(served, userfault, [])
        return served

    def drop(self, served: Served) -> None:
        """Close the descriptors: who waits goes on, nothing is caught any more. Idempotent.

        The host is told of pages that somebody waited for.
        """
        for half in list(served.halves):
            self._detach(half)

    def _attach(self, served: Served, userfault: Userfault, spans: list[Span]) -> None:
        half = Half(served, userfault, spans)
        served.halves.append(half)
        self._halves[userfault.fd] = half
        self._epoll.register(userfault.fd, select.EPOLLIN)

    def _detach(self, half: Half) -> None:
        half.closed = True
        served, userfault = half.served, half.userfault
        served.halves.remove(half)
        del self._halves[userfault.fd]
        self._epoll.unregister(userfault.fd)
        # A call for it may be under way: the number must not be somebody else's meanwhile.
        self._workers.submit(served.lane, userfault.close)
        half.spans = []
        for page, accesses in list(served.waiting.items()):
            if any(access.half is half for access in accesses.values()):
                self._abandon(served, page, page + PAGE)

    # -- what is caught

    async def bring(self, served: Served, spans: Sequence[Span]) -> Outcome:
        """Catch in each span what it says, and protect every page of it anew.

        In force when this returns SERVED. GONE: the address space has ended. REFUSED: one of the
        ranges cannot be watched; those before it are. A caller that gives up waiting leaves the
        rest to be done.

        The kernel cannot register a range for less than it is, so it stays registered for more
        until nothing is caught there. A range that passes from one descriptor to the other is caught
        by neither for some microseconds: see :meth:`moving`.
        """
        if not served.halves:
            return Outcome.GONE
        steps: list[_Step] = []
        for span in spans:
            steps += self._plan(served, span)
        outcome = await self._in_lane(served, partial(_carry_out, steps))
        self._brought(served, spans, outcome)
        return outcome

    async def bring_many(
        self, work: Sequence[tuple[Served, Sequence[Span]]], limit: float = 1.0
    ) -> list[Outcome | Exception]:
        """:meth:`bring` for many clients side by side: what it returns or raises, for each.

        ClientStuck: not within ``limit`` seconds. It will be done, before whatever is asked for
        that client later.
        """
        outcomes: list[Outcome | Exception] = [Outcome.GONE] * len(work)
        plans: dict[int, list[_Step]] = {}

        async def one(index: int, do: Callable[[], Awaitable[Outcome]]) -> None:
            try:
                with trio.fail_after(limit):
                    outcomes[index] = await do()
            except trio.TooSlowError:
                outcomes[index] = _stuck(work[index][0])
            except OSError as error:
                outcomes[index] = error

        async with trio.open_nursery() as nursery:
            for index, (served, spans) in enumerate(work):
                if not served.halves:
                    continue
                if native.present and self._workers.reserve(served.lane):
                    plans[index] = [step for span in spans for step in self._plan(served, span)]
                else:
                    nursery.start_soon(one, index, partial(self.bring, served, spans))
            if not plans:
                return outcomes
            lanes = [work[index][0].lane for index in plans]
            errands = Errands(
                self._workers, lanes, [list(_calls(steps)) for steps in plans.values()]
            )
            await errands.run(limit)
            for place, (index, steps) in enumerate(plans.items()):
                served, spans = work[index]
                status, kind = errands.status(place)
                if status == native.PENDING:
                    outcomes[index] = _stuck(served)
                elif status == errno.EAGAIN:  # it is changing for long: as patiently as it takes
                    nursery.start_soon(one, index, partial(self._again, served, spans, steps))
                else:
                    outcomes[index] = outcome = _outcome(status, kind)
                    if isinstance(outcome, Outcome):
                        self._brought(served, spans, outcome)
        return outcomes

    async def _again(self, served: Served, spans: Sequence[Span], steps: list[_Step]) -> Outcome:
        outcome = await self._in_lane(served, partial(_carry_out, steps))
        self._brought(served, spans, outcome)
        return outcome

    def _brought(self, served: Served, spans: Sequence[Span], outcome: Outcome) -> None:
        for span in spans:
            if not mode_of(span.caught):
                for half in served.halves:
                    half.cut(span.address, span.end)
                for page in _within(served.waiting, span.address, span.end):
                    del served.waiting[page]
                    self._host.given_up(served, page)
        if outcome is Outcome.GONE:
            self._over(served, "ended")

    @staticmethod
    def moving(served: Served, spans: Sequence[Span]) -> list[Span]:
        """The parts of ``spans`` that :meth:`bring` would take from one descriptor to the other.

        Their protection has changed so that DENIED does not hold any more, or does now. The
        client's own mapping is to forbid meanwhile what is ``caught`` before or after.
        """
        found: list[Span] = []
        for span in spans:
            if not mode_of(span.caught) or not served.halves:
                continue
            chosen = served.half_for(span.caught)
            for half in served.halves:
                if half is not chosen:
                    for known in half.within(span.address, span.end):
                        both = CAUGHT[int(known.caught) | int(span.caught)]
                        found.append(attrs.evolve(known, caught=both))
        return found

    @staticmethod
    def _plan(served: Served, span: Span) -> Iterator[_Step]:
        mode, chosen = mode_of(span.caught), served.half_for(span.caught)
        for half in served.halves:
            if mode and half is chosen:
                continue
            for known in half.within(span.address, span.end):
                yield _Step(half, known.address, known.size, Mode(0), wake=not mode)
                if mode:
                    half.cut(known.address, known.end)
        if mode:
            for known in chosen.within(span.address, span.end):
                mode |= mode_of(known.caught)
            chosen.set_span(span)
            yield _Step(chosen, span.address, span.size, mode)

    async def alive(self, served: Served) -> bool:
        """Whether the address space is still there. If not, it is dropped and the host told."""

        def look() -> Outcome:
            halves = served.halves
            return Outcome.SERVED if halves and halves[0].userfault.alive else Outcome.GONE

        found = await self._in_lane(served, look) is Outcome.SERVED
        if not found:
            self._over(served, "ended")
        return found

    async def _in_lane(self, served: Served, job: Callable[[], Outcome]) -> Outcome:
        token, done = trio.lowlevel.current_trio_token(), trio.Event()
        result: list[Outcome | BaseException] = []

        def run() -> None:
            try:
                result.append(job())
            except BaseException as error:  # noqa: BLE001 - it is the caller's to raise
                result.append(error)
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(done.set)

        self._workers.submit(served.lane, run)
        await done.wait()
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    # -- decided later

    def settle(self, served: Served, page: int, answer: Answer) -> None:
        """Answer those who wait for a page: GO, DENY, or WAIT to have them ask again."""
        accesses = served.waiting.pop(page, None)
        if accesses is None:
            return
        if answer is Answer.DENY:
            for access in accesses.values():
                self._deny(access)
            return
        for half in {access.half: access for access in accesses.values()}:
            if answer is Answer.GO:
                first = next(a for a in accesses.values() if a.half is half)
                self._let_go(half, first.fault)
            else:
                half.userfault.wake(page, PAGE)

    # -- messages

    async def _something(self) -> None:
        """Until there are messages, or descriptors that were left alone may have some."""
        if not self._resting:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            return
        with trio.move_on_after(REST):
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            return
        for half in self._resting:
            if not half.closed:
                self._epoll.modify(half.userfault.fd, select.EPOLLIN)
        self._resting.clear()

    def _rest(self, half: Half) -> None:
        """Leave it alone for a moment.

        A thread that waits for a page inside a system call and has a signal pending asks again and
        again, for the kernel lets neither win.
        """
        if not half.closed:
            self._epoll.modify(half.userfault.fd, 0)
            self._resting.append(half)

    def _take(self, half: Half) -> None:
        try:
            messages = half.userfault.read()
        except (OSError, ValueError) as error:
            self._failed(half.served, f"reading: {error}")
            return
        news = not messages
        for message in messages:
            if half.closed:
                if isinstance(message, Forked):
                    os.close(message.fd)
                continue
            try:
                news |= self._handle(half, message)
            except Exception:
                log.exception("process %s: %s", half.served.pid, message)
                if isinstance(message, PageFault):
                    # Nobody knows what was right: the program is not to hang for our mistake.
                    self._let_go(half, message)
        if not news:
            self._rest(half)

    def _handle(self, half: Half, message: Message) -> bool:
        """Whether there was anything new in it."""
        if isinstance(message, PageFault):
            return self._fault(half, message)
        if isinstance(message, Forked):
            self._forked(half, message.fd)
            return True
        if isinstance(message, Moved):
            start, end = message.old, message.old + message.length
            for span in half.cut(start, end):
                moved = attrs.evolve(span, address=span.address - start + message.new)
                half.set_span(moved)
        else:
            start, end = message.start, message.end
            half.cut(start, end)
        # Who waits for something there finds it gone.
        served = half.served
        self._abandon(served, start, end)
        half.userfault.wake(start, end - start)
        self._host.moved(served)
        return True

    def _forked(self, half: Half, fd: int) -> None:
        """The child gets as many descriptors as its parent is served by, one message each."""
        parent, limited = half.served, half.userfault.user_mode_only
        userfault, spans = Userfault(fd, user_mode_only=limited), list(half.spans)
        child = parent.newborn
        if child is not None and all(
            half.userfault.user_mode_only != limited for half in child.halves
        ):
            parent.newborn = None
            self._attach(child, userfault, spans)
            return
        child = Served(parent.client, None, parent=parent, adopted=False)
        self._attach(child, userfault, spans)
        others = any(other.spans for other in parent.halves if other is not half)
        parent.newborn = child if others else None
        self._host.forked(parent, child)

    def child(self, pid: int) -> Served | None:
        """The descriptors of a process that was forked by a client; None if it was not.

        Which of several children that nobody has met is which, nobody tells. They are taken in the
        order in which they were forked, so ask for processes in that order; all have their
        parent's mappings still, and one that is met by an access of its own is known for certain.
        """
        unmet: list[Served] = []
        for served in self:
            if served.pid == pid:
                return served
            if served.parent is not None:
                unmet.append(served)
        if not unmet:
            return None
        above = parent_of(pid)
        for served in unmet:
            parent = served.parent
            if parent is not None and parent.pid in {None, above}:
                self._meet(served, pid)
                return served
        return None

    def _meet(self, served: Served, pid: int) -> None:
        served.pid, served.parent = pid, None
        served.foreign = not in_own_namespace(pid)

    async def _bury(self) -> None:
        """Notice the ends of children that nobody has adopted; of others, the host is told."""
        while True:
            await trio.sleep(BURIAL_PAUSE)
            for served in [served for served in self if not served.adopted]:
                await self.alive(served)

    def _abandon(self, served: Served, start: int, end: int) -> None:
        for page in _within(served.waiting, start, end):
            del served.waiting[page]
            self._host.abandoned(served, page)

    def _fault(self, half: Half, fault: PageFault) -> bool:
        """False for a thread that was known to wait for that page already."""
        served, page = half.served, page_down(fault.address)
        if page in half.opening:
            return True
        span = half.span_at(fault.address)
        if span is None:  # given up meanwhile
            self._let_go(half, fault)
            return True
        access = Access(half, span.region, span.offset + fault.address - span.address, fault)
        waiting = served.waiting.get(page)
        if waiting is not None:
            known = fault.tid in waiting
            waiting[fault.tid] = access
            return not known
        served.faults += 1
        if served.pid is None and access.actor.pid:
            self._meet(served, access.actor.pid)
        answer = self._host.judge(access)
        if answer is Answer.GO:
            self._let_go(half, fault)
        elif answer is Answer.DENY:
            self._deny(access)
        else:
            served.waiting[page] = {fault.tid: access}
        return True

    def _let_go(self, half: Half, fault: PageFault) -> None:
        half.opening.add(page_down(fault.address))
        self._workers.submit(half.served.lane, partial(self._resolve, half, fault))

    def _deny(self, access: Access) -> None:
        """SIGSEGV to the thread, as the processor would; or let it ask again if it has moved on.

        A denied access inside a system call cannot fail by itself once it is caught: the kernel
        ignores signals there, but for SIGKILL. (Ranges where all is denied are therefore caught by
        a descriptor that leaves system calls alone, which get EFAULT.)
        """
        actor = access.actor
        stand = stand_of(actor.tid)
        if stand is Stand.FAULT:
            segv(actor.pid, actor.tid, access.fault.address)
        elif stand is Stand.CALL:
            kill(actor.pid)
        else:
            access.half.userfault.wake(access.page, PAGE)

    def _resolve(self, half: Half, fault: PageFault) -> None:
        """In a lane: let the access happen, and all that wait for its page try again."""
        userfault, page = half.userfault, page_down(fault.address)
        half.opening.discard(page)  # from now on the answer to who asks may come too late
        if half.closed:
            return
        span = half.span_at(page)
        keep = span is not None and bool(span.caught & Caught.STORES) and not fault.write
        try:
            outcome = _patiently(half, partial(_open_page, userfault, fault, page, keep=keep))
            if outcome is not Outcome.SERVED:
                userfault.wake(page, PAGE)
        except OSError as error:
            self._soon(partial(self._failed, half.served, f"letting an access go: {error}"))
            return
        if outcome is Outcome.GONE:
            self._soon(partial(self._over, half.served, "ended"))

    # -- endings

    def _failed(self, served: Served, why: str) -> None:
        log.error("process %s is served no more: %s", served.pid, why)
        self._over(served, why)

    def _over(self, served: Served, why: str) -> None:
        if served.halves:
            self.drop(served)
            self._host.ended(served, why)

    def _soon(self, call: Callable[[], None]) -> None:
        """From a lane: in the loop, if there still is one."""
        token = self._token
        if token is not None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(call)


def _within(pages: Iterable[int], start: int, end: int) -> list[int]:
    return [page for page in pages if start <= page < end]


def _address(span: Span) -> int:
    return span.address


def _open_page(userfault: Userfault, fault: PageFault, page: int, *, keep: bool) -> Outcome:
    """Make the page accessible; with ``keep`` the next store to it is caught again."""
    if fault.protected:
        return userfault.unprotect(page, PAGE)
    outcome = Outcome.ABSENT
    if fault.minor:
        outcome = userfault.resume(page, PAGE, protected=keep)
    if outcome is Outcome.ABSENT:
        outcome = userfault.zero(page, protected=keep)
        if outcome is Outcome.THERE:
            outcome = userfault.resume(page, PAGE, protected=keep)
    return outcome


@attrs.frozen(eq=False)
class _Step:
    """Register a range for ``mode`` and protect it, or for nothing, which unregisters it.

    ``wake``: who waits there goes on then. (Where it passes to another descriptor it is to ask
    again when all is done: when it is settled.)
    """

    half: Half
    address: int
    size: int
    mode: Mode
    wake: bool = False


def _carry_out(steps: list[_Step]) -> Outcome:
    """In a lane."""
    for step in steps:
        half, at, size = step.half, step.address, step.size
        if half.closed:
            return Outcome.GONE
        if not step.mode:
            outcome = _patiently(half, partial(half.userfault.unregister, at, size))
            if outcome is Outcome.GONE:
                return outcome
            if step.wake:
                half.userfault.wake(at, size)  # the kernel does so for missing pages only
            continue
        outcome = _patiently(half, partial(half.userfault.register, at, size, step.mode))
        if outcome is Outcome.SERVED and step.mode & Mode.WP:
            outcome = _patiently(half, partial(half.userfault.protect, at, size))
        if outcome is not Outcome.SERVED:
            return outcome
    return Outcome.SERVED


def _calls(steps: Iterable[_Step]) -> Iterator[Call]:
    """The same for the compiled module."""
    for step in steps:
        fd, at, size = step.half.userfault.fd, step.address, step.size
        if not step.mode:
            yield fd, Kind.UNREGISTER, at, size, int(step.wake)
            continue
        yield fd, Kind.REGISTER, at, size, int(step.mode)
        if step.mode & Mode.WP:
            yield fd, Kind.PROTECT, at, size, 0


def _outcome(status: int, kind: Kind | None) -> Outcome | Exception:
    if not status:
        return Outcome.SERVED
    try:
        return outcome_of(OSError(status, os.strerror(status)), refusable=kind is not Kind.PROTECT)
    except OSError as error:
        return error


def _stuck(served: Served) -> ClientStuck:
    return ClientStuck(f"process {served.pid} holds its memory map")


def _patiently(half: Half, call: Callable[[], Outcome]) -> Outcome:
    """Again while the address space is changing, which ends as soon as the loop has read of it."""
    while True:
        outcome = call()
        if outcome is not Outcome.RETRY or half.closed:
            return outcome
        time.sleep(RETRY_PAUSE)
