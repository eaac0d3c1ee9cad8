"""The event log: bounded rings of what happened, read as JSON lines.

For: ``.control/events`` (every region's events) and ``.control/NAME/events`` (one region's).

Promises: each reader has its own place and starts at the oldest event still held, as with
/dev/kmsg; readers never slow the writer down or lose one another's events; a reader that falls
behind the ring is told how many events it missed by an ``overflow`` line and goes on with the
oldest one held. A line is encoded once, when the first reader wants it.

Leaves out: what an event means (``region/events.py``), descriptors and FUSE (``control.py``).
"""

from __future__ import annotations

import json
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

    from msharefs.region.events import Event

MOUNT_CAPACITY: Final = 65_536
"""Events held for the whole mount; ``-o events=`` changes it."""

REGION_SHARE: Final = 16
"""A region's own ring holds this fraction of the mount's."""


@attrs.define(eq=False)
class Entry:
    """One event with its number and time (seconds since the epoch)."""

    seq: int
    time: float
    event: Event
    _line: bytes | None = None

    def line(self) -> bytes:
        if self._line is None:
            head = {"seq": self.seq, "time": round(self.time, 6)}
            self._line = encode_line({**head, **self.event.fields()})
        return self._line


def encode_line(fields: dict[str, Any]) -> bytes:
    """One JSON object and a newline."""
    return json.dumps(fields).encode() + b"\n"


class Ring:
    """The newest ``capacity`` entries, and who waits for more."""

    def __init__(self, capacity: int) -> None:
        self._entries: deque[Entry] = deque()
        self._capacity = capacity
        self.first = 0
        """The index of the oldest entry held, counted from the first one ever."""
        self._on_append: set[Callable[[], None]] = set()
        self.closed = False
        """Nothing will come any more: readers find the end of the file after the last entry."""

    @property
    def end(self) -> int:
        """The index that the next entry will get."""
        return self.first + len(self._entries)

    def append(self, entry: Entry) -> None:
        entries = self._entries
        entries.append(entry)
        if len(entries) > self._capacity:
            entries.popleft()
            self.first += 1
        if self._on_append:
            self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        if self._on_append:
            notify, self._on_append = self._on_append, set()
            for call in notify:
                call()

    def entry(self, index: int) -> Entry:
        return self._entries[index - self.first]

    def call_on_append(self, call: Callable[[], None]) -> None:
        """Call ``call`` once, when the next entry comes or the ring is closed."""
        self._on_append.add(call)

    def forget_call(self, call: Callable[[], None]) -> None:
        self._on_append.discard(call)


class EventLog:
    """Numbers events and keeps them in the mount's ring and in the region's."""

    def __init__(self, capacity: int = MOUNT_CAPACITY) -> None:
        self.ring = Ring(capacity)
        self._region_capacity = max(1, capacity // REGION_SHARE)
        self._next_seq = 1

    def new_region_ring(self) -> Ring:
        return Ring(self._region_capacity)

    def add(self, event: Event, region_ring: Ring) -> int:
        """The event's number."""
        entry = Entry(self._next_seq, time.time(), event)
        self._next_seq += 1
        self.ring.append(entry)
        region_ring.append(entry)
        return entry.seq


class Reader:
    """One open descriptor of an events file: a byte stream of lines."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._next = ring.first
        self._rest = b""
        """The tail of a line that did not fit into the last read."""

    @property
    def ready(self) -> bool:
        """Whether a read would return at once."""
        return bool(self._rest) or self._next < self._ring.end or self._ring.closed

    @property
    def at_end(self) -> bool:
        """Whether everything has been read and nothing more will come."""
        return self._ring.closed and not self._rest and self._next == self._ring.end

    def take(self, size: int) -> bytes:
        """Up to ``size`` bytes: whole lines, unless not even one fits. Empty if nothing is there."""
        taken = bytearray()
        while len(taken) < size:
            line = self._rest or self._next_line()
            if not line:
                break
            if len(taken) + len(line) > size and taken:
                self._rest = line
                break
            room = size - len(taken)
            taken += line[:room]
            self._rest = line[room:]
        return bytes(taken)

    def later(self, size: int) -> Reading:
        """As :meth:`take`, once something is there. Empty at the end of the stream."""
        return Reading(self, size)

    def call_when_ready(self, call: Callable[[], None]) -> None:
        """Call ``call`` once, when the next event comes."""
        self._ring.call_on_append(call)

    def forget_call(self, call: Callable[[], None]) -> None:
        self._ring.forget_call(call)

    def _next_line(self) -> bytes:
        ring = self._ring
        if self._next < ring.first:
            lost, self._next = ring.first - self._next, ring.first
            oldest = ring.entry(ring.first)
            return encode_line(
                {
                    "seq": oldest.seq,
                    "time": round(oldest.time, 6),
                    "event": "overflow",
                    "lost": lost,
                }
            )
        if self._next == ring.end:
            return b""
        line = ring.entry(self._next).line()
        self._next += 1
        return line


class Reading:
    """A read() that waits: answered from within the event that ends the wait.

    See ``Pending`` in ``fuse/handlers.py``.
    """

    def __init__(self, reader: Reader, size: int) -> None:
        self._reader = reader
        self._size = size
        self._done: Callable[[bytes], None]

    def start(self, done: Callable[[bytes], None]) -> None:
        self._done = done
        self._look()

    def cancel(self) -> None:
        self._reader.forget_call(self._look)

    def _look(self) -> None:
        data = self._reader.take(self._size)
        if data or not self._size or self._reader.at_end:
            self._done(data)
        else:
            self._reader.call_when_ready(self._look)
