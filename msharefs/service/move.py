"""One change of a region on its way through the processes that map it.

For: ``changes.py``, which swaps the table and drops memory between :meth:`Move.narrow` and
:meth:`Move.widen`. Nobody ever has more than the rights of the old and the new table together, and
between the two steps nobody has more than what both allow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msharefs.clients.roster import State
from msharefs.region.demand import both
from msharefs.service.errors import errno_of
from msharefs.service.layout import Layout, layout_of, put

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msharefs.clients.roster import Client
    from msharefs.region.demand import Demand
    from msharefs.service.enforce import Enforcer
    from msharefs.service.nodes import RegionFile


ROUNDS: Final = 64
"""How often a change looks for those who have turned up since it looked last."""


class Move:
    """One change on its way through the clients of a region."""

    def __init__(
        self,
        enforcer: Enforcer,
        file: RegionFile,
        old: Layout,
        new: Layout,
        clients: list[Client],
        *,
        between: Layout | None = None,
        rearm: int = 0,
        gives: bool = False,
        asks: bool = False,
    ) -> None:
        """``rearm`` as for a batch.

        ``gives``: nothing but rights to memory that is there already, so that there is nothing to
        be done before the table is swapped. ``asks``: the new table asks for huge pages where the
        old one did not, which each client has to be told once it is in force.
        """
        self._enforcer = enforcer
        self._file = file
        self._old, self._new = old, new
        self.between = between or Layout(both(old.plain, new.plain), both(old.served, new.served))
        self._rearm = rearm
        self.clients = clients
        self._gives = gives and self.between == old
        # Nobody must see memory where a file belongs, whatever the mount's policy.
        self._strict = True if old.shows_files or new.shows_files else None
        self._asks = asks
        self._seen = True
        """What has just been seen of the clients is still true."""

    async def narrow(self) -> None:
        """Take away what the new layout does not give; catch what it wants to be caught.

        From here on until :meth:`widen` or :meth:`undo` who comes by the gate has no more either.
        """
        if not self._gives:
            self._enforcer.moves[self._file.ino] = self
            await self._bring_all(self.between, self._old.served, rearm=self._rearm)

    async def widen(self) -> None:
        """Give what the new layout gives; catch no more what it does not want to be caught."""
        self._enforcer.moves.pop(self._file.ino, None)
        if self._asks or self.between != self._new:
            await self._bring_all(self._new, self.between.served)

    async def undo(self) -> None:
        """Back to the old layout, as far as that can be had; never raises."""
        self._enforcer.moves.pop(self._file.ino, None)
        try:
            await self._enforcer.bring(
                self._file,
                self._enforcer.roster.of_region(self._file.ino),
                self._old,
                self.between.served,
                strict=False,
            )
        except Exception as error:  # noqa: BLE001 - the first failure is the one to be told
            errno_of(error, f"undoing a change of {self._file.region.name}")

    async def _bring_all(self, layout: Layout, before: Sequence[Demand], *, rearm: int = 0) -> None:
        """Bring everybody to it, and those who turn up meanwhile, until all who do obey already.

        A stream of processes that obey from their beginning does not go on for ever that way; of
        others no more than :data:`ROUNDS` are waited for, and the rest come under the census.
        """
        enforcer, file = self._enforcer, self._file
        todo, first = self.clients, True
        if not todo:
            return
        for _ in range(ROUNDS):
            seen, self._seen = self._seen, False
            touched = await self._bring(todo, layout, before if first else (), rearm, seen)
            if not (touched or first):
                return
            first = False
            todo = await enforcer.newcomers(file, self.clients)
            if not todo:
                return
            self.clients += todo
        enforcer.look_around()

    async def _bring(
        self,
        clients: list[Client],
        layout: Layout,
        before: Sequence[Demand],
        rearm: int,
        seen: bool,
    ) -> bool:
        """Whether there was anything to be done."""
        enforcer, file = self._enforcer, self._file
        touched = False
        fresh = [client for client in clients if unknown(client, file.ino)]
        if fresh:  # nobody has brought these to what is the rule elsewhere in the region
            clients = [client for client in clients if client not in set(fresh)]
            whole = put(layout_of(file.region, enforcer.state(file)), layout)
            touched = await enforcer.bring(
                file, fresh, whole, rearm=rearm, seen=seen, strict=self._strict
            )
        touched |= await enforcer.bring(
            file, clients, layout, before, rearm=rearm, seen=seen, strict=self._strict
        )
        return touched


def unknown(client: Client, inode: int) -> bool:
    attached = client.regions.get(inode)
    return attached is not None and attached.state is State.UNENFORCED
