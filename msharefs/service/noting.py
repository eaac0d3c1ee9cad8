"""Stores that the kernel notes in the processes of a mount: armed, looked for, and told of.

For: watched ranges whose stores nobody waits for (``Caught.NOTED``). Each period of the mount
(``log_period=``) the pages that were stored to since their range was armed are asked for, of every
process that maps the region, and whoever tells of them (``notifications.py``) is told.

Promises: what a process stored to before a range is armed anew, or watched no more, is told of by
then; what was told of a process is not looked at again until the range is armed anew. A process
that cannot be looked at in time keeps nobody else waiting, and is looked at again.

Leaves out: what a process stored that has ended, or has unmapped or replaced its mapping, since it
was looked at last: its page tables are gone. ``clients/written.py`` has the calls of the kernel.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from msharefs.abi import Prot
from msharefs.clients.gone import Gone
from msharefs.clients.pagemap import try_noting
from msharefs.clients.userfault import UserfaultUnavailable
from msharefs.clients.written import make
from msharefs.region.demand import Caught, Demand
from msharefs.region.errors import ClientStuck
from msharefs.region.events import Actor
from msharefs.region.spans import SpanSet
from msharefs.service.batch import spans_of
from msharefs.service.errors import errno_of
from msharefs.service.layout import layout_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from msharefs.clients.borrow import Body
    from msharefs.clients.faults import Span
    from msharefs.clients.pagemap import Range
    from msharefs.clients.roster import Client, Roster
    from msharefs.clients.written import Noted, Written
    from msharefs.service.changes import RegionState
    from msharefs.service.nodes import RegionFile

    Sessions = Callable[[dict[Client, Body[Any]]], Awaitable[dict[Client, Any]]]

log = logging.getLogger(__name__)

RESTS: Final = 3
"""How many times as long as a look takes is rested after it at least."""

_NOTED: Final = int(Caught.NOTED)


@attrs.define(eq=False)
class _Book:
    """One client: by region, where stores are noted, and what was told of them by address."""

    noted: Noted
    armed: dict[int, SpanSet] = attrs.field(factory=dict)
    told: dict[int, SpanSet] = attrs.field(factory=dict)


class Noting:
    """Those of one mount. ``period`` in seconds, ``device`` is the mount's st_dev."""

    def __init__(
        self,
        written: Written,
        roster: Roster,
        device: int,
        period: float,
        *,
        state: Callable[[RegionFile], RegionState],
        find: Callable[[int], RegionFile | None],
        tell: Callable[[RegionFile, int, int, Actor], None],
    ) -> None:
        """``tell`` hears of ``[start, end)`` of a region and who has stored there."""
        self.available: Final = _available()
        """Whether the kernel can do it at all."""
        self._written = written
        self._roster = roster
        self._device = device
        self._period = period
        self._state = state
        self._find = find
        self._tell = tell
        self._books: dict[Client, _Book] = {}
        self._looking = trio.Lock()
        self._some = trio.Event()
        self._rounds: dict[int, int] = {}
        """By region, how often it was armed: what was found before that is void."""

    # -- arming

    async def arm(
        self, file: RegionFile, todo: dict[Client, list[Span]], sessions: Sessions, *, anew: bool
    ) -> dict[Client, Exception]:
        """Note stores to ``todo`` from now on; ``anew`` where they are noted already.

        Those who have made no descriptor for it make one in ``sessions``. What could not be done, by
        client: Gone, ClientStuck, UserfaultUnavailable, OSError.
        """
        failures: dict[Client, Exception] = {}
        lacking: dict[Client, list[Span]] = {}

        async def one(client: Client, spans: list[Span]) -> None:
            book = self._book(client, failures)
            if book is None:
                return
            ranges = [(span.address, span.end) for span in spans]
            known = book.armed.setdefault(file.ino, SpanSet())
            if not anew:
                ranges = [part for part in ranges if known.within(*part) != [part]]
            try:
                armed = await self._written.arm(book.noted, ranges)
            except (Gone, ClientStuck, OSError) as error:
                failures[client] = error
                return
            known = book.armed.setdefault(file.ino, SpanSet())  # it may be another one by now
            for part in ranges:
                known.add(*part)
            self._some.set()
            if anew:
                book.told.pop(file.ino, None)
            self._report(file, client, spans, armed.written)
            if armed.lacking:
                for part in armed.lacking:
                    known.remove(*part)
                lacking[client] = [s for s in spans if (s.address, s.end) in armed.lacking]

        await _each(one, todo)
        if not lacking:
            return failures
        for client, made in (await sessions(dict.fromkeys(lacking, make))).items():
            if isinstance(made, Exception):
                failures[client] = made
                del lacking[client]
            elif client in self._books:
                self._written.serve(self._books[client].noted, made)
            else:
                made.close()
        again = dict(lacking)
        lacking.clear()
        await _each(one, again)
        for client in lacking:
            failures[client] = UserfaultUnavailable(f"process {client.pid}: stores are not noted")
        return failures

    def _book(self, client: Client, failures: dict[Client, Exception]) -> _Book | None:
        book = self._books.get(client)
        if book is None:
            try:
                book = _Book(self._written.add(client.space))
            except (Gone, OSError) as error:
                failures[client] = error
                return None
            if client.closed:
                self._written.drop(book.noted)
                failures[client] = Gone(f"process {client.pid}")
                return None
            self._books[client] = book
            client.on_close.append(partial(self._forget, client))
        return book

    def _forget(self, client: Client) -> None:
        self._written.drop(self._books.pop(client).noted)

    async def release(self, file: RegionFile, todo: dict[Client, list[Span]]) -> None:
        """Note stores to ``todo`` no more, where they are; what was stored until now is told."""

        async def one(client: Client, spans: list[Span]) -> None:
            book = self._books.get(client)
            armed = book.armed.get(file.ino) if book is not None else None
            if book is None or not armed:
                return
            ranges = [part for span in spans for part in armed.within(span.address, span.end)]
            if not ranges:
                return
            try:
                written = await self._written.release(book.noted, ranges)
            except (Gone, ClientStuck, OSError) as error:
                log.debug("process %s: stores are still noted: %s", client.pid, error)
                return
            for part in ranges:
                armed.remove(*part)
            self._report(file, client, spans, written)

        await _each(one, {c: spans for c, spans in todo.items() if c in self._books})

    def remapped(self, client: Client, inode: int) -> None:
        """Some of what the client maps of a region is mapped anew, and is to be armed again."""
        book = self._books.get(client)
        if book is not None:
            book.armed.pop(inode, None)

    async def settle(self, file: RegionFile, start: int, end: int) -> None:
        """Tell of what was stored to ``[start, end)`` until now, and note it anew from now on.

        By what was last seen of those who map the region.
        """
        whole = [Demand(start, end, Prot.NONE, Caught.NOTED)]

        async def one(client: Client, spans: list[Span]) -> None:
            book = self._books[client]
            armed = book.armed[file.ino]
            ranges = [part for span in spans for part in armed.within(span.address, span.end)]
            try:
                found = await self._written.arm(book.noted, ranges)
            except (Gone, ClientStuck, OSError) as error:
                log.debug("process %s was not looked at: %s", client.pid, error)
                return
            told = book.told.get(file.ino, SpanSet())
            for part in ranges:
                told.remove(*part)
            self._report(file, client, spans, found.written)

        todo: dict[Client, list[Span]] = {}
        for client, book in self._books.items():
            if book.armed.get(file.ino):
                windows = [w for w in client.files.get(file.ino, ()) if w.shared]
                todo[client] = spans_of(windows, whole, file.ino)
        await _each(one, todo)

    def rearmed(self, file: RegionFile) -> None:
        """Ranges of the region were armed anew: what was found before it counts no more."""
        self._rounds[file.ino] = self._rounds.get(file.ino, 0) + 1
        for book in self._books.values():
            book.told.pop(file.ino, None)

    # -- looking

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever: look once a period, while anything is noted."""
        task_status.started()
        took = 0.0
        while True:
            await self._some.wait()
            await trio.sleep(max(self._period, RESTS * took))
            started = trio.current_time()
            inodes = {
                i for book in self._books.values() for i, spans in book.armed.items() if spans
            }
            if not inodes:
                self._some = trio.Event()
            for inode in inodes:
                file = self._find(inode)
                if file is not None:
                    await self.look(file)
            took = trio.current_time() - started

    async def look(self, file: RegionFile) -> None:
        """Tell of what was stored to in all who map the region, as far as it is noted."""
        async with self._looking:
            try:
                await self._look(file)
            except Exception as error:  # noqa: BLE001 - the next look may go better
                errno_of(error, f"looking for stores to {file.region.name}")

    async def _look(self, file: RegionFile) -> None:
        wanted = self._noted(file)
        clients = [c for c in self._roster.of_region(file.ino) if c in self._books]
        if not wanted or not clients:
            return
        found: list[list[Span]] = [[] for _ in clients]

        def ranges(index: int) -> list[Range]:
            windows = clients[index].space.windows(self._device, file.ino)
            found[index] = spans_of(windows, wanted, file.ino)
            return [(span.address, span.end) for span in found[index]]

        started = self._rounds.get(file.ino)
        results = await self._written.look(
            [(self._books[c].noted, partial(ranges, index)) for index, c in enumerate(clients)]
        )
        if self._rounds.get(file.ino) != started:
            return
        again: dict[Client, list[Span]] = {}
        for client, spans, written in zip(clients, found, results, strict=True):
            book = self._books.get(client)
            if book is None:
                continue
            if written is None:
                continue
            if not written.whole:
                again[client] = spans
            told = book.told.setdefault(file.ino, SpanSet())
            new = [part for low, high in written.written for part in _without(told, low, high)]
            for low, high in new:
                told.add(low, high)
            self._report(file, client, spans, new)
        lock = self._state(file).lock
        if not again or lock.locked():  # a change sees to it
            return
        async with lock:
            for client in again:  # it has mapped something anew by its own means
                self.remapped(client, file.ino)
            await self.arm(file, again, _nobody, anew=False)

    def _noted(self, file: RegionFile) -> list[Demand]:
        """The parts of a region where stores are to be noted."""
        state = self._state(file)
        return [
            demand
            for watch in state.watches
            for demand in layout_of(file.region, state, watch.start, watch.end).served
            if demand.caught & _NOTED
        ]

    def _report(
        self, file: RegionFile, client: Client, spans: Sequence[Span], written: Iterable[Range]
    ) -> None:
        actor = Actor(client.pid, 0, client.comm)
        for low, high in written:
            for span in spans:
                start, end = max(low, span.address), min(high, span.end)
                if start < end:
                    shift = span.offset - span.address
                    self._tell(file, start + shift, end + shift, actor)


async def _nobody(bodies: dict[Client, Body[Any]]) -> dict[Client, Any]:
    """Sessions in which nobody is borrowed: who has made no descriptor is left as it is."""
    return dict.fromkeys(bodies, UserfaultUnavailable("it was not asked to"))


def _available() -> bool:
    try:
        try_noting()
    except OSError as error:
        log.info("stores cannot be noted: %s", error.strerror)
        return False
    return True


def _without(told: SpanSet, low: int, high: int) -> list[Range]:
    """The parts of ``[low, high)`` that are not in the set."""
    parts: list[Range] = []
    for start, end in told.within(low, high):
        if low < start:
            parts.append((low, start))
        low = end
    if low < high:
        parts.append((low, high))
    return parts


async def _each(
    do: Callable[[Client, list[Span]], Awaitable[None]], todo: dict[Client, list[Span]]
) -> None:
    """Side by side: what waits for a client's memory map waits in a lane of that client's own."""
    async with trio.open_nursery() as nursery:
        for client, spans in todo.items():
            nursery.start_soon(do, client, spans)
