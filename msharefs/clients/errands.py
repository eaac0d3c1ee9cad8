"""Calls for many clients' userfaultfds, carried out by as few threads as will do.

For: ``faults.py``. The lanes of the clients are reserved, so that for each client the order of its
calls is kept, and its descriptors stay open; each lane goes on as soon as its client's errand is
done. The calls are made by the compiled module (``_native_faults.c``).

Promises: a client that hangs keeps one thread, and nobody else waiting. Its lane goes on when it
does, though the errands were given up long before.
"""

from __future__ import annotations

import struct
import threading
from contextlib import suppress
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from msharefs.clients import native
from msharefs.clients.lanes import Lane

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msharefs.clients.lanes import Workers

THREADS: Final = 2
NO_PROGRESS: Final = 0.02
"""Seconds after which one more thread takes up errands that nobody has begun."""

# The structures of _native_faults.c: status, first, count, failed; fd, kind, start, size, mode.
_ERRAND: Final = struct.Struct("=iIII")
_CALL: Final = struct.Struct("=iIQQQ")
_COUNTER: Final = struct.Struct("=Q")


class Kind(IntEnum):
    """What a call does. UNREGISTER wakes who waits there, if its mode is 1."""

    REGISTER = 1
    PROTECT = 2
    UNREGISTER = 3


Call: TypeAlias = tuple[int, Kind, int, int, int]
"""Descriptor, kind, address, size, mode."""


class Errands:
    """``calls[i]`` for the client of ``lanes[i]``, which has been reserved; up to one that fails."""

    def __init__(
        self, workers: Workers, lanes: Sequence[Lane], calls: Sequence[Sequence[Call]]
    ) -> None:
        self._workers = workers
        self._kinds = [kind for some in calls for _, kind, *_ in some]
        self._counter = bytearray(_COUNTER.size)
        self._errands = bytearray()
        self._calls = bytearray()
        first = 0
        for some in calls:
            self._errands += _ERRAND.pack(native.PENDING, first, len(some), 0)
            for call in some:
                self._calls += _CALL.pack(*call)
            first += len(some)
        self._held = dict(enumerate(lanes))
        self._lock = threading.Lock()
        self._done = trio.Event()
        self._count = len(calls)

    async def run(self, limit: float) -> None:
        """Until all are done, or ``limit`` seconds have passed; then the rest will be done later."""
        token = trio.lowlevel.current_trio_token()

        def work() -> None:
            native.carry_out_many(self._counter, self._errands, self._calls)
            if self._give_back():
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(self._done.set)

        for _ in range(min(THREADS, self._count)):
            self._workers.submit(Lane(), work)
        with trio.move_on_after(limit):
            while not self._done.is_set():
                with trio.move_on_after(NO_PROGRESS):
                    await self._done.wait()
                    return
                (begun,) = _COUNTER.unpack(self._counter)
                if begun < self._count:
                    self._workers.submit(Lane(), work)

    def status(self, index: int) -> tuple[int, Kind | None]:
        """native.PENDING, 0, or the errno of the call that failed and its kind."""
        status, _, count, failed = _ERRAND.unpack_from(self._errands, index * _ERRAND.size)
        return status, self._kinds[failed] if count else None

    def _give_back(self) -> bool:
        """The lanes of those that are done. Whether all are. In a thread that has nothing to do."""
        with self._lock:
            done = [i for i in self._held if self.status(i)[0] != native.PENDING]
            lanes = [self._held.pop(i) for i in done]
            nothing_left = not self._held
        for lane in lanes:
            self._workers.release(lane)
        return nothing_left
