"""Many clients of one region, brought to one layout side by side.

For: ``enforce.py``. First each is made to show what is to be seen (``laying.py``), then what is newly
to be caught is caught, then protections are set by borrowed threads, then what need not be caught
any more is let go; so the rule is in force at every moment.

Promises: one that fails does not keep the others from being done; failures are returned, by client.
Those that have gone, or map the region no more, are taken off the roster.

Leaves out: what a failure means (``enforce.py``), what the layout is (``layout.py``).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs
import trio

from msharefs.abi import PROT_ALL, Prot
from msharefs.clients.arch import Number
from msharefs.clients.borrow import borrow, waits_for_child
from msharefs.clients.faults import Served, Span, moving
from msharefs.clients.gone import Gone
from msharefs.clients.many import protect_many, protecting
from msharefs.clients.procmap import MappedRange
from msharefs.clients.replica import Comparison, Protect, is_replica
from msharefs.clients.roster import Client
from msharefs.clients.space import AddressSpace, files_of
from msharefs.clients.userfault import Outcome, UserfaultUnavailable, make
from msharefs.region.demand import CAUGHT, Caught, Demand
from msharefs.region.errors import ClientStuck
from msharefs.region.mapping import PROTS
from msharefs.service.advising import advising, forget_advice, missing_advice, note_advice
from msharefs.service.laying import lay
from msharefs.service.layout import newly, no_longer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from msharefs.clients.borrow import Body, Borrowed
    from msharefs.clients.roster import Attachment
    from msharefs.clients.tracer import Session
    from msharefs.service.enforce import Enforcer
    from msharefs.service.layout import Layout
    from msharefs.service.nodes import RegionFile

    Run: TypeAlias = Callable[[Body[Any]], Awaitable[Any]]
    """Borrows a thread that is stopped already (``Held.run``)."""

LIMIT: Final = 1.0
"""Seconds that a process has to stop for us before it counts as stuck."""

MADV_DONTNEED: Final = 4

DECLARED_TOO_MANY: Final = 64
STAMPS: Final = count(1)
"""The numbers of changes that have everything caught anew."""
_OPEN: Final = int(Prot.READ | Prot.WRITE)
_NOTED: Final = int(Caught.NOTED)


class Batch:
    """Clients that are brought to one layout, in four steps: lay, catch, protect, lift."""

    def __init__(
        self,
        enforcer: Enforcer,
        file: RegionFile,
        layout: Layout,
        before: Sequence[Demand],
        *,
        rearm: int = 0,
        shuts: bool = True,
    ) -> None:
        """``rearm``: everything is to be caught anew, in each client once for that number.

        ``shuts``: who cannot be shown a file is to see nothing there; else that will be undone.
        """
        self.enforcer = enforcer
        self.file = file
        self.layout = layout
        self._before = before
        self._rearm = rearm
        self.windows: dict[Client, list[MappedRange]] = {}
        self.run_by: dict[Client, Run] = {}
        """Whose thread is stopped already."""
        self.late: dict[Client, list[MappedRange]] = {}
        """Whose only thread waits for us: left out of everything, and owed it."""
        self._caught = [demand for demand in layout.served if _caught(demand)]
        self._noted = [demand for demand in layout.served if demand.caught & Caught.NOTED]
        self._newly = [demand for demand in newly(before, layout.served) if _caught(demand)]
        self._spans: dict[tuple[int, int], list[Span]] = {}
        self.shuts = shuts
        self._uncatchable: set[Client] = set()
        self._zap: dict[Client, list[Span]] = {}
        self.touched = False
        """Whether anybody did not obey already."""

    async def look(
        self, clients: Sequence[Client], *, seen: bool = False, waiting: bool = True
    ) -> None:
        """What each has mapped. Those that have gone, or map the region no more, are forgotten.

        ``seen``: somebody has just looked at all of them. ``waiting``: they may wait for us.
        """
        device, inode = self.enforcer.device, self.file.ino
        roster = self.enforcer.roster
        if seen:
            unseen: list[Client] = []
            for client in clients:
                mapped = client.files.get(inode, [])
                if not all(m.shared for m in mapped):
                    mapped = [m for m in mapped if m.shared]
                if mapped and client.looked == client.met:
                    self._note(client, mapped, waiting=waiting)
                else:
                    unseen.append(client)
            clients = unseen

        if clients:
            spaces = [client.space for client in clients]
            looks = await trio.to_thread.run_sync(files_of, spaces, device)
            for client, files in zip(clients, looks, strict=True):
                if files is None:
                    roster.forget(client)
                else:
                    self._note(client, files.get(inode, []), waiting=waiting)
        self._uncatchable.update(await self.enforcer.claim(self.windows))

    def _note(self, client: Client, mapped: list[MappedRange], *, waiting: bool) -> None:
        if not mapped:
            self.enforcer.roster.detach(client, self.file.ino)
        elif waiting and (tid := self.enforcer.debts.waiter(client)):
            self.enforcer.debts.owe(tid, self.file, client)
            self.late[client] = mapped
        else:
            self.windows[client] = mapped

    def forget(self, client: Client) -> None:
        """It has gone, or maps the region no more."""
        self.windows.pop(client, None)
        try:
            client.space.check()
        except Gone:
            self.enforcer.roster.forget(client)
        else:
            self.enforcer.roster.detach(client, self.file.ino)

    # -- what is shown

    async def lay(self) -> dict[Client, Exception]:
        """Have each show what it is to show; who fails is left out of what follows."""
        before = dict(self.windows)
        failures = await lay(self)
        for client, windows in self.windows.items():
            if windows is not before.get(client):  # what was laid there is not noted yet
                self.enforcer.noting.remapped(client, self.file.ino)
                forget_advice(client, self.file.ino)
        return failures

    # -- what is caught

    async def catch(self) -> dict[Client, Exception]:
        """Catch what is newly to be caught; needs a userfaultfd, made where there is none."""
        failures: dict[Client, Exception] = await self._note_stores() if self._noted else {}
        if not self._caught:
            return failures
        makers = [
            client
            for client in self.windows
            if client.served is None and client not in self._uncatchable
        ]
        made = await self.sessions(dict.fromkeys(makers, make))
        for client, outcome in made.items():
            if isinstance(outcome, Exception):
                if not isinstance(outcome, Gone | UserfaultUnavailable):
                    failures[client] = outcome
                self._uncatchable.add(client)
            else:
                self.enforcer.serve(client, self.enforcer.faults.add(client, outcome, client.pid))
        todo = {
            client: spans
            for client, windows in self.windows.items()
            if client not in self._uncatchable and (spans := self._to_catch(client, windows))
        }
        await self.enforcer.noting.release(self.file, todo)
        outcomes = await self._bring(todo)
        await self._catch_unmet()
        for client, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                failures[client] = outcome
            elif outcome is Outcome.SERVED:
                if attached := client.regions.get(self.file.ino):
                    self._note_armed(attached)
                zap = [span for span in todo[client] if span.caught & Caught.ACCESSES]
                self._zap[client] = zap
            else:
                self._uncatchable.add(client)
        return failures

    async def _catch_unmet(self) -> None:
        """Catch it in children as well that have no number yet, or that nobody has seen.

        A child that is being forked is told of before its parent can be protected, and of those
        that are forked later what their parents had is true.
        """
        faults, met = self.enforcer.faults, set[Served]()
        while True:
            todo = [
                (child, spans)
                for child in faults.unmet()
                if child not in met and (spans := self._to_catch_unmet(child))
            ]
            if not todo:
                return
            met.update(child for child, _ in todo)
            await faults.bring_many(todo)

    def _to_catch_unmet(self, child: Served) -> list[Span]:
        inode = self.file.ino
        windows = self.windows.get(child.client) if isinstance(child.client, Client) else None
        if windows is None:  # those of its parent are not known: what it has inherited will do
            windows = [
                MappedRange(0, span.address, span.end, PROT_ALL, True, span.offset, inode)
                for span in child.spans
                if span.region == inode
            ]
        spans = spans_of(windows, self._caught, inode)
        if self._rearm and child.stamps.get(inode) != self._rearm:
            return spans
        return [span for span in spans if not child.catches(span)]

    def _to_catch(self, client: Client, windows: list[MappedRange]) -> list[Span]:
        attached = client.regions.get(self.file.ino)
        if attached is None:  # it has just ended, or unmapped the region
            return []
        every = self._spans_of(windows, self._caught)
        served = client.served
        if served is None or not attached.armed:
            return every
        if self._rearm and served.stamps.get(self.file.ino) != self._rearm:
            return every
        # What it has mapped since, or had before it was forked, is not caught by itself.
        found = self._spans_of(windows, self._newly)
        if found == every:
            return found
        known = {(span.address, span.size) for span in found}
        more = [s for s in every if (s.address, s.size) not in known and not served.catches(s)]
        return [*found, *more] if more else found

    def _spans_of(self, windows: list[MappedRange], wanted: Sequence[Demand]) -> list[Span]:
        """Worked out once for forked clients, who share their windows."""
        key = id(windows), id(wanted)
        spans = self._spans.get(key)
        if spans is None:
            spans = self._spans[key] = spans_of(windows, wanted, self.file.ino)
        return spans

    async def _note_stores(self) -> dict[Client, Exception]:
        """Have stores noted where they are to be. Who cannot do that is left alone."""
        todo = {
            client: spans
            for client, windows in self.windows.items()
            if (spans := spans_of(windows, self._noted, self.file.ino))
        }
        # A range that is caught cannot be noted as well.
        caught = {c: spans for c, spans in todo.items() if c.served and c.served.spans}
        await self._bring({c: _without_noted(spans) for c, spans in caught.items()})
        failures = await self.enforcer.noting.arm(
            self.file, todo, self.sessions, anew=bool(self._rearm)
        )
        for client in todo:
            attached = client.regions.get(self.file.ino)
            if client not in failures and attached is not None:
                self._note_armed(attached)
        return {c: error for c, error in failures.items() if isinstance(error, ClientStuck)}

    async def lift(self) -> None:
        """Catch no more what is no longer to be caught."""
        inode, served = self.file.ino, self.layout.served
        gone = no_longer(self._before, served)
        free = [] if self._before else [demand for demand in served if not demand.caught]
        todo: dict[Client, list[Span]] = {}
        for client, windows in self.windows.items():
            attached = client.regions.get(inode)
            if client.served is None or attached is None or not attached.armed:
                continue
            spans = _without_noted(self._spans_of(windows, gone))
            if free:  # what a child has inherited meanwhile nobody knows but itself
                inherited = self._spans_of(windows, free)
                spans = [*spans, *(s for s in inherited if client.served.catches_any(s))]
            if spans:
                todo[client] = spans
            if gone or spans:
                self._note_armed(attached)
            if self._rearm and client not in self._uncatchable:
                client.served.stamps[inode] = self._rearm
        await self._bring(todo)
        forgotten = [demand for demand in gone if not demand.caught & Caught.NOTED]
        if forgotten:
            parts = {c: spans_of(w, forgotten, inode) for c, w in self.windows.items()}
            await self.enforcer.noting.release(self.file, parts)

    def _note_armed(self, attached: Attachment) -> None:
        served = self.layout.served
        start, end = served[0].start, served[-1].end
        outside = [(a, min(b, start)) for a, b in attached.armed if a < start]
        outside += [(max(a, end), b) for a, b in attached.armed if b > end]
        attached.armed = sorted([*outside, *((d.start, d.end) for d in self._caught)])

    async def _bring(self, todo: dict[Client, list[Span]]) -> dict[Client, Outcome | Exception]:
        """Have spans caught, without a moment in which one is caught by nobody and open to all."""
        faults = self.enforcer.faults
        self.touched = self.touched or bool(todo)
        outcomes: dict[Client, Outcome | Exception] = {}
        plain: list[tuple[Client, Served]] = []
        for client, spans in todo.items():
            served = client.served
            if served is None:  # it has just ended
                outcomes[client] = Outcome.GONE
            elif shut := moving(served, spans):
                outcomes[client] = await self._bring_shut(client, served, spans, shut)
            else:
                plain.append((client, served))
        brought = await faults.bring_many([(served, todo[client]) for client, served in plain])
        outcomes.update(zip((client for client, _ in plain), brought, strict=True))
        return outcomes

    async def _bring_shut(
        self, client: Client, served: Served, spans: list[Span], shut: Sequence[Span]
    ) -> Outcome | Exception:
        windows = self.windows[client]
        await self.sessions({client: _protecting(_gated(windows, shut, shut=True), ())})
        try:
            return await self.enforcer.faults.bring(served, spans)
        except OSError as error:
            return error
        finally:
            with trio.CancelScope(shield=True):
                steps = _gated(windows, shut, shut=False)
                await self.sessions({client: _protecting(steps, ())})

    # -- protections

    async def step(self) -> dict[Client, Exception]:
        """Make each client's mappings what they are to be."""
        comparisons: dict[tuple[bool, int], Comparison] = {}
        same: dict[tuple[bool, int], list[Protect]] = {}  # by windows, which forked clients share
        whole = self.file.region.semantics.superset
        bodies: dict[Client, Body[None]] = {}
        advised_only: dict[Client, Body[None]] = {}
        advice = missing_advice(self)
        plain_steps: dict[Client, list[Protect]] = {}
        for client in list(self.windows):
            plain = client in self._uncatchable
            known = same.get((plain, id(self.windows[client]))) if whole else None
            if known is not None:
                steps = known
            else:
                try:
                    parts = self.parts(client)
                except Gone:
                    self.enforcer.roster.forget(client)
                    continue
                steps = []
                for within, windows in parts.items():
                    comparison = comparisons.get((plain, int(within)))
                    if comparison is None:
                        wanted = self.layout.plain if plain else self.layout.served
                        comparison = Comparison(wanted, within=within)
                        comparisons[plain, int(within)] = comparison
                    found = comparison.steps(windows)
                    steps += [step for step in found if isinstance(step, Protect)]
                if len(parts) > 1:
                    steps.sort(key=lambda step: step.address)
                same[plain, id(self.windows[client])] = steps
            zap = self._zap.get(client, [])
            if client in advice:
                bodies_of = bodies if zap or steps else advised_only
                bodies_of[client] = advising(advice[client], _protecting(steps, zap))
            elif zap or (steps and (client in self.run_by or client.sharers)):
                bodies[client] = _protecting(steps, zap)
            elif steps:
                plain_steps[client] = steps
        self.touched = self.touched or bool(bodies or plain_steps)
        outcomes = await self.sessions(bodies | advised_only)
        note_advice(self, advice, outcomes)
        for client in advised_only:  # what is only advice is no reason for a change to fail
            if not isinstance(outcomes[client], Gone):
                del outcomes[client]
        outcomes.update(await self._protect(plain_steps))
        await self._by_children(plain_steps, outcomes)
        failures = {c: e for c, e in outcomes.items() if isinstance(e, Exception)}
        for client in [c for c, error in failures.items() if isinstance(error, Gone)]:
            del failures[client]
            self.enforcer.roster.forget(client)
        return failures

    async def _by_children(
        self, steps: dict[Client, list[Protect]], outcomes: dict[Client, Any]
    ) -> None:
        """Who did not stop because it is in vfork(2): its child has the same memory."""
        stuck = [
            c for c in steps if isinstance(outcomes[c], ClientStuck) and waits_for_child(c.pid)
        ]
        if stuck:
            await self.enforcer.roster.survey()
            again = {c: _protecting(steps[c], ()) for c in stuck if c.sharers}
            outcomes.update(await self.sessions(again))

    async def _protect(self, steps: dict[Client, list[Protect]]) -> dict[Client, Exception | None]:
        clients = list(steps)
        results = await protect_many(
            self.enforcer.tracer,
            [client.pid for client in clients],
            list(steps.values()),
            LIMIT,
            spaces=[client.space for client in clients],
            known=[client.borrowed for client in clients],
            guard=self.enforcer.guard,
        )
        for client, result in zip(clients, results, strict=True):
            client.borrowed = client.borrowed or result is None
        return dict(zip(clients, results, strict=True))

    def parts(self, client: Client) -> dict[Prot, list[MappedRange]]:
        """The client's mappings, by the rights that they may have at all: those asked for.

        Where the superset rule holds all of them asked for all that there are. Raises Gone.
        """
        windows = self.windows[client]
        if self.file.region.semantics.superset:
            return {PROT_ALL: windows}
        limited = self.file.region.semantics.limited
        attached = client.regions[self.file.ino]
        if len(attached.declared) > 2 * len(windows) + DECLARED_TOO_MANY:
            attached.rights(windows, has_now)  # forgets those of mappings that have gone

        def asked_for(window: MappedRange) -> Prot:
            """No gate saw it: what it has, or what a fork of one that obeys already may have."""
            if not limited:
                return client.space.may(window)
            if not is_replica([window], self.layout.plain):
                return window.prot
            return PROTS[int(window.prot) | int(client.space.may(window)) & _OPEN]

        return attached.parts(windows, asked_for)

    async def sessions(
        self, bodies: dict[Client, Body[Any]], limit: float = LIMIT
    ) -> dict[Client, Any]:
        """Have each client's thread do its own: what came of it, an exception as its value."""
        outcomes: dict[Client, Any] = {}
        borrowed: list[Client] = []
        for client, body in bodies.items():
            run = self.run_by.get(client)
            if run is not None:
                try:
                    outcomes[client] = await run(self._guarded(body))
                except Exception as error:  # noqa: BLE001 - judged by the caller
                    outcomes[client] = error
            else:
                borrowed.append(client)
        sessions = [_session(client, self._guarded(bodies[client]), limit) for client in borrowed]
        results = await self.enforcer.tracer.run(sessions)
        for client, result in zip(borrowed, results, strict=True):
            client.borrowed = client.borrowed or not isinstance(result, Exception)
        outcomes.update(zip(borrowed, results, strict=True))
        return outcomes

    def _guarded(self, body: Body[Any]) -> Body[Any]:
        guard = self.enforcer.guard
        return body if guard is None else guard(body)


class all_locks:  # noqa: N801 - used like a function
    """The locks of many clients, in one order for everybody."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = sorted(set(clients), key=id)
        self._held: list[Client] = []

    async def __aenter__(self) -> None:
        try:
            for client in self._clients:
                try:
                    client.lock.acquire_nowait()
                except trio.WouldBlock:
                    await client.lock.acquire()
                self._held.append(client)
        except BaseException:
            self._release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        for client in self._held:
            client.lock.release()
        self._held = []


def _session(client: Client, body: Body[Any], limit: float) -> Session[Any]:
    """Borrow a thread that has the client's memory.

    A process in vfork(2) does not stop before its child has done; that has the same memory.
    """
    space, known = client.space, client.borrowed
    if client.sharers and waits_for_child(client.pid):
        for pid in client.sharers:
            try:
                same = partial(_same, pid, space)
                return (yield from borrow(pid, body, limit=limit, known=known, check=same))
            except Gone:  # it runs another program by now, and its parent goes on
                continue
    check = space.check  # it may have become another program since we looked
    return (yield from borrow(client.pid, body, limit=limit, known=known, check=check))


def _same(pid: int, space: AddressSpace) -> None:
    """Raises Gone unless the process has that address space."""
    other = AddressSpace(pid)
    try:
        if not other.same_as(space):
            raise Gone(f"process {pid}")
    finally:
        other.close()


def _caught(demand: Demand) -> int:
    """What a fault tells of: stores that are noted make none."""
    return int(demand.caught) & ~_NOTED


def _without_noted(spans: Iterable[Span]) -> list[Span]:
    return [attrs.evolve(span, caught=CAUGHT[int(span.caught) & ~_NOTED]) for span in spans]


def has_now(window: MappedRange) -> Prot:
    return window.prot


def _protecting(steps: Sequence[Protect], zap: Sequence[Span]) -> Body[None]:
    def body(thread: Borrowed) -> Session[None]:
        for span in zap:
            yield from thread.call(Number.MADVISE, span.address, span.size, MADV_DONTNEED)
        yield from protecting(steps)(thread)

    return body


def _gated(windows: Iterable[MappedRange], moving: Iterable[Span], *, shut: bool) -> list[Protect]:
    """Forbid in a client's own mapping what is caught of ``moving``, or open it again for faults."""
    steps: list[Protect] = []
    for window in windows:
        for span in moving:
            low, high = max(window.start, span.address), min(window.end, span.end)
            if low >= high:
                continue
            prot = int(window.prot) | _OPEN
            if shut:
                prot = 0 if span.caught & Caught.ACCESSES else prot & ~int(Prot.WRITE)
            steps.append(Protect(low, high - low, PROTS[prot]))
    return steps


def spans_of(windows: Iterable[MappedRange], wanted: Sequence[Demand], region: int) -> list[Span]:
    """Where ``wanted`` lies in a client's address space; it ascends, and nothing of it overlaps.

    Of a region that holds a thousand files a client has as many windows, and each meets one demand.
    """
    ends = [demand.end for demand in wanted]
    spans: list[Span] = []
    for window in windows:
        low, high = window.offset, window.offset + window.end - window.start
        for index in range(bisect_right(ends, low), len(wanted)):
            demand = wanted[index]
            if demand.start >= high:
                break
            start = max(demand.start, low)
            address = window.start + start - low
            size = min(demand.end, high) - start
            spans.append(Span(address, size, region, start, demand.caught))
    return spans


def thread_count(pid: int) -> int:
    """How many threads a process has; 0 if it has gone."""
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink - 2  # noqa: PTH116 - cheap, and often
    except OSError:
        return 0
