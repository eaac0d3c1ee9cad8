"""What is owed to those who wait for us.

For: a change that has to reach a process whose only thread waits for an answer of ours: the caller of
that very change, as a rule, or of another one. Such a thread cannot be stopped before its request
is answered, and its program runs nothing until then. So what the change demands of it is done when
its call ends, after the answer is written and before the program goes on.

When it dies: the thread that is owed something: the debt is void. The server: the thread goes on as
its mappings are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from msharefs.clients.gone import Gone
from msharefs.region.errors import ClientStuck, NotAdoptable
from msharefs.service.batch import LIMIT, thread_count

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from msharefs.clients.holding import Held
    from msharefs.clients.roster import Client
    from msharefs.region.events import Actor
    from msharefs.service.enforce import Enforcer
    from msharefs.service.nodes import RegionFile

T = TypeVar("T")


class Debts:
    """Who waits for us, and what is owed to them. For the loop."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._enforcer = enforcer
        self._waiting: dict[int, int] = {}
        """The process of each thread that waits."""
        self._owed: dict[int, dict[tuple[RegionFile, Client], None]] = {}

    async def while_waiting(self, actor: Actor, outcome: Awaitable[T]) -> T:
        """Await the outcome of a request whose thread waits for it.

        Such a thread cannot be stopped before its request is answered. If it is the only one of a
        process that a change has to reach meanwhile, this one or anybody else's, it runs nothing
        until then: what is owed to it (:meth:`owe`) is done when its call ends, before its
        program goes on.
        """
        self._waiting[actor.tid] = actor.pid
        try:
            return await outcome
        finally:
            del self._waiting[actor.tid]
            owed = self._owed.pop(actor.tid, None)
            if owed:
                with trio.CancelScope(shield=True):  # being stopped looks like a signal to its call
                    await self._settle(actor, owed)

    def waiter(self, client: Client) -> int:
        """The id of the client's thread, if it is its only one and waits for us; else 0."""
        for tid, pid in self._waiting.items():
            if pid in (client.pid, *client.sharers) and thread_count(pid) == 1:
                return tid
        return 0

    def owe(self, tid: int, file: RegionFile, client: Client) -> None:
        """The client is to be brought to what the region demands when the thread's call ends."""
        self._owed.setdefault(tid, {})[file, client] = None

    async def _settle(self, actor: Actor, owed: Iterable[tuple[RegionFile, Client]]) -> None:
        """See to it that what is owed is done. When this returns the call may be answered."""
        todo: list[tuple[RegionFile, Client]] = []
        for file, client in owed:
            with trio.move_on_after(LIMIT) as waited:
                if not any(client is other for _, other in todo):
                    await client.lock.acquire()
            if waited.cancelled_caught:
                stuck = ClientStuck(f"process {client.pid} is being changed by somebody else")
                self._enforcer.unenforced(file, client, stuck)
            else:
                todo.append((file, client))
        clients = {client: None for _, client in todo}
        held = self._enforcer.hands.of_thread(actor.tid)
        if held is not None:
            self._enforcer.soon(self._pay_followed(held, todo, clients))
            return
        held = self._enforcer.hands.take(actor.tid, actor.pid)
        try:
            await held.placed()
        except (Gone, NotAdoptable) as error:
            for file, client in todo:
                if isinstance(error, NotAdoptable):
                    self._enforcer.unenforced(file, client, error)
            _let_go(clients)
        else:
            self._enforcer.soon(self._pay(held, todo, clients))

    async def _pay(
        self, held: Held, todo: list[tuple[RegionFile, Client]], clients: Iterable[Client]
    ) -> None:
        try:
            await held.stopped()
            for file, client in todo:
                await self._enforcer.finish(file, client, held.run)
        except Gone:
            return
        finally:
            held.release()
            _let_go(clients)

    async def _pay_followed(
        self, held: Held, todo: list[tuple[RegionFile, Client]], clients: Iterable[Client]
    ) -> None:
        try:
            pause = await held.pause()
        except Gone:
            _let_go(clients)
            self._enforcer.look_around()
            return
        try:
            for file, client in todo:
                await self._enforcer.finish(file, client, pause.run)
        finally:
            pause.release()
            _let_go(clients)


def _let_go(clients: Iterable[Client]) -> None:
    for client in clients:
        client.lock.release()
