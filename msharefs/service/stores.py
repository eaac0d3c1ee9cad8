"""Stores to file objects that are under way: write() and its like, in threads.

For: a change that takes the right to write away. Once the table says so no store begins any more;
those that have begun are waited for, so that none lands after the change's reply. What a dead
filesystem holds on to is waited for as long as a client that does not stop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import trio

from msharefs.abi import Prot
from msharefs.region.errors import ClientStuck

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msharefs.region.mapping import RangeChange


@attrs.define(eq=False)
class Store:
    """One of them, to ``[start, end)`` of the region."""

    start: int
    end: int
    done: trio.Event = attrs.field(factory=trio.Event)


class Stores:
    """Those of one region. For the loop."""

    def __init__(self) -> None:
        self._going: dict[Store, None] = {}

    def begin(self, start: int, end: int) -> Store:
        store = Store(start, end)
        self._going[store] = None
        return store

    def end(self, store: Store) -> None:
        del self._going[store]
        store.done.set()

    def forbidden(self, ranges: Sequence[RangeChange]) -> list[Store]:
        """Those under way in ranges that lose the right to write, or what lies there."""
        if not self._going:
            return []
        losing = [(r.start, r.end) for r in ranges if r.replaced or r.lost & Prot.WRITE]
        return [
            store
            for store in self._going
            if any(store.start < end and start < store.end for start, end in losing)
        ]

    async def settle(self, ranges: Sequence[RangeChange], limit: float) -> None:
        """Wait for them, up to ``limit`` seconds. Raises ClientStuck."""
        with trio.move_on_after(limit):
            for store in self.forbidden(ranges):
                await store.done.wait()
            return
        raise ClientStuck(
            "a write() to a file object has not ended: its filesystem does not answer"
        )
