"""Accesses that wait for somebody's word, until it comes or the time is over.

For: mode *hold* of MSHAREFS_NOTIFY. A hold is told of by a ``hold`` event, whose number decides:
whoever may write the region writes ``allow SEQ`` or ``deny SEQ`` to its events file (or the mount's
owner to the mount's).

Promises: every hold ends, and a ``release`` event says how: decided; not decided in time, or nobody
there to decide (nobody has an events file open, or the last one closed it), by the policy chosen at
arming; the range changed, so the access is judged again; whoever waited has gone.

When it dies: the holder: its descriptors are closed, so its holds end by policy. Who waits: its
hold ends. The server: the kernel lets everybody go on who waits in a fault; who waits in write()
gets ECONNABORTED.

Leaves out: who waits and how (``notifications.py``, ``clients/faults.py``).
"""

from __future__ import annotations

import heapq
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import attrs
import trio

from msharefs.abi import OnTimeout
from msharefs.region.errors import BadArgument, NothingThere
from msharefs.region.events import Actor, Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from msharefs.region.watch import Watch
    from msharefs.service.nodes import RegionFile


class Decision(StrEnum):
    """What becomes of an access that was held."""

    ALLOW = "allow"
    DENY = "deny"
    AGAIN = "again"
    """Judged again."""
    NONE = "none"
    """Nobody waits any more."""


class Reason(StrEnum):
    """Why a hold ended."""

    DECIDED = "decided"
    TIMEOUT = "timeout"
    NOBODY = "nobody"
    """Nobody has an events file open who could decide."""
    CHANGED = "changed"
    GONE = "gone"


_AFTER_TIMEOUT: Final = {OnTimeout.ALLOW: Decision.ALLOW, OnTimeout.DENY: Decision.DENY}


@attrs.frozen(eq=False)
class Hold:
    """An access that waits; ``settle`` is called once, when it is known what becomes of it."""

    seq: int
    file: RegionFile
    offset: int
    length: int
    actor: Actor
    via: str
    otherwise: Decision
    settle: Callable[[Decision], None]


class Holds:
    """All holds of a mount. ``tell`` puts an event into the log: its number."""

    def __init__(self, tell: Callable[[RegionFile, Event], int]) -> None:
        self._tell = tell
        self._holds: dict[int, Hold] = {}
        self._open: dict[int, int] = {}
        """How many descriptors of events files are open, by region; 0 for the mount's."""
        self._due: list[tuple[float, int]] = []
        self._earlier = trio.Event()

    def __len__(self) -> int:
        return len(self._holds)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """End holds whose time is over. For ever."""
        task_status.started()
        while True:
            self._earlier = trio.Event()
            with trio.move_on_at(self._due[0][0] if self._due else float("inf")):
                await self._earlier.wait()
            while self._due and self._due[0][0] <= trio.current_time():
                _, seq = heapq.heappop(self._due)
                hold = self._holds.get(seq)
                if hold is not None:
                    self._end(hold, hold.otherwise, Reason.TIMEOUT)

    # -- beginnings

    def begin(
        self, file: RegionFile, watch: Watch, event: Event, settle: Callable[[Decision], None]
    ) -> Hold | None:
        """Hold an access; ``event`` tells of it. None if it was settled at once."""
        seq = self._tell(file, event)
        otherwise = _AFTER_TIMEOUT[watch.on_timeout]
        actor, via = event.actor, event.via
        hold = Hold(seq, file, event.offset, event.length, actor, via, otherwise, settle)
        self._holds[seq] = hold
        if not self._open.get(0) and not self._open.get(file.ino):
            self._end(hold, otherwise, Reason.NOBODY)
            return None
        if watch.timeout_ms:
            heapq.heappush(self._due, (trio.current_time() + watch.timeout_ms / 1000, seq))
            self._earlier.set()
        return hold

    # -- endings

    def decide(self, text: bytes, file: RegionFile | None, actor: Actor) -> int:
        """Obey lines of ``allow SEQ`` or ``deny SEQ``: how many bytes of them were obeyed.

        They were written to the events file of ``file``, None for the mount's. Raises BadArgument for what is no such line, NothingThere for a SEQ that is not held (any
        more), or not here; a short count if lines before it have been obeyed.
        """
        wanted = _parse(text)
        taken = 0
        for length, decision, seq in wanted:
            hold = self._holds.get(seq)
            if hold is None or (file is not None and hold.file is not file):
                if taken:
                    return taken
                raise NothingThere(f"no access is held under number {seq}")
            self._end(hold, decision, Reason.DECIDED, actor)
            taken += length
        return taken

    def opened(self, file: RegionFile | None) -> None:
        """Somebody has opened an events file (None: the mount's) and may decide."""
        key = 0 if file is None else file.ino
        self._open[key] = self._open.get(key, 0) + 1

    def closed(self, file: RegionFile | None) -> None:
        """The reverse of :meth:`opened`."""
        key = 0 if file is None else file.ino
        left = self._open[key] - 1
        if left:
            self._open[key] = left
            return
        del self._open[key]
        if self._open.get(0):
            return
        for hold in list(self._holds.values()):
            if (file is None or hold.file is file) and not self._open.get(hold.file.ino):
                self._end(hold, hold.otherwise, Reason.NOBODY)

    def changed(self, file: RegionFile, start: int, end: int) -> None:
        """The rules of ``[start, end)`` are others now: who waits there is judged again."""
        for hold in list(self._holds.values()):
            if hold.file is file and hold.offset < end and start < hold.offset + hold.length:
                self._end(hold, Decision.AGAIN, Reason.CHANGED)

    def gone(self, hold: Hold) -> None:
        """Whoever waited does not any more. Nothing if it had been settled."""
        if hold.seq in self._holds:
            self._end(hold, Decision.NONE, Reason.GONE)

    def _end(self, hold: Hold, decision: Decision, reason: Reason, by: Actor | None = None) -> None:
        del self._holds[hold.seq]
        detail: tuple[tuple[str, str | int], ...] = (
            ("hold", hold.seq),
            ("decision", str(decision)),
            ("reason", str(reason)),
        )
        if by is not None:
            detail += (("by", by.pid),)
        name = hold.file.region.name
        self._tell(
            hold.file,
            Event(EventKind.RELEASE, name, hold.actor, hold.via, hold.offset, hold.length, detail),
        )
        hold.settle(decision)


def _parse(text: bytes) -> list[tuple[int, Decision, int]]:
    """(bytes, decision, number) of each line."""
    found: list[tuple[int, Decision, int]] = []
    for line in text.splitlines(keepends=True):
        words = line.split()
        if len(words) != 2 or words[0] not in {b"allow", b"deny"} or not words[1].isdigit():
            raise BadArgument(f"neither 'allow SEQ' nor 'deny SEQ': {line[:40]!r}")
        found.append((len(line), Decision(words[0].decode()), int(words[1])))
    if not found:
        raise BadArgument("nothing was written")
    return found
