"""One change of a region on its way through the processes that map it.

For: ``changes.py``, which swaps the table and drops memory between :meth:`Move.narrow` and
:meth:`Move.widen`. Nobody ever has more than the rights of the old and the new table together, and
between the two steps nobody has more than what both allow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from msharefs.clients.roster import State
from msharefs.region.demand import both
from msharefs.service.errors import errno_of
from msharefs.service.layout import Layout, layout_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msharefs.clients.roster import Client
    from msharefs.region.demand import Demand
    from msharefs.service.enforce import Enforcer
    from msharefs.service.nodes import RegionFile


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
        rearm: bool = False,
        surveyed: bool = True,
        gives: bool = False,
    ) -> None:
        """``surveyed``: everybody was looked for; else only ``clients`` were looked at.

        ``gives``: nothing but rights to memory that is there already, so that there is nothing to
        be done before the table is swapped.
        """
        self._enforcer = enforcer
        self._file = file
        self._old, self._new = old, new
        self._between = between or Layout(both(old.plain, new.plain), both(old.served, new.served))
        self._rearm = rearm
        self.clients = clients
        self._surveyed = surveyed
        self._gives = gives and self._between == old
        self._seen = True
        """What has just been seen of the clients is still true."""

    async def narrow(self) -> None:
        """Take away what the new layout does not give; catch what it wants to be caught."""
        if not self._gives:
            await self._bring_all(self._between, self._old.served, rearm=self._rearm)

    async def widen(self) -> None:
        """Give what the new layout gives; catch no more what it does not want to be caught."""
        if self._between != self._new:
            await self._bring_all(self._new, self._between.served)

    async def undo(self) -> None:
        """Back to the old layout, as far as that can be had; never raises."""
        try:
            await self._enforcer.bring(
                self._file,
                [c for c in self.clients if self._file.ino in c.regions],
                self._old,
                self._between.served,
                strict=False,
            )
        except Exception as error:  # noqa: BLE001 - the first failure is the one to be told
            errno_of(error, f"undoing a change of {self._file.region.name}")

    async def _bring_all(
        self, layout: Layout, before: Sequence[Demand], *, rearm: bool = False
    ) -> None:
        enforcer, file = self._enforcer, self._file
        todo, known = self.clients, True
        while todo or not self._surveyed:
            fresh = [client for client in todo if unknown(client, file.ino)]
            if fresh:  # nobody has brought these to what was the rule until now
                await self._bring(fresh, layout_of(file.region, enforcer.state(file)))
            seen, self._seen = self._seen and not fresh, False
            failure: Exception | None = None
            async with trio.open_nursery() as nursery:
                if not self._surveyed:
                    self._surveyed = True
                    nursery.start_soon(enforcer.roster.strangers)
                try:
                    await self._bring(todo, layout, before if known else (), rearm=rearm, seen=seen)
                except Exception as error:  # noqa: BLE001 - raised below, as it is
                    failure = error
            if failure is not None:
                raise failure
            todo, known = await enforcer.newcomers(file, self.clients), False
            self.clients += todo

    async def _bring(
        self,
        clients: list[Client],
        layout: Layout,
        before: Sequence[Demand] = (),
        *,
        rearm: bool = False,
        seen: bool = False,
    ) -> None:
        await self._enforcer.bring(self._file, clients, layout, before, rearm=rearm, seen=seen)


def unknown(client: Client, inode: int) -> bool:
    attached = client.regions.get(inode)
    return attached is not None and attached.state is State.UNENFORCED
