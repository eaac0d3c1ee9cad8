"""The parts that make other processes obey, put together for one mount.

For: the life cycle (``daemon.py``): :meth:`Enforcement.run` while the mount is served,
:meth:`Enforcement.close` when it has gone. What the parts do is theirs to say: ``enforce.py``
(changes), ``gatekeeper.py`` (those who map), ``accesses.py`` (caught accesses).

When the server ends, in good order or not, all threads that it held go on, mappings stay as they
are, and what was caught by userfaultfds is caught no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio

from msharefs.clients.census import Census
from msharefs.clients.faults import Faults
from msharefs.clients.holding import Hands
from msharefs.clients.ptrace import Tracee
from msharefs.clients.roster import Roster
from msharefs.clients.tracer import Tracer
from msharefs.clients.written import Written
from msharefs.service.accesses import Accesses
from msharefs.service.control import Standing
from msharefs.service.enforce import Enforcer
from msharefs.service.gatekeeper import Gatekeeper
from msharefs.service.noting import Noting

if TYPE_CHECKING:
    from collections.abc import Callable

    from msharefs.clients.borrow import Body, Borrowed
    from msharefs.clients.gate_lsm import LsmGate
    from msharefs.clients.tracer import Session
    from msharefs.service.changes import Changes
    from msharefs.service.nodes import RegionFile
    from msharefs.service.notifications import Notifications
    from msharefs.service.options import MountOptions
    from msharefs.service.placements import Placements

T = TypeVar("T")


class Enforcement:
    """Everything that is enforced on one mount. ``device`` is its st_dev."""

    def __init__(
        self,
        device: int,
        options: MountOptions,
        changes: Changes,
        notifications: Notifications,
        regions: Callable[[int], RegionFile | None],
        placements: Placements,
        lsm: LsmGate | None,
    ) -> None:
        self._regions = regions
        self._changes = changes
        self.lsm: Final = lsm
        Tracee.own_device = device
        self.tracer: Final = Tracer()
        self.placements: Final = placements
        self.census: Final = Census(device, placements.placed)
        self.roster: Final = Roster(self.census)
        host = Accesses(notifications)
        self.faults: Final = Faults(host)
        notifications.settle = self.faults.settle
        self.written: Final = Written(born=self._born)
        self.noting: Final = Noting(
            self.written,
            self.roster,
            device,
            options.log_period_ms / 1000,
            state=changes.state,
            find=regions,
            tell=notifications.written,
        )
        notifications.notes = self.noting.available
        self.enforcer: Final = Enforcer(
            device=device,
            tracer=self.tracer,
            hands=Hands(self.tracer),
            roster=self.roster,
            census=self.census,
            faults=self.faults,
            noting=self.noting,
            enforce=options.enforce,
            protect=options.protect,
            huge=options.huge not in {None, "never"},
            advises=options.huge == "advise",
            tell=changes.tell,
            state=changes.state,
            placements=placements,
            guard=_Announced(lsm) if lsm is not None else None,
        )
        host.enforcer = self.enforcer
        self.gatekeeper: Gatekeeper | None = None
        changes.enforcer = self.enforcer

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.faults.run)
            await nursery.start(self.written.run)
            await nursery.start(self.noting.run)
            await nursery.start(self.enforcer.run, self._regions)
            self.gatekeeper = Gatekeeper(self.enforcer, self._changes, nursery)
            task_status.started()
            await trio.sleep_forever()

    def _born(self) -> None:
        """A child notes its stores as its parent does: found out who it is, it is looked at too."""
        self.enforcer.look_around()

    def standing(self, ino: int, pid: int) -> Standing | None:
        """How a process stands to a region's table; None if it was not met yet."""
        client = self.roster.of_pid(pid)
        attached = client.regions.get(ino) if client is not None else None
        if client is None or attached is None:
            return None
        faults = client.served.faults if client.served is not None else 0
        return Standing(str(attached.state), attached.why, len(attached.armed), faults)

    def close(self) -> None:
        """Let go of everybody. Blocks briefly."""
        self._changes.enforcer = None
        self.tracer.close()
        self.enforcer.close()
        self.roster.close()
        self.faults.close()
        self.written.close()
        self.census.close()


@attrs.frozen
class _Announced:
    """The lsm gate refuses mprotect() of a region's mapping, but for threads that it is told of."""

    lsm: LsmGate

    @property
    def told(self) -> int:
        return self.lsm.borrowed

    def __call__(self, body: Body[T]) -> Body[T]:
        def announced(thread: Borrowed) -> Session[T]:
            self.lsm.allow(thread.tid)
            try:
                return (yield from body(thread))
            finally:
                self.lsm.disallow(thread.tid)

        return announced
