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

import logging
import os
import select
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from msharefs.clients.arming import Arming, in_lane, moving, open_page
from msharefs.clients.identity import in_own_namespace
from msharefs.clients.kinship import Kinship
from msharefs.clients.lanes import Workers
from msharefs.clients.served import DENIED, STORES, Access, Answer, Half, Host, Served, Span
from msharefs.clients.signals import Stand, kill, segv, stand_of
from msharefs.clients.userfault import (
    PAGE,
    Forked,
    Moved,
    Outcome,
    PageFault,
    Userfault,
    patiently,
)
from msharefs.region.pages import page_down

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from msharefs.clients.kinship import Claims
    from msharefs.clients.space import AddressSpace
    from msharefs.clients.userfault import Message

__all__ = ["Access", "Answer", "Faults", "Host", "Served", "Span", "moving"]

log = logging.getLogger(__name__)

DESCRIPTORS_A_TICK: Final = 64
BURIAL_PAUSE: Final = 0.5
"""Seconds between two looks at children that nobody has met: each costs a switch to a thread."""
REST: Final = 0.005
"""Seconds. How long a descriptor is left alone that says nothing new."""


class Faults:
    """All descriptors of a mount. Everything but :meth:`run` may be called before it runs."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._epoll = select.epoll()
        self._halves: dict[int, Half] = {}
        self._workers = Workers()
        self._token: trio.lowlevel.TrioToken | None = None
        self._resting: list[Half] = []
        self._unmet: dict[Served, None] = {}
        self._kin = Kinship(self._workers)
        self._arming = Arming(self._workers, self._given_up, partial(self._over, why="ended"))

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
        if not served.halves:
            self._unmet.pop(served, None)
        for page, accesses in list(served.waiting.items()):
            if any(access.half is half for access in accesses.values()):
                self._abandon(served, page, page + PAGE)

    # -- what is caught

    async def bring(self, served: Served, spans: Sequence[Span]) -> Outcome:
        """Catch in each span what it says: see :meth:`~msharefs.clients.arming.Arming.bring`."""
        return await self._arming.bring(served, spans)

    async def bring_many(
        self, work: Sequence[tuple[Served, Sequence[Span]]], limit: float = 1.0
    ) -> list[Outcome | Exception]:
        """:meth:`bring` for many clients side by side: what it returns or raises, for each."""
        return await self._arming.bring_many(work, limit)

    async def alive(self, served: Served) -> bool:
        """Whether the address space is still there. If not, it is dropped and the host told."""

        def look() -> Outcome:
            halves = served.halves
            return Outcome.SERVED if halves and halves[0].userfault.alive else Outcome.GONE

        if await in_lane(self._workers, served, look) is Outcome.SERVED:
            return True
        self._over(served, "ended")
        return False

    def _given_up(self, served: Served, start: int, end: int) -> None:
        for page in served.waited_for(start, end):
            del served.waiting[page]
            self._host.given_up(served, page)

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
            elif not half.closed:
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
            child.inherit(parent, spans)
            self._attach(child, userfault, spans)
            return
        child = Served(parent.client, None, parent=parent, adopted=False)
        child.inherit(parent, spans)
        self._attach(child, userfault, spans)
        self._unmet[child] = None
        others = any(other.spans for other in parent.halves if other is not half)
        parent.newborn = child if others else None
        self._host.forked(parent, child)

    # -- children

    def unmet(self) -> list[Served]:
        """The forked children that the host has not adopted, oldest first. They may have ended."""
        return list(self._unmet)

    async def claim(self, processes: Sequence[AddressSpace]) -> Claims:
        """Which of the children that nobody has adopted each of the processes is, for certain.

        The host adopts them. Those whose children have ended are dropped on the way.
        """
        claims = await self._kin.claim(processes, self.unmet())
        for served in claims.ended:
            self._over(served, "ended")
        for served, userfault in claims.strange:
            for half in [half for half in served.halves if half.userfault is userfault]:
                self._unmet[served.part_with(half)] = None
        for space, served in claims.found.items():
            self._meet(served, space.pid)
        return claims

    def adopt(self, served: Served, client: object) -> None:
        """The host drops it when ``client`` ends."""
        served.client, served.adopted = client, True
        self._unmet.pop(served, None)

    def _meet(self, served: Served, pid: int) -> None:
        served.pid, served.parent = pid, None
        served.foreign = not in_own_namespace(pid)

    async def _bury(self) -> None:
        """Notice the ends of children that nobody has adopted; of others, the host is told."""
        while True:
            await trio.sleep(BURIAL_PAUSE)
            for served in self.unmet():
                await self.alive(served)

    def _abandon(self, served: Served, start: int, end: int) -> None:
        for page in served.waited_for(start, end):
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
        page = page_down(fault.address)
        half.opening.add(page)
        span = half.span_at(page)
        if span is not None and int(span.caught) & DENIED:
            # The rule is about to be lifted there. If it is put in force again before that, the
            # page has to be protected again.
            half.served.doubt.add(page, page + PAGE)
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
        keep = span is not None and bool(int(span.caught) & STORES) and not fault.write
        try:
            outcome = patiently(half, partial(open_page, userfault, fault, page, keep=keep))
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
