"""Who maps a region that shows files, and passed the gate by, is found without being asked for.

For: the ptrace gate, which sees the first mmap() of each open(). A later one, or one by a descriptor
that was inherited or passed, shows memory where a file belongs, until somebody looks. Elsewhere in a
region that is a matter of rights, and waits for the next change or census; here a program would read
zeroes and store to where nobody finds it. So as long as a region shows files and has a descriptor
open, those who are known (its clients, and who opened it) are looked at every :data:`PERIOD`
seconds, and everybody every :data:`CENSUS_PERIOD`; rarer where that takes long, so that looking
takes no more than a part in :data:`SHARE` of one processor.

Promises: costs nothing while no region shows a file, or nobody has one open that does. Does not hold
up a change, nor wait for one. Who obeys is not touched; who cannot be made to is tried no more
than a few times for each time that what it maps changes.

Leaves out: the lsm gate, which sees every mmap().
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import attrs
import trio

from msharefs.clients.census import process_ids
from msharefs.clients.replica import is_replica
from msharefs.service.errors import errno_of
from msharefs.service.layout import layout_of
from msharefs.service.move import unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from msharefs.clients.procmap import MappedRange
    from msharefs.clients.roster import Client
    from msharefs.service.enforce import Enforcer
    from msharefs.service.layout import Layout
    from msharefs.service.nodes import RegionFile

PERIOD: Final = 0.1
CENSUS_PERIOD: Final = 1.0
SHARE: Final = 50
TRIES: Final = 3
CROWD: Final = 1024
"""Processes that have opened a region, from which on it is worth asking which are left."""


@attrs.define
class _Pace:
    """How often something is done that takes as long as it takes. Seconds."""

    period: float
    due: float = 0.0

    @contextmanager
    def taking(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.due = ended + max(self.period, SHARE * (ended - began))


@attrs.define(eq=False)
class _Watched:
    """A region that shows files."""

    file: RegionFile
    settled: dict[Client, list[MappedRange]] = attrs.field(factory=dict)
    """What each had mapped of it when it was found to obey."""
    tried: dict[Client, tuple[list[MappedRange], int]] = attrs.field(factory=dict)
    """What those had mapped of it who could not be made to, and how often that was tried."""


class Vigil:
    """Looks at those who might map files of regions unseen. For the loop."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._enforcer = enforcer
        self._watched: dict[int, _Watched] = {}
        self._openers: dict[int, set[int]] = {}
        self._known = _Pace(PERIOD)
        self._everybody = _Pace(CENSUS_PERIOD)
        self._reason = trio.Event()

    def changed(self, file: RegionFile) -> None:
        """Files came into a region, or went."""
        if not file.region.table.files:
            self._watched.pop(file.ino, None)
        elif file.ino not in self._watched:
            self._watched[file.ino] = _Watched(file)
            self._reason.set()

    def opened(self, file: RegionFile, pid: int) -> None:
        """A process has opened a region."""
        openers = self._openers.setdefault(file.ino, set())
        openers.add(pid)
        if len(openers) > CROWD:
            openers.intersection_update(process_ids())
        if file.ino in self._watched:
            self._reason.set()

    def closed(self, file: RegionFile) -> None:
        """A descriptor of a region is no more."""
        if not file.region.descriptors:
            self._openers.pop(file.ino, None)

    def forget(self, file: RegionFile) -> None:
        """The region has gone."""
        self._watched.pop(file.ino, None)
        self._openers.pop(file.ino, None)

    async def run(self) -> None:
        """For ever."""
        while True:
            now = trio.current_time()
            watched = [w for w in self._watched.values() if w.file.region.descriptors]
            if not watched:
                self._reason = trio.Event()
                await self._reason.wait()
                continue
            try:
                await self._look(watched)
                for one in watched:
                    await self._bring(one)
            except Exception as error:  # noqa: BLE001 - the next one may go better
                errno_of(error, "looking for those who map files unseen")
            await trio.sleep_until(now + PERIOD)

    async def _look(self, watched: list[_Watched]) -> None:
        roster, now = self._enforcer.roster, time.monotonic()
        if now >= self._everybody.due:
            with self._everybody.taking():
                await roster.survey(full=True)
            self._known.due = 0.0
        elif now >= self._known.due:
            clients = {c: None for one in watched for c in roster.of_region(one.file.ino)}
            openers = {p for one in watched for p in self._openers.get(one.file.ino, ())}
            with self._known.taking():
                await roster.look_at(list(clients), openers)

    async def _bring(self, one: _Watched) -> None:
        """Make those replicas who have mapped something since."""
        enforcer, file, ino = self._enforcer, one.file, one.file.ino
        clients = enforcer.roster.of_region(ino)
        one.settled = {c: one.settled[c] for c in clients if c in one.settled}
        one.tried = {c: one.tried[c] for c in clients if c in one.tried}
        moved = [c for c in clients if self._moved(one, c)]
        state = enforcer.state(file)
        if not moved or state.lock.locked():  # a change looks itself; who is left is seen next time
            return
        async with state.lock:
            layout = layout_of(file.region, state)
            judged: dict[int, bool] = {}  # by windows, which forked clients share
            todo: list[Client] = []
            for client in moved:
                windows = client.files.get(ino, [])
                obeys = judged.get(id(windows))
                if obeys is None:
                    obeys = judged[id(windows)] = is_replica(windows, layout.plain) or is_replica(
                        windows, layout.served
                    )
                if obeys and not unknown(client, ino):
                    one.settled[client] = windows
                else:
                    todo.append(client)
            if todo and file.region.table.files:
                await self._bring_to(one, todo, layout)

    async def _bring_to(self, one: _Watched, clients: list[Client], layout: Layout) -> None:
        enforcer, file = self._enforcer, one.file
        before = {client: client.files.get(file.ino, []) for client in clients}
        try:
            await enforcer.bring(file, clients, layout, strict=False)
        except Exception as error:  # noqa: BLE001 - listed; a change will try again
            errno_of(error, f"adopting those who map {file.region.name}")
        for client, windows in before.items():
            one.settled.pop(client, None)  # it may map it again as it did, before the next look
            if not unknown(client, file.ino):
                one.tried.pop(client, None)
                continue
            tried, times = one.tried.get(client, (windows, 0))
            one.tried[client] = windows, times + 1 if tried == windows else 1

    def _moved(self, one: _Watched, client: Client) -> bool:
        windows, settled = client.files.get(one.file.ino), one.settled.get(client)
        if windows is None or windows is settled or windows == settled:
            return False
        tried, times = one.tried.get(client, (None, 0))
        return times < TRIES or windows != tried
