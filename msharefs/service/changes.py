"""The one road that every change of a region travels.

Plan (pure) -> are there descriptors or mappings that lack a right it would give? -> rights that go
are taken from the processes that map the region -> memory is reserved -> the table is swapped ->
memory that went is dropped -> rights that come are given -> events -> reply. A failure on the way
undoes what was done before it, so the caller gets an errno and nothing has changed (but that
memory which was dropped stays dropped).

What shares what: a region's ``lock`` is held by a change that has to wait for something (a
census, other processes, a large hole to be punched). Such a change plans again once it has the lock. Everything
else runs between two ticks of the loop and needs no lock, but must take the slow way while
somebody holds it. Opens are not locked out: ``Region.begin`` tells them which rights are coming.

If the caller is killed while its change waits for its turn, the change is given up as a whole; one
that is under way in other processes is finished, or undone, first.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio

from msharefs.abi import Kind
from msharefs.memory.objects import Objects
from msharefs.region.errors import RightsInUse
from msharefs.region.events import NOBODY, Actor, Event, EventKind
from msharefs.region.mapping import PROTS
from msharefs.region.pages import page_up
from msharefs.region.spans import SpanSet
from msharefs.region.watch import Watches
from msharefs.service.eventlog import Reader
from msharefs.service.stores import Stores

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from msharefs.clients.census import MappedRange
    from msharefs.memory.store import Store
    from msharefs.region.mapping import Change, Mapping
    from msharefs.region.region import Resize
    from msharefs.service.enforce import Enforcer
    from msharefs.service.eventlog import EventLog, Ring
    from msharefs.service.nodes import RegionFile

INLINE_DROP: Final = 4 << 20
"""Bytes. A hole up to this size is punched in the loop (under a millisecond, and a switch to a
thread costs a tenth of that each way); a larger one that holds data is punched by a thread."""
STORES_LIMIT: Final = 1.0
"""Seconds that a change waits for stores to file objects which it forbids from then on."""
T = TypeVar("T")
_HOLDING_NOTHING: Final = contextlib.nullcontext()


@attrs.define(eq=False)
class RegionState:
    """What the service keeps of a region beside its table: its ring, its lock, its counters."""

    ring: Ring
    lock: trio.Lock = attrs.field(factory=trio.Lock)
    watches: Watches = attrs.field(factory=Watches)
    stores: Stores = attrs.field(factory=Stores)
    by_fault: SpanSet = attrs.field(factory=SpanSet)
    """What is read-only by write-protection from outside, not by the mappings themselves."""
    counters: dict[str, int] = attrs.field(factory=dict)

    def count(self, name: str, by: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + by


@attrs.define(eq=False)
class Changes:
    """Carries changes out. ``census(ino)`` finds the live mappings of a region; it blocks."""

    store: Store
    log: EventLog
    census: Callable[[int], list[MappedRange]]
    enforcer: Enforcer | None = None
    """Who makes others obey; None on a mount without a gate, where mappings are left alone."""
    changed: Callable[[RegionFile, int, int], None] | None = None
    """Told of each range that has another protection, or another content, now."""
    objects: Objects = attrs.field(factory=Objects)
    """The files that lie in the regions: each is held once for each mapping in a table."""
    _states: dict[int, RegionState] = attrs.field(factory=dict)

    def state(self, file: RegionFile) -> RegionState:
        """The region's state, made on first use."""
        try:
            return self._states[file.ino]
        except KeyError:
            state = self._states[file.ino] = RegionState(self.log.new_region_ring())
            return state

    def dispose(self, file: RegionFile) -> None:
        """The region has gone: give back what it had reserved and close its memory."""
        if file.region.semantics.reserves:
            anonymous = (m.size for m in file.region.table if m.object.kind is Kind.ANON)
            self.store.reserve(-sum(anonymous))
        _release(self.objects, file.region.table)
        if self.enforcer is not None:
            self.enforcer.forget_region(file)
        state = self._states.pop(file.ino, None)
        if state is not None:
            state.ring.close()
        file.backing.close()

    def is_bare(self, file: RegionFile) -> bool:
        """Whether nothing is laid over a plain file, and nobody watches it."""
        return file.region.plain and not self.state(file).watches

    def leaves_alone(self, file: RegionFile) -> bool:
        """Whether whatever mapping of the file there is, nothing is to be said or done about it.

        Once something is, the change that does it finds those who map the file.
        """
        semantics = file.region.semantics
        return semantics.private and not semantics.superset and self.is_bare(file)

    def opened(self, file: RegionFile, pid: int) -> None:
        """A process has opened a region."""
        if self.enforcer is not None and self.enforcer.vigil is not None:
            self.enforcer.vigil.opened(file, pid)

    def closed(self, file: RegionFile) -> None:
        """One descriptor less."""
        if self.enforcer is not None and self.enforcer.vigil is not None:
            self.enforcer.vigil.closed(file)
        self.look_around(file)

    def look_around(self, file: RegionFile) -> None:
        """Somebody may map the region whom no gate saw."""
        if self.enforcer is not None and not self.leaves_alone(file):
            self.enforcer.look_around()

    def new_reader(self, file: RegionFile | None) -> Reader:
        """A place in the region's stream of events, or in the whole mount's."""
        return Reader(self.log.ring if file is None else self.state(file).ring)

    def tell(self, file: RegionFile, event: Event) -> int:
        """Put an event into the mount's log and the region's. Its number."""
        state = self.state(file)
        state.count(event.kind)
        return self.log.add(event, state.ring)

    def refuse(
        self, file: RegionFile, actor: Actor, via: str, errno_name: str, reason: str
    ) -> None:
        """Tell why something was refused, which an errno cannot."""
        detail = (("error", errno_name), ("reason", reason))
        self.tell(file, Event(EventKind.REFUSE, file.region.name, actor, via, detail=detail))

    # -- mappings

    def change(
        self, file: RegionFile, plan: Callable[[], Change], event: Event
    ) -> Awaitable[None] | None:
        """Plan and carry out. None if it is done; else an awaitable that does it.

        Raises what ``plan`` does, RightsInUse, NoSpace, or OSError from the memory.
        """
        state = self.state(file)
        if state.lock.locked():
            return self._change_slowly(file, state, plan, event)
        change = plan()
        if file.region.contested(change):
            file.region.check_descriptors(change)
            return self._change_slowly(file, state, plan, event)
        if self.enforcer is not None and (len(state.watches) or not self.enforcer.idle(file)):
            return self._change_slowly(file, state, plan, event)
        if state.stores.forbidden(change.ranges):
            return self._change_slowly(file, state, plan, event)
        if not _moves_memory(change):
            with self._holding(file, change):
                file.region.apply(change)
            self._done(file, event)
            return None
        if _drops_much(file, change):
            return self._change_slowly(file, state, plan, event)
        with self._holding(file, change):
            self._begin(file, change)
            try:
                for start, end in _dropped(change):
                    file.backing.drop(start, end)
            except BaseException:
                self._undo(file, change)
                raise
        self._done(file, event)
        return None

    async def _change_slowly(
        self, file: RegionFile, state: RegionState, plan: Callable[[], Change], event: Event
    ) -> None:
        async with state.lock:
            change = plan()
            file.region.check_descriptors(change)
            file.region.begin(change)
            try:
                with self._holding(file, change):
                    await self._carry_out(file, state, change, event.actor.pid)
            finally:
                file.region.end()
            self._done(file, event)

    async def _carry_out(
        self, file: RegionFile, state: RegionState, change: Change, pid: int
    ) -> None:
        if self.enforcer is not None:
            with trio.CancelScope(shield=True):  # it ends soon, and is not to end half-way
                await self._enforce(self.enforcer, file, state, change, pid)
        else:
            await self._check_mappings(file, change)
            self._begin(file, change)
            await self._drop(file, change)

    def _holding(self, file: RegionFile, change: Change) -> contextlib.AbstractContextManager[None]:
        """Carry a change out within: its objects are there for the way forth, and the way back."""
        return self._holding_objects(file, change) if len(self.objects) else _HOLDING_NOTHING

    @contextlib.contextmanager
    def _holding_objects(self, file: RegionFile, change: Change) -> Iterator[None]:
        _hold(self.objects, change.added)
        try:
            yield
        except BaseException:
            _release(self.objects, change.added)
            raise
        _release(self.objects, change.removed)
        if self.enforcer is not None and self.enforcer.vigil is not None:
            self.enforcer.vigil.changed(file)

    async def _drop(self, file: RegionFile, change: Change) -> None:
        try:
            await _drop_in_thread(file, list(_dropped(change)))
        except BaseException:
            self._undo(file, change)
            raise

    async def _enforce(
        self, enforcer: Enforcer, file: RegionFile, state: RegionState, change: Change, pid: int
    ) -> None:
        """Carry a change out in every process that maps the region as well."""
        after = enforcer.after(file, state, change)
        move = await enforcer.begin(file, state, change, after, pid=pid)
        await enforcer.check_rights(file, move.clients, file.region.contested(change))
        begun = False
        before = state.by_fault, state.watches
        self._tell_changed(file, change)  # rights that go are not given any more
        try:
            await move.narrow()
            self._begin(file, change)
            begun = True
            state.by_fault, state.watches = after.by_fault, after.watches
            with trio.CancelScope(shield=True):
                await state.stores.settle(change.ranges, STORES_LIMIT)
                await _drop_in_thread(file, list(_dropped(change)))
                await move.widen()
        except BaseException:
            with trio.CancelScope(shield=True):
                if begun:
                    self._undo(file, change)
                    state.by_fault, state.watches = before
                await move.undo()
            raise
        self._tell_changed(file, change)

    def _tell_changed(self, file: RegionFile, change: Change) -> None:
        if self.changed is not None:
            for part in change.ranges:
                self.changed(file, part.start, part.end)

    async def _check_mappings(self, file: RegionFile, change: Change) -> None:
        """Raises RightsInUse if a live mapping lacks a right that the region newly gives."""
        gained = int(file.region.contested(change))
        if not gained:
            return
        found = await trio.to_thread.run_sync(self.census, file.ino, abandon_on_cancel=True)
        for mapped in found:
            lacking = gained & ~int(mapped.prot)
            if lacking:
                raise RightsInUse(
                    f"process {mapped.pid} maps the region {mapped.prot.text()}, which lacks"
                    f" {PROTS[lacking].text()} that the region would newly give"
                )

    def _begin(self, file: RegionFile, change: Change) -> None:
        delta = _reserved_delta(file, change)
        self.store.reserve(delta)
        try:
            file.region.apply(change)
        except BaseException:
            self.store.reserve(-delta)
            raise

    def _undo(self, file: RegionFile, change: Change) -> None:
        file.region.apply(change.inverse())
        self.store.reserve(-_reserved_delta(file, change))

    def _done(self, file: RegionFile, event: Event) -> None:
        file.touch()
        self.tell(file, event)

    # -- size

    async def resize(self, file: RegionFile, size: int, actor: Actor, via: str) -> None:
        """Set the region's size in bytes; what lies past the end is unmapped and freed."""
        await self.waited_for(actor, self._resize(file, lambda: size, actor, via))

    async def grow(self, file: RegionFile, size: int, actor: Actor, via: str) -> None:
        """As fallocate(2): at least ``size`` bytes, never fewer than before."""
        wanted = self._resize(file, lambda: max(size, file.region.size), actor, via)
        await self.waited_for(actor, wanted)

    async def waited_for(self, actor: Actor, outcome: Awaitable[T]) -> T:
        """Await the outcome of a request whose thread waits for it, as ``debts.py`` has to know."""
        if self.enforcer is None:
            return await outcome
        return await self.enforcer.debts.while_waiting(actor, outcome)

    async def _resize(
        self, file: RegionFile, size: Callable[[], int], actor: Actor, via: str
    ) -> None:
        async with self.state(file).lock:
            with trio.CancelScope(shield=True):  # it ends soon, and is not to end half-way
                await self._resize_locked(file, size(), actor, via)

    async def _resize_locked(self, file: RegionFile, size: int, actor: Actor, via: str) -> None:
        resize, was_sized = file.region.plan_resize(size), file.region.sized
        with self._holding(file, resize.change):
            await self._carry_out_resize(file, resize, was_sized)
        self._resized(file, resize, actor, via)

    async def _carry_out_resize(self, file: RegionFile, resize: Resize, was_sized: bool) -> None:
        size = resize.new_size
        if self.enforcer is not None and self._shrinks_for_others(self.enforcer, file, resize):
            await self._shrink(self.enforcer, file, resize)
            return
        self._apply_resize(file, resize)
        try:
            if resize.change.removed and file.backing.holds_data(size, resize.old_size):
                await trio.to_thread.run_sync(file.backing.resize, size)
            else:
                file.backing.resize(size)
        except BaseException:
            file.region.apply(resize.change.inverse())
            file.region.size, file.region.sized = resize.old_size, was_sized
            self.store.reserve(-_reserved_delta(file, resize.change))
            raise

    def _shrinks_for_others(self, enforcer: Enforcer, file: RegionFile, resize: Resize) -> bool:
        """Whether a mapping may have to be changed: what it may do past the end is another thing.

        Growing needs nothing: past the end a mapping may do what it may do in what grows there.
        """
        if resize.new_size >= resize.old_size:
            return False
        state, region = self.state(file), file.region
        bare = region.plain and not state.watches and not state.by_fault
        if bare and region.semantics.grown & ~region.semantics.beyond == 0:
            return False
        return bool(resize.change.ranges) and not enforcer.idle(file)

    async def _shrink(self, enforcer: Enforcer, file: RegionFile, resize: Resize) -> None:
        """Shrink a region in every process that maps it as well."""
        state, was_sized = self.state(file), file.region.sized
        after = enforcer.after(file, state, resize.change)
        limit = page_up(resize.new_size)
        move = await enforcer.begin_shrinking(file, state, limit, after)
        before = state.by_fault, state.watches
        begun = False
        self._tell_changed(file, resize.change)
        try:
            await move.narrow()
            self._apply_resize(file, resize)
            begun = True
            state.by_fault, state.watches = after.by_fault, after.watches
            with trio.CancelScope(shield=True):
                await state.stores.settle(resize.change.ranges, STORES_LIMIT)
                await trio.to_thread.run_sync(file.backing.resize, resize.new_size)
                await move.widen()
        except BaseException:
            with trio.CancelScope(shield=True):
                if begun:
                    file.region.apply(resize.change.inverse())
                    file.region.size, file.region.sized = resize.old_size, was_sized
                    self.store.reserve(-_reserved_delta(file, resize.change))
                    state.by_fault, state.watches = before
                await move.undo()
            raise
        self._tell_changed(file, resize.change)

    def _apply_resize(self, file: RegionFile, resize: Resize) -> None:
        self.store.reserve(_reserved_delta(file, resize.change))
        file.region.apply_resize(resize)

    def _resized(self, file: RegionFile, resize: Resize, actor: Actor, via: str) -> None:
        watches = self.state(file).watches
        if watches and resize.change.ranges:
            watches.disarm(file.region.limit, page_up(resize.old_size))
            self._tell_changed(file, resize.change)
        name, size, detail = file.region.name, resize.new_size, (("old", resize.old_size),)
        self._done(file, Event(EventKind.RESIZE, name, actor, via, length=size, detail=detail))

    # -- contents that come with a change of size (``Semantics.grown``)

    def growing(
        self, file: RegionFile, work: Callable[[], int], actor: Actor, via: str
    ) -> Awaitable[None] | None:
        """Let ``work`` fill the backing file up to the offset it returns, and the region grow so.

        None if it is done; else an awaitable that does it. Memory is there before the table says
        so. Raises what ``work`` does, and the region's size is then what it was.
        """
        if self.state(file).lock.locked():
            return self._growing_slowly(file, work, actor, via)
        self._grown(file, work(), actor, via)
        return None

    async def _growing_slowly(
        self, file: RegionFile, work: Callable[[], int], actor: Actor, via: str
    ) -> None:
        async with self.state(file).lock:
            self._grown(file, work(), actor, via)

    async def growing_in_thread(
        self, file: RegionFile, work: Callable[[], int], actor: Actor, via: str
    ) -> None:
        """As :meth:`growing`, for work that takes longer than the loop may wait."""
        async with self.state(file).lock:
            self._grown(file, await trio.to_thread.run_sync(work), actor, via)

    def follow(self, file: RegionFile) -> None:
        """Take over what writes that went past us (``Semantics.native``) made of size and time.

        To be called before any of the two, or the table, is looked at or changed. What happens
        while a change is under way is taken over after it.
        """
        if not file.native or self.state(file).lock.locked():
            return
        size, written_ns = file.backing.state
        if written_ns != file.written_ns:
            file.written_ns = file.mtime_ns = file.ctime_ns = written_ns
        self._grown(file, size, NOBODY, "native")

    def _grown(self, file: RegionFile, size: int, actor: Actor, via: str) -> None:
        if size > file.region.size:
            resize = file.region.plan_resize(size)
            with self._holding(file, resize.change):
                self._apply_resize(file, resize)
            self._resized(file, resize, actor, via)


def _moves_memory(change: Change) -> bool:
    """Whether memory comes or goes: a change of protections alone has none of that to do."""
    return any(part.replaced or part.old is None for part in change.ranges)


def _reserved_delta(file: RegionFile, change: Change) -> int:
    """Bytes of the region's own memory that may be touched after, minus before.

    0 where the mount counts memory when it is touched.
    """
    if not file.region.semantics.reserves:
        return 0
    return sum(m.size for m in change.added if m.object.kind is Kind.ANON) - sum(
        m.size for m in change.removed if m.object.kind is Kind.ANON
    )


def _hold(objects: Objects, mappings: Iterable[Mapping]) -> None:
    for mapping in mappings:
        if mapping.object.kind is Kind.FILE:
            objects.hold(mapping.object.ident)


def _release(objects: Objects, mappings: Iterable[Mapping]) -> None:
    for mapping in mappings:
        if mapping.object.kind is Kind.FILE:
            objects.release(mapping.object.ident)


def _dropped(change: Change) -> Iterable[tuple[int, int]]:
    """The ranges whose memory goes, neighbours joined.

    Also where memory newly comes over a hole: a program may have touched the hole through its
    mapping, and new anonymous memory reads as zeroes. Where a file was there is none to go.
    """
    start = end = 0
    for part in change.ranges:
        if part.old is not None and (not part.replaced or _shows_file(part.old, part.new)):
            continue
        if part.start != end:
            if end > start:
                yield start, end
            start = part.start
        end = part.end
    if end > start:
        yield start, end


def _shows_file(old: Mapping, new: Mapping | None) -> bool:
    """Whether a file was there and no memory comes now."""
    return old.object.kind is Kind.FILE and (new is None or new.object.kind is Kind.FILE)


def _drops_much(file: RegionFile, change: Change) -> bool:
    return any(
        end - start > INLINE_DROP and file.backing.holds_data(start, end)
        for start, end in _dropped(change)
    )


async def _drop_in_thread(file: RegionFile, ranges: list[tuple[int, int]]) -> None:
    """Punch the holes; not to be given up half-way, as the caller's death would ask."""

    def drop() -> None:
        for start, end in ranges:
            file.backing.drop(start, end)

    if any(end - start > INLINE_DROP for start, end in ranges):
        await trio.to_thread.run_sync(drop)
    else:
        drop()
