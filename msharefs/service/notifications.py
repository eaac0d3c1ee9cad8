"""Watched ranges: who is told, and what becomes of each access.

For: MSHAREFS_NOTIFY; judging what a userfaultfd has caught (``clients/faults.py`` asks) and what
comes by read() and write(), by the same rules.

How it goes: an access in a process arrives at :meth:`Notifications.judge`, is compared with the
table and the watches (``region/watch.py``), told of by an event, and answered: let go, denied, or
held (``holds.py``). *log* reports each page once, whoever touches it, until the range is armed
anew; *signal* and *hold* do so for each process, and again after a denial.

Leaves out: catching (``enforce.py`` brings the processes to it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import trio

from msharefs.abi import PAGE_SIZE, NotifyEvent, NotifyFlag, NotifyMode, OnTimeout, Prot
from msharefs.clients import signals
from msharefs.clients.faults import Answer
from msharefs.region.errors import AccessDenied, Unsupported
from msharefs.region.events import Event, EventKind
from msharefs.region.pages import page_down, page_up
from msharefs.region.watch import Action, Watch, check_watchable, judge
from msharefs.service.holds import Decision, Hold, Holds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from msharefs.abi import NotifyArgs
    from msharefs.clients.faults import Access, Served
    from msharefs.region.events import Actor
    from msharefs.region.watch import Watches
    from msharefs.service.changes import Changes, RegionState
    from msharefs.service.nodes import RegionFile

Owed: TypeAlias = tuple[int, int, int]
"""A signal to be sent: process, thread, number."""

_ANSWERS: Final = {Decision.ALLOW: Answer.GO, Decision.DENY: Answer.DENY}
_LOGGED: Final = (("mode", "log"),)
_ANY: Final = Prot.READ | Prot.WRITE
_SOME_BYTE: Final = 1
"""The length told of a load or store: the processor says where it began, not how long it is."""


class Reach(Protocol):
    """Brings processes to the watches of a range (``enforce.py``)."""

    async def rewatch(self, file: RegionFile, start: int, end: int) -> None:
        """Whoever maps ``[start, end)`` is to obey table and watches as they are now.

        Every page there is to be caught anew. Raises what becomes the caller's errno.
        """


class Settle(Protocol):
    """Answers an access that was to wait (:meth:`~msharefs.clients.faults.Faults.settle`)."""

    def __call__(self, served: Served, page: int, answer: Answer) -> None: ...


class Notifications:
    """Those of one mount. ``find`` gives the region of an inode number, None if it has gone."""

    def __init__(self, changes: Changes, find: Callable[[int], RegionFile | None]) -> None:
        self._changes = changes
        self._find = find
        self.holds: Final = Holds(changes.tell)
        self._held_pages: dict[tuple[Served, int], Hold] = {}
        self._signalled_pages: WeakKeyDictionary[Served, set[int]] = WeakKeyDictionary()
        """What was signalled since the last change: not again until there is another one."""
        self.settle: Settle | None = None
        """Set before anything is caught."""
        self.notes = False
        """Whether the kernel can note stores: set before anything is watched."""
        self._earlier: dict[int, Watches] = {}
        """Of regions that are just being armed: what was watched before."""

    # -- arming

    async def notify(self, file: RegionFile, args: NotifyArgs, actor: Actor, reach: Reach) -> None:
        """Watch a range (``args`` are checked), or watch it no more."""
        start = args.region_offset
        async with self._changes.state(file).lock:
            state = self._changes.state(file)
            with trio.CancelScope(shield=True):  # it ends soon, and is not to end half-way
                await self._rewatch(file, state, args, reach)
        self._tell(file, EventKind.NOTIFY, actor, "ioctl", start, args.size, _armed(args))

    async def _rewatch(
        self, file: RegionFile, state: RegionState, args: NotifyArgs, reach: Reach
    ) -> None:
        start, end = args.region_offset, args.region_offset + args.size
        before = state.watches.copy()
        if args.events:
            watch = _watch(args)
            if watch.scan and not self.notes:
                raise Unsupported("this kernel cannot note stores")
            for mapping in file.region.table.overlapping(start, end):
                check_watchable(watch, mapping, notes=self.notes)
            state.watches.arm(watch)
        else:
            state.watches.disarm(start, end)
        self.changed(file, start, end)
        # What was stored before counts as reported by the old watch, not the new one.
        self._earlier[file.ino] = before
        try:
            await reach.rewatch(file, start, end)
        except BaseException:
            state.watches = before
            await reach.rewatch(file, start, end)
            raise
        finally:
            del self._earlier[file.ino]

    def changed(self, file: RegionFile, start: int, end: int) -> None:
        """Protections or watches are others now: who is held there is judged anew."""
        self._signalled_pages.clear()
        if len(self.holds):
            self.holds.changed(file, start, end)

    # -- what was caught in a process

    def judge(self, access: Access) -> Answer:
        """An access of a process's own, or of a system call to its memory."""
        file = self._find(access.region)
        if file is None:
            return Answer.GO
        offset, store = access.offset, access.store
        kind = NotifyEvent.WRITE if store else NotifyEvent.READ
        watches = self._changes.state(file).watches
        watch = watches.at(offset)
        prot = file.region.rights_at(offset)
        verdict = judge(prot, watch, kind)
        action = verdict.action
        if not verdict.report:
            return Answer.DENY if action is Action.DENY else Answer.GO
        via, actor = "store" if store else "load", access.actor
        if action is Action.DENY:
            detail = (("prot", prot.text()),)
            self._tell(file, EventKind.DENY, actor, via, offset, _SOME_BYTE, detail)
            return Answer.DENY
        assert watch is not None, "only watched accesses are reported"
        if action is Action.GO:
            if watches.first(offset, kind):
                self._tell(file, EventKind.FAULT, actor, via, offset, _SOME_BYTE, _LOGGED)
            return Answer.GO
        if action is Action.SIGNAL:
            # The signal ends the wait for the page: the thread may ask again before it is let go.
            pages = self._signalled_pages.setdefault(access.served, set())
            if access.page in pages:
                return Answer.GO
            pages.add(access.page)
            self._tell(file, EventKind.FAULT, actor, via, offset, _SOME_BYTE, _signalled(watch))
            signals.send(actor.pid, actor.tid, watch.signo, access.fault.address)
            return Answer.GO
        return self._hold_page(file, watch, access, actor, via)

    def written(self, file: RegionFile, start: int, end: int, actor: Actor) -> None:
        """Pages were found that a process has stored to since stores to them were noted."""
        watches = self._earlier.get(file.ino, self._changes.state(file).watches)
        for watch in watches.within(start, end):
            if watch.events & NotifyEvent.WRITE and watch.mode is NotifyMode.LOG:
                for low, high in watches.fresh(watch.start, watch.end, NotifyEvent.WRITE):
                    self._tell(file, EventKind.FAULT, actor, "scan", low, high - low, _LOGGED)

    def _hold_page(
        self, file: RegionFile, watch: Watch, access: Access, actor: Actor, via: str
    ) -> Answer:
        settle, key = self.settle, (access.served, access.page)
        assert settle is not None
        at_once: list[Decision] = []
        begun = False

        def settled(decision: Decision) -> None:
            if not begun:
                at_once.append(decision)
                return
            del self._held_pages[key]
            if decision is Decision.AGAIN:
                answer = self.judge(access)
            elif decision is Decision.NONE:
                return
            else:
                answer = _ANSWERS[decision]
            if answer is not Answer.WAIT:  # else it is held again
                settle(*key, answer)

        event = _event(file, EventKind.HOLD, actor, via, access.offset, _SOME_BYTE, _held(watch))
        hold = self.holds.begin(file, watch, event, settled)
        if hold is None:
            return _ANSWERS[at_once[0]]
        begun = True
        self._held_pages[key] = hold
        return Answer.WAIT

    def abandoned(self, served: Served, page: int) -> None:
        """Nobody waits for that page of that process any more."""
        hold = self._held_pages.get((served, page))
        if hold is not None:
            self.holds.gone(hold)

    def given_up(self, served: Served, page: int) -> None:
        """That page of that process is not caught any more, so who waits for it goes on."""
        hold = self._held_pages.get((served, page))
        if hold is not None:
            self.holds.changed(hold.file, hold.offset, hold.offset + 1)

    # -- read() and write()

    def admit(
        self,
        file: RegionFile,
        offset: int,
        length: int,
        *,
        store: bool,
        actor: Actor,
        via: str,
        owed: list[Owed] | None = None,
    ) -> int | Awaitable[int]:
        """How many bytes of an access that the table allows the watches let go.

        Raises AccessDenied if that is none. An awaitable if it has to wait for somebody's word.
        Signals that go with it are sent, or put into ``owed`` if that is given: one that arrives
        while a call waits for a file ends it with EINTR.
        """
        kind = NotifyEvent.WRITE if store else NotifyEvent.READ
        end = offset + length
        for watch in self._changes.state(file).watches.within(page_down(offset), page_up(end)):
            start, stop = max(watch.start, offset), min(watch.end, end)
            if judge(_ANY, watch, kind).action is Action.HOLD:
                return self._admit_held(file, offset, length, start, kind, actor, via, owed)
            self._pass(file, watch, kind, start, stop, actor, via, owed)
        return length

    @staticmethod
    def pay(owed: Iterable[Owed]) -> None:
        """Send what :meth:`admit` put there."""
        for pid, tid, signo in owed:
            signals.send(pid, tid, signo, 0)

    def _pass(
        self,
        file: RegionFile,
        watch: Watch,
        kind: NotifyEvent,
        start: int,
        stop: int,
        actor: Actor,
        via: str,
        owed: list[Owed] | None,
    ) -> None:
        """Tell of an access that is let go without waiting."""
        verdict = judge(_ANY, watch, kind)
        if verdict.action is Action.SIGNAL:
            self._tell(file, EventKind.FAULT, actor, via, start, stop - start, _signalled(watch))
            signal = (actor.pid, actor.tid, watch.signo)
            if owed is None:
                self.pay([signal])
            else:
                owed.append(signal)
        elif verdict.report and self._changes.state(file).watches.first_of(start, stop, kind):
            self._tell(file, EventKind.FAULT, actor, via, start, stop - start, _LOGGED)

    async def _admit_held(
        self,
        file: RegionFile,
        offset: int,
        length: int,
        at: int,
        kind: NotifyEvent,
        actor: Actor,
        via: str,
        owed: list[Owed] | None,
    ) -> int:
        """From ``at`` on, by the watches as they are after each wait."""
        end = offset + length
        while at < end:
            watch = self._changes.state(file).watches.at(at)
            if watch is None:
                at = page_down(at) + PAGE_SIZE
                continue
            stop = min(watch.end, end)
            if judge(_ANY, watch, kind).action is not Action.HOLD:
                self._pass(file, watch, kind, at, stop, actor, via, owed)
                at = stop
                continue
            decision = await self._wait(file, watch, at, stop - at, actor, via)
            if decision is Decision.DENY:
                if at > offset:
                    return at - offset
                raise AccessDenied(f"{via} at {at:#x} was held and denied")
            if decision is Decision.ALLOW:
                at = stop
        return length

    async def _wait(
        self, file: RegionFile, watch: Watch, start: int, length: int, actor: Actor, via: str
    ) -> Decision:
        done = trio.Event()
        found: list[Decision] = []

        def settled(decision: Decision) -> None:
            found.append(decision)
            done.set()

        event = _event(file, EventKind.HOLD, actor, via, start, length, _held(watch))
        hold = self.holds.begin(file, watch, event, settled)
        try:
            await done.wait()
        finally:
            if hold is not None:
                self.holds.gone(hold)
        return found[0]

    def refused(
        self, file: RegionFile, offset: int, *, store: bool, actor: Actor, via: str
    ) -> None:
        """read() or write() was denied by the table: to be told if the offset is watched."""
        watch = self._changes.state(file).watches.at(offset)
        kind = NotifyEvent.WRITE if store else NotifyEvent.READ
        prot = file.region.rights_at(offset)
        verdict = judge(prot, watch, kind)
        if verdict.action is Action.DENY and verdict.report:
            detail = (("prot", prot.text()),)
            self._tell(file, EventKind.DENY, actor, via, offset, _SOME_BYTE, detail)

    def _tell(
        self,
        file: RegionFile,
        kind: EventKind,
        actor: Actor,
        via: str,
        offset: int,
        length: int,
        detail: tuple[tuple[str, str | int], ...],
    ) -> None:
        self._changes.tell(file, _event(file, kind, actor, via, offset, length, detail))


def _event(
    file: RegionFile,
    kind: EventKind,
    actor: Actor,
    via: str,
    offset: int,
    length: int,
    detail: tuple[tuple[str, str | int], ...],
) -> Event:
    return Event(kind, file.region.name, actor, via, offset, length, detail)


def _watch(args: NotifyArgs) -> Watch:
    return Watch(
        args.region_offset,
        args.region_offset + args.size,
        NotifyEvent(args.events),
        NotifyMode(args.mode),
        args.signo,
        args.timeout_ms,
        OnTimeout(args.on_timeout),
        scan=bool(args.flags & NotifyFlag.SCAN),
    )


def _armed(args: NotifyArgs) -> tuple[tuple[str, str | int], ...]:
    names = [name for bit, name in ((1, "write"), (2, "read")) if args.events & bit]
    watched = ("watched", ",".join(names) or "nothing")
    return (watched, ("mode", NotifyMode(args.mode).name.lower())) if names else (watched,)


def _signalled(watch: Watch) -> tuple[tuple[str, str | int], ...]:
    return (("mode", "signal"), ("signo", watch.signo))


def _held(watch: Watch) -> tuple[tuple[str, str | int], ...]:
    on_timeout = watch.on_timeout.name.lower()
    return (("mode", "hold"), ("timeout_ms", watch.timeout_ms), ("on_timeout", on_timeout))
