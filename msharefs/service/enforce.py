"""Brings the processes that map a region to what its table demands, and keeps them there.

For: a change of a region in every process before the ioctl returns (:class:`Move`), and making a
process that is new (found at the gate, forked, found by the census) a replica of the table.

How a change goes: those who map the region are gathered; each is brought to what the old *and*
the new table allow; then the table is swapped and memory dropped, which is the caller's part; then
each is brought to the new table. All processes are worked on side by side. Rights are taken away
everywhere before anything else happens, so nobody ever has more than old and new rights together.
Processes that turn up meanwhile (forks of those not yet changed) are looked for after each step
until all that are found obey already. Who comes by the gate meanwhile obeys from the beginning, and
a child of one that has been changed has inherited it.

What cannot be changed: a process that may not be borrowed (NotAdoptable), or did not stop within
:data:`~msharefs.service.batch.LIMIT` (ClientStuck). With ``enforce=strict`` the change is undone and
its caller gets the errno. With ``enforce=best`` the process is listed as unenforced with the reason,
an event tells, and every later change and census tries again. A process that refuses a call itself (ENOMEM: too
many mappings) has the change undone under either policy.

What shares what: everything runs in the loop; a region's changes are serialised by its lock, and
``Client.lock`` is held while one client is looked at and changed.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
import trio

from msharefs.abi import Kind, MapFlag, Prot
from msharefs.clients.gone import Gone
from msharefs.clients.identity import identify
from msharefs.clients.policy import Enforce, Way, way
from msharefs.clients.replica import is_replica
from msharefs.clients.roster import Client, State
from msharefs.clients.space import AddressSpace
from msharefs.region.demand import both
from msharefs.region.errors import ClientStuck, NotAdoptable, RegionError, RightsInUse
from msharefs.region.events import Event, EventKind
from msharefs.region.mapping import PROTS
from msharefs.region.watch import check_watchable
from msharefs.service.batch import STAMPS, Batch, all_locks, has_now
from msharefs.service.debts import Debts
from msharefs.service.errors import errno_of
from msharefs.service.layout import END, After, Layout, anything, layout_of, put
from msharefs.service.move import Move, unknown
from msharefs.service.tidy import Tidy
from msharefs.service.vigil import Vigil

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from msharefs.clients.census import Census
    from msharefs.clients.faults import Faults, Served
    from msharefs.clients.holding import Hands
    from msharefs.clients.many import Guard
    from msharefs.clients.procmap import MappedRange
    from msharefs.clients.roster import Roster
    from msharefs.clients.tracer import Tracer
    from msharefs.region.demand import Demand
    from msharefs.region.mapping import Change
    from msharefs.service.batch import Run
    from msharefs.service.changes import RegionState
    from msharefs.service.nodes import RegionFile
    from msharefs.service.noting import Noting
    from msharefs.service.placements import Placements

log = logging.getLogger(__name__)

T = TypeVar("T")


SMALL_TABLE: Final = 64
"""Up to so many mappings a client is compared with the whole table at each change, and with the
changed range beyond that."""


CENSUS_PAUSE: Final = 0.25
"""Seconds between two censuses that nobody waits for."""


class Enforcer:
    """All that is enforced on one mount."""

    def __init__(
        self,
        *,
        device: int,
        tracer: Tracer,
        hands: Hands,
        roster: Roster,
        census: Census,
        faults: Faults,
        noting: Noting,
        enforce: Enforce,
        protect: Way,
        huge: bool,
        advises: bool,
        tell: Callable[[RegionFile, Event], object],
        state: Callable[[RegionFile], RegionState],
        placements: Placements,
        guard: Guard | None = None,
    ) -> None:
        """``advises``: huge pages are to be had where clients ask for them, and nowhere else.

        ``guard`` wraps what borrowed threads do, for a gate that has to be told of it.
        """
        self.device: Final = device
        self.tracer: Final = tracer
        self.hands: Final = hands
        self.roster: Final = roster
        self.census: Final = census
        self.faults: Final = faults
        self.noting: Final = noting
        self.strict: Final = enforce is Enforce.STRICT
        self._protect = protect
        self._huge = huge
        self.advises: Final = advises
        self.tell = tell
        self.guard: Final = guard
        self.state = state
        self.placements: Final = placements
        self._holders: dict[int, tuple[int, int]] = {}
        self._spaces: dict[int, AddressSpace] = {}
        self._look = trio.Event()
        self._later: trio.Nursery | None = None
        self.tidy: Final = Tidy(placements, roster, state)
        self.moves: Final[dict[int, Move]] = {}
        """Changes that are just taking rights away, by region."""
        self.debts: Final = Debts(self)
        self.vigil: Final = Vigil(self) if guard is None else None
        """None with a gate that nobody gets by."""

    def way(self, file: RegionFile, size: int) -> Way:
        """By which way a change that makes so many bytes read-only should go."""
        return way(self._protect, size, len(self.roster.of_region(file.ino)), huge=self._huge)

    # -- who

    async def gather(self, file: RegionFile) -> list[Client]:
        """Everybody who maps the region, found out now."""
        await self.roster.survey(full=True)
        return self.roster.of_region(file.ino)

    async def newcomers(self, file: RegionFile, known: Iterable[Client]) -> list[Client]:
        """Who maps the region by now and is not among ``known``."""
        await self.roster.survey()
        seen = set(known)
        return [client for client in self.roster.of_region(file.ino) if client not in seen]

    def rule(self, file: RegionFile) -> Layout:
        """What holds for one who comes now: the table, less what a change is about to take."""
        layout = layout_of(file.region, self.state(file))
        move = self.moves.get(file.ino)
        return layout if move is None else put(layout, move.between)

    # -- a change

    def idle(self, file: RegionFile) -> bool:
        """Whether nobody can be affected by a change, as far as a few microseconds can tell.

        True only if the region has one descriptor, the process that opened it does not map it, and
        no process was made since somebody looked. A process that was handed the descriptor over a
        socket is not seen by that: the census that follows finds it a little later.
        """
        _, mark = self._holders.get(file.ino, (0, 0))
        if self.census.last_pid() != mark or not self._lonely(file):
            return False
        self.look_around()
        return True

    def _lonely(self, file: RegionFile) -> bool:
        """Whether one process alone has the region open, which does not map it, and nobody does."""
        holder = self._holders.get(file.ino)
        if holder is None or file.region.descriptors > 1 or self.roster.of_region(file.ino):
            return False
        try:
            if self._spaces[holder[0]].windows(self.device, file.ino):
                return False
        except Gone:
            return False
        return not _has_children(holder[0])  # they may map what they have inherited at any time

    async def _still_lonely(self, file: RegionFile) -> bool:
        """As :meth:`idle`, by a look at the processes made since; all others follow a little later."""
        if not self._lonely(file):
            return False
        await self.roster.survey()
        if not self._lonely(file):
            return False
        self.look_around()
        return True

    def _remember_holder(self, file: RegionFile, pid: int, mark: int) -> None:
        """``pid`` asks for a change of a region that only it has open: next time may be idle."""
        self.forget_holder(file)
        if not pid or file.region.descriptors != 1 or self.roster.of_region(file.ino):
            return
        try:
            space = self._spaces.get(pid)
            if space is None:
                space = self._spaces[pid] = AddressSpace(pid, self.census.placed)
            space.check()
        except (Gone, OSError):
            return
        self._holders[file.ino] = pid, mark

    def forget_holder(self, file: RegionFile) -> None:
        """The region has another descriptor, or none."""
        pid, _ = self._holders.pop(file.ino, (0, 0))
        if pid and all(other != pid for other, _ in self._holders.values()):
            self._spaces.pop(pid).close()

    def forget_region(self, file: RegionFile) -> None:
        """The region has gone, and all its mappings with it or out of reach."""
        self.forget_holder(file)
        if self.vigil is not None:
            self.vigil.forget(file)
        for client in self.roster.of_region(file.ino):
            self.roster.detach(client, file.ino)

    def close(self) -> None:
        for space in self._spaces.values():
            space.close()
        self._spaces.clear()
        self._holders.clear()

    def after(self, file: RegionFile, state: RegionState, change: Change) -> After:
        """What will be watched, and protected by faults, once ``change`` is done.

        What is unmapped is watched no more, nor is what takes its place. Raises Unsupported where a
        hole is watched in a way that what comes there cannot be.
        """
        by_fault, watches = state.by_fault.copy(), state.watches
        for part in change.ranges:
            by_fault.remove(part.start, part.end)
            if part.replaced and watches.within(part.start, part.end):
                watches = watches.copy() if watches is state.watches else watches
                watches.disarm(part.start, part.end)
            if part.new is not None:
                for watch in watches.within(part.start, part.end):
                    check_watchable(watch, part.new, notes=self.noting.available)
        if self._takes_only_write(change):
            size = change.ranges[-1].end - change.ranges[0].start
            if self.way(file, size) is Way.FAULT:
                for part in change.ranges:
                    by_fault.add(part.start, part.end)
        return After(by_fault, watches)

    @staticmethod
    def _takes_only_write(change: Change) -> bool:
        return bool(change.ranges) and all(
            part.lost == Prot.WRITE
            and not part.gained
            and part.new is not None
            and part.new.object.kind is Kind.ANON
            for part in change.ranges
        )

    async def begin(
        self,
        file: RegionFile,
        state: RegionState,
        change: Change,
        after: After,
        *,
        pid: int = 0,
    ) -> Move:
        """A planned change, on its way through those who map the region. ``pid`` asks for it."""
        mark = self.census.last_pid()
        if file.region.contested(change):
            await self.gather(file)  # then it matters who maps the region before anything is done
        elif not await self._still_lonely(file):
            await self.roster.look_around(self.roster.of_region(file.ino))
        clients = self.roster.of_region(file.ino)
        self._remember_holder(file, pid, mark)
        region, ranges = file.region, change.ranges
        if any(part.replaced for part in ranges):  # what shows another thing is watched no more
            await self.noting.settle(file, ranges[0].start, ranges[-1].end)
        start, end = 0, END
        if len(region.table) > SMALL_TABLE and ranges:
            start, end = ranges[0].start, ranges[-1].end
        old = layout_of(region, state, start, end)
        new = layout_of(region, state, start, end, ranges, after)
        gives = all(not part.lost and not part.replaced and part.old is not None for part in ranges)
        asks = self.advises and any(
            part.new is not None
            and part.new.flags & MapFlag.HUGETLB
            and (part.replaced or part.old is None)
            for part in ranges
        )
        return Move(self, file, old, new, clients, gives=gives, asks=asks)

    async def begin_shrinking(
        self, file: RegionFile, state: RegionState, limit: int, after: After
    ) -> Move:
        """As :meth:`begin`, for a region whose last page will end at ``limit``."""
        clients = await self.gather(file)
        await self.noting.settle(file, limit, END)
        old = layout_of(file.region, state)
        new = layout_of(file.region, state, after=after, limit=limit)
        return Move(self, file, old, new, clients)

    async def rewatch(self, file: RegionFile, start: int, end: int) -> None:
        """The watches of ``[start, end)`` are others now: catch there by them, every page anew.

        The caller holds the region's lock. Raises as a change does; the caller then puts the
        watches back and calls again.
        """
        clients = await self.gather(file)
        new = layout_of(file.region, self.state(file), start, end)
        old = Layout(new.plain, anything(new))
        between = Layout(new.plain, both(new.plain, new.served))
        move = Move(self, file, old, new, clients, between=between, rearm=next(STAMPS))
        await self.noting.settle(file, start, end)
        try:
            await move.narrow()
            await move.widen()
        finally:
            self.moves.pop(file.ino, None)
            self.noting.rearmed(file)

    # -- those who are served

    async def claim(self, clients: Iterable[Client]) -> list[Client]:
        """Those who were forked by a client that is served are served from their first moment.

        Returns those of whom it could not be found out: they are to be left without faults.
        """
        if not len(self.faults):
            return []
        asked = {client.space: client for client in clients if client.served is None}
        claims = await self.faults.claim(list(asked))
        for space, served in claims.found.items():
            client = asked[space]
            if client.served is not None:  # somebody else has asked at the same moment
                continue
            self.serve(client, served)
            for inode, attached in client.regions.items():
                attached.armed = sorted(
                    (span.offset, span.offset + span.size)
                    for span in served.spans
                    if span.region == inode
                )
        return [asked[space] for space in claims.unknown]

    def serve(self, client: Client, served: Served) -> None:
        """``served`` are the client's userfaultfds, to be let go with it."""
        if client.closed:  # it ended meanwhile
            self.faults.drop(served)
            return
        self.faults.adopt(served, client)
        client.served = served
        client.on_close.append(partial(self.faults.drop, served))

    def unserved(self, served: Served, why: str) -> None:
        """Nothing is caught there any more, because the process ended or something went wrong."""
        client = served.client
        if isinstance(client, Client) and client.served is served:
            log.debug("process %s is not served any more: %s", served.pid, why)
            client.served = None
            for attached in client.regions.values():
                attached.armed = []

    async def check_rights(self, file: RegionFile, clients: Sequence[Client], gained: Prot) -> None:
        """Raises RightsInUse if a live mapping was made without a right that is to come."""
        wanted = int(gained)
        if not wanted:
            return
        plain = layout_of(file.region, self.state(file)).plain

        def look() -> list[tuple[Client, Prot]]:
            found: list[tuple[Client, Prot]] = []
            for client in clients:
                attached = client.regions.get(file.ino)
                if attached is None:
                    continue
                try:
                    windows = client.space.windows(self.device, file.ino)
                    replica = is_replica(windows, plain)

                    otherwise = client.space.may if replica else has_now
                    found.append((client, attached.rights(windows, otherwise)))
                except Gone:
                    continue
            return found

        for client, rights in await trio.to_thread.run_sync(look):
            lacking = wanted & ~int(rights)
            if lacking:
                raise RightsInUse(
                    f"process {client.pid} maps the region {rights.text()}, which lacks"
                    f" {PROTS[lacking].text()} that the region would newly give"
                )

    # -- one or many clients

    async def bring(
        self,
        file: RegionFile,
        clients: Sequence[Client],
        layout: Layout,
        before: Sequence[Demand] = (),
        *,
        rearm: int = 0,
        seen: bool = False,
        strict: bool | None = None,
    ) -> bool:
        """Bring clients to ``layout``; what ``before`` catches is caught in them already.

        ``rearm`` as for :class:`Batch`, ``seen`` as for :meth:`Batch.look`. Raises as the module
        says; whose only thread waits for us is owed it (``debts.py``). Whether there was anything
        to be done.
        """
        if not clients:
            self.tidy.soon()  # who was shown something here may have unmapped it or ended
            return False
        strict = self.strict if strict is None else strict
        batch = Batch(self, file, layout, before, rearm=rearm, shuts=not strict)
        async with all_locks(clients):
            await batch.look(clients, seen=seen)
            failures = await batch.lay()
            if failures and strict:
                self._judge(file, list(failures), failures, strict=True)
            failures |= await batch.catch()
            failures |= await batch.step()
            await batch.lift()
        self.tidy.soon()
        self._judge(file, [c for c in clients if c not in batch.late], failures, strict=strict)
        return batch.touched or bool(failures)

    def _judge(
        self,
        file: RegionFile,
        clients: Sequence[Client],
        failures: dict[Client, Exception],
        *,
        strict: bool,
    ) -> None:
        hard: Exception | None = None
        for client in clients:
            attached = client.regions.get(file.ino)
            if attached is None:
                continue
            error = failures.get(client)
            if error is None:
                attached.state = State.FAULT if attached.armed else State.REPLICA
                attached.why = ""
                continue
            self.unenforced(file, client, error)
            if strict or not isinstance(error, NotAdoptable | ClientStuck):
                hard = hard or error
        if hard is not None:
            raise hard

    def unenforced(self, file: RegionFile, client: Client, error: Exception) -> None:
        """List the client as one that does not obey, and tell of it once."""
        attached = client.regions.get(file.ino)
        why = str(error)
        if attached is None or (attached.state is State.UNENFORCED and attached.why == why):
            return
        attached.state, attached.why = State.UNENFORCED, why
        detail = (("reason", why),)
        self.tell(
            file,
            Event(
                EventKind.UNENFORCED,
                file.region.name,
                attrs.evolve(identify(client.pid), pid=client.pid),
                "adopt",
                detail=detail,
            ),
        )

    async def finish(self, file: RegionFile, client: Client, run: Run) -> None:
        """Bring a client, whose lock is held and whose thread ``run`` borrows, to what is demanded."""
        if file.ino not in client.regions:
            return
        try:
            layout = self.rule(file)
            batch = Batch(self, file, layout, anything(layout), rearm=next(STAMPS))
            batch.run_by[client] = run
            await batch.look([client], waiting=False)
            failures = await batch.lay()
            failures |= await batch.catch()
            failures |= await batch.step()
            await batch.lift()
            self._judge(file, [client], failures, strict=False)
        except Gone:
            self.roster.forget(client)
        except (RegionError, OSError) as error:
            self.unenforced(file, client, error)
        except Exception as error:  # noqa: BLE001 - listed; a change will try again
            errno_of(error, f"bringing process {client.pid} to {file.region.name}")
            self.unenforced(file, client, RegionError("a bug of the server, see its log"))
        finally:
            client.met += 1  # a change that has looked at it before is to look again

    def soon(self, work: Coroutine[Any, Any, None]) -> None:
        """See something through in a task of its own."""

        async def do() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 - one client's affair
                errno_of(error, "seeing a change through")

        assert self._later is not None, "the enforcer runs"
        self._later.start_soon(do)

    # -- those that nobody saw come

    def look_around(self) -> None:
        """Have a census soon: somebody may map a region whom no gate saw."""
        self._look.set()

    async def run(
        self,
        regions: Callable[[int], RegionFile | None],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """For ever: look around when there is reason to, and adopt whom that finds.

        ``regions`` finds a region by its inode.
        """
        async with trio.open_nursery() as nursery:
            self._later = nursery
            nursery.start_soon(self.roster.watch, self._ended)
            nursery.start_soon(self.tidy.run)
            if self.vigil is not None:
                nursery.start_soon(self.vigil.run)
            task_status.started()
            while True:
                await self._look.wait()
                self._look = trio.Event()
                try:
                    await self._take_census(regions)
                except Exception as error:  # noqa: BLE001 - the next one may go better
                    errno_of(error, "taking a census")
                await trio.sleep(CENSUS_PAUSE)

    def _ended(self, _client: Client) -> None:
        """The client's process has ended; the roster forgets it."""
        self.tidy.soon()

    async def _take_census(self, regions: Callable[[int], RegionFile | None]) -> None:
        await self.roster.survey(full=True)
        inodes = {inode for client in self.roster for inode in client.regions}
        for inode in inodes:
            file = regions(inode)
            if file is None:
                continue
            state = self.state(file)
            async with state.lock:
                new = [c for c in self.roster.of_region(inode) if unknown(c, inode)]
                try:
                    await self.bring(file, new, layout_of(file.region, state), strict=False)
                except Exception as error:  # noqa: BLE001 - listed; a change will try again
                    errno_of(error, f"adopting those who map {file.region.name}")
                finally:
                    for client in new:
                        client.met += 1  # a change that has looked at it before is to look again
        self.tidy.soon()

    async def admit(
        self,
        file: RegionFile,
        client: Client,
        window: MappedRange,
        run: Run,
    ) -> None:
        """Make a client a replica whose thread is stopped right after its mmap(), by ``run``.

        The caller holds the client's lock. Raises NotAdoptable, Gone, OSError.
        """
        batch = Batch(self, file, self.rule(file), ())
        batch.windows[client] = [window]
        client.regions[file.ino].advised.remove(window.start, window.end)
        batch.run_by[client] = run
        try:
            failures = await batch.lay()
            failures |= await batch.catch()
            failures |= await batch.step()
        finally:
            client.met += 1  # a change that has looked at it before is to look again
        if client in failures:
            raise failures[client]
        attached = client.regions.get(file.ino)
        if attached is None:  # it has ended meanwhile
            raise Gone(f"process {client.pid}")
        attached.state = State.FAULT if attached.armed else State.REPLICA
        attached.why = ""


def _has_children(pid: int) -> bool:
    """Whether it has any that live, or cannot be asked (proc_pid_task(5), ``children``)."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return any((task / "children").read_bytes() for task in tasks)
    except OSError:
        return True
