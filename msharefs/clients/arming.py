"""Has accesses caught in clients' address spaces, one client or many side by side.

For: ``faults.py``. What a span asks for is made into calls of ioctl_userfaultfd(2), which wait for
the client's mmap_lock and so are made in its lane; for many clients by the compiled module.

Promises: in force when it returns SERVED. While calls are under way, and after some have failed,
what they are about is in doubt (``Served.doubt``). Each client's calls are made in the order in
which they were asked for.

Leaves out: what is to be caught; whom it concerns when an address space turns out to have ended.
Source: ioctl_userfaultfd(2).
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from msharefs.clients import native
from msharefs.clients.errands import Errands, Kind
from msharefs.clients.served import MODES
from msharefs.clients.userfault import PAGE, Mode, Outcome, outcome_of, patiently
from msharefs.region.demand import CAUGHT
from msharefs.region.errors import ClientStuck

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from msharefs.clients.errands import Call
    from msharefs.clients.lanes import Workers
    from msharefs.clients.served import Half, Served, Span
    from msharefs.clients.userfault import PageFault, Userfault


WP: Final = int(Mode.WP)


class Arming:
    """Carries it out, for all clients of a mount."""

    def __init__(
        self,
        workers: Workers,
        given_up: Callable[[Served, int, int], None],
        over: Callable[[Served], None],
    ) -> None:
        """``given_up(served, start, end)``: nothing is caught there any more, by addresses.

        ``over(served)``: its address space has ended.
        """
        self._workers = workers
        self._given_up = given_up
        self._over = over

    async def bring(self, served: Served, spans: Sequence[Span]) -> Outcome:
        """Catch in each span what it says, and protect every page of it anew.

        In force when this returns SERVED. GONE: the address space has ended. REFUSED: one of the
        ranges cannot be watched; those before it are. A caller that gives up waiting leaves the
        rest to be done.

        The kernel cannot register a range for less than it is, so it stays registered for more
        until nothing is caught there. A range that passes from one descriptor to the other is caught
        by neither for some microseconds: see :func:`moving`.
        """
        if not served.halves:
            return Outcome.GONE
        return await self._carry_out(served, spans, _plan(served, spans))

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
                    plans[index] = _plan(served, spans)
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
                    nursery.start_soon(one, index, partial(self._carry_out, served, spans, steps))
                else:
                    outcomes[index] = outcome = _outcome(status, kind)
                    if isinstance(outcome, Outcome):
                        self._brought(served, spans, outcome)
        return outcomes

    async def _carry_out(
        self, served: Served, spans: Sequence[Span], steps: list[_Step]
    ) -> Outcome:
        outcome = await in_lane(self._workers, served, partial(_carry_out, steps))
        self._brought(served, spans, outcome)
        return outcome

    def _brought(self, served: Served, spans: Sequence[Span], outcome: Outcome) -> None:
        for span in spans:
            if not MODES[int(span.caught)]:
                for half in served.halves:
                    half.cut(span.address, span.end)
                self._given_up(served, span.address, span.end)
            if outcome is Outcome.SERVED:
                served.doubt.remove(span.address, span.end)
        if outcome is Outcome.GONE:
            self._over(served)


def moving(served: Served, spans: Sequence[Span]) -> list[Span]:
    """The parts of ``spans`` that :meth:`Arming.bring` would take from one descriptor to the other.

    Their protection has changed so that DENIED does not hold any more, or does now. The
    client's own mapping is to forbid meanwhile what is ``caught`` before or after.
    """
    found: list[Span] = []
    for span in spans:
        if not MODES[int(span.caught)] or not served.halves:
            continue
        chosen = served.half_for(span.caught)
        for half in served.halves:
            if half is not chosen:
                for known in half.within(span.address, span.end):
                    both = CAUGHT[int(known.caught) | int(span.caught)]
                    found.append(attrs.evolve(known, caught=both))
    return found


def _plan(served: Served, spans: Sequence[Span]) -> list[_Step]:
    """What is to be done; noted as caught, and in doubt until it is done."""
    steps: list[_Step] = []
    for span in spans:
        served.doubt.add(span.address, span.end)
        steps += _steps(served, span)
    return steps


def _steps(served: Served, span: Span) -> Iterator[_Step]:
    mode, chosen = MODES[int(span.caught)], served.half_for(span.caught)
    for half in served.halves:
        if mode and half is chosen:
            continue
        for known in half.within(span.address, span.end):
            yield _Step(half, known.address, known.size, 0, wake=not mode)
            if mode:
                half.cut(known.address, known.end)
    if mode:
        for known in chosen.within(span.address, span.end):
            mode |= MODES[int(known.caught)]
        chosen.set_span(span)
        yield _Step(chosen, span.address, span.size, mode)


async def in_lane(workers: Workers, served: Served, job: Callable[[], Outcome]) -> Outcome:
    """Have a call made after those asked for that client before; what it returns or raises."""
    token, done = trio.lowlevel.current_trio_token(), trio.Event()
    result: list[Outcome | BaseException] = []

    def run() -> None:
        try:
            result.append(job())
        except BaseException as error:  # noqa: BLE001 - it is the caller's to raise
            result.append(error)
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(done.set)

    workers.submit(served.lane, run)
    await done.wait()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


@attrs.frozen(eq=False)
class _Step:
    """Register a range for ``mode`` and protect it, or for nothing, which unregisters it.

    ``wake``: who waits there goes on then. (Where it passes to another descriptor it is to ask
    again when all is done: when it is settled.)
    """

    half: Half
    address: int
    size: int
    mode: int
    wake: bool = False


def _carry_out(steps: list[_Step]) -> Outcome:
    """In a lane."""
    for step in steps:
        half, at, size = step.half, step.address, step.size
        if half.closed:
            return Outcome.GONE
        if not step.mode:
            outcome = patiently(half, partial(half.userfault.unregister, at, size))
            if outcome is Outcome.GONE:
                return outcome
            if step.wake:
                half.userfault.wake(at, size)  # the kernel does so for missing pages only
            continue
        outcome = patiently(half, partial(half.userfault.register, at, size, step.mode))
        if outcome is Outcome.SERVED and step.mode & WP:
            outcome = patiently(half, partial(half.userfault.protect, at, size))
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
        yield fd, Kind.REGISTER, at, size, step.mode
        if step.mode & WP:
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


def open_page(userfault: Userfault, fault: PageFault, page: int, *, keep: bool) -> Outcome:
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
