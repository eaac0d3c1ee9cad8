"""The way to the library behind us: a socket pair, and how much may be under way on it.

libfuse takes its end of a SOCK_SEQPACKET pair for the device (mount point ``/dev/fd/N``): one
message is one frame. Two traps are dealt with here:

- *Deadlock.* libfuse writes a reply with a blocking write that holds Python's global lock, on the
  thread of the loop that empties our end. If the socket were full, it would wait for ever. So no
  more requests are handed over than their replies, all at once, can fill a part of the socket's
  buffer (`budget`); the rest of it is for notifications, which nobody can count beforehand.
- *Waiting.* The reader of the device must never wait for the library: a request that cannot be
  handed over waits in a backlog, in order, and can be withdrawn from there.

Leaves out: what the frames mean.
"""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import attrs
import trio

if TYPE_CHECKING:
    from .wire import Frame

_SO_SNDBUFFORCE: Final = 32  # not in the socket module; needs CAP_NET_ADMIN
_REPLY_BUFFER: Final = 128 << 20
"""Bytes asked for in the library's direction. Memory is used only by what lies in it."""
_REQUEST_BUFFER: Final = 4 << 20
_MAX_BACKLOG: Final = 64 << 20
"""Bytes of requests that may wait here. Beyond them the kernel keeps them, in its callers."""
_SMALL: Final = 4096
"""More than the kernel accounts for one small message on a socket."""


@attrs.frozen
class _Waiting:
    frame: bytes
    cost: int


class Downstream:
    """Our end of the pair (`socket`), and the library's (`library_fd`, for it to close)."""

    def __init__(self, *, reply_buffer: int = _REPLY_BUFFER) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        _grow(ours, _REQUEST_BUFFER)
        _grow(theirs, reply_buffer)
        self.socket: Final = ours
        self.budget: Final = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
        self.in_flight = 0
        """What the replies to requests handed over may come to, in bytes of socket buffer. Never
        more than `budget`, but for one request that alone is worth more."""
        self._theirs: socket.socket | None = theirs
        self._library_fd = -1
        self._backlog: OrderedDict[int, _Waiting] = OrderedDict()
        self._backlog_bytes = 0
        self._stalled = trio.Event()
        self._room = trio.Event()

    @property
    def backlog(self) -> int:
        """How many requests wait to be handed over."""
        return len(self._backlog)

    def give_away(self) -> str:
        """The mount point to tell the library, which from now on owns that descriptor."""
        assert self._theirs is not None
        self._library_fd = self._theirs.detach()
        self._theirs = None
        return f"/dev/fd/{self._library_fd}"

    def take_back(self) -> None:
        """The library did not start: its descriptor is ours again, and closed."""
        if self._library_fd >= 0:
            os.close(self._library_fd)
            self._library_fd = -1

    def close(self) -> None:
        self.socket.close()
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None

    @staticmethod
    def cost_of(reply_size: int) -> int:
        """What a reply of that many bytes may take up in a socket's buffer.

        The kernel rounds a message up, to twice its size at worst, and adds its own bookkeeping.
        """
        return 2 * reply_size + _SMALL

    def submit(self, unique: int, frame: Frame, cost: int) -> None:
        """Hand ``frame`` over, now or when there is room; ``cost`` 0 for one without a reply.

        Raises OSError if the library's end is closed.
        """
        if not self._backlog and self._fits(cost) and self._send(frame):
            self.in_flight += cost
            return
        self._backlog[unique] = _Waiting(bytes(frame), cost)
        self._backlog_bytes += len(frame)

    def settle(self, cost: int) -> None:
        """A request of that cost has been answered: hand over what waited for it."""
        self.in_flight -= cost
        if self._backlog:
            self._pump()

    def withdraw(self, unique: int) -> bool:
        """Take a request back, if it has not been handed over yet."""
        waiting = self._backlog.pop(unique, None)
        if waiting is None:
            return False
        self._forget_bytes(len(waiting.frame))
        self._pump()
        return True

    async def room(self) -> None:
        """Wait until the backlog is short enough for another request. At once if it is."""
        while self._backlog_bytes > _MAX_BACKLOG:
            self._room = trio.Event()
            await self._room.wait()

    async def run(self) -> None:
        """Hand over what waits because the socket was full. For ever."""
        while True:
            await self._stalled.wait()
            await trio.lowlevel.wait_writable(self.socket)
            self._stalled = trio.Event()
            self._pump()

    def _fits(self, cost: int) -> bool:
        return not cost or not self.in_flight or self.in_flight + cost <= self.budget

    def _send(self, frame: Frame) -> bool:
        try:
            self.socket.send(frame)
        except BlockingIOError:
            self._stalled.set()
            return False
        return True

    def _pump(self) -> None:
        while self._backlog:
            unique, waiting = next(iter(self._backlog.items()))
            if not self._fits(waiting.cost) or not self._send(waiting.frame):
                return
            del self._backlog[unique]
            self.in_flight += waiting.cost
            self._forget_bytes(len(waiting.frame))

    def _forget_bytes(self, count: int) -> None:
        self._backlog_bytes -= count
        if self._backlog_bytes <= _MAX_BACKLOG:
            self._room.set()


def _grow(end: socket.socket, size: int) -> None:
    """Let ``end`` send that much before it waits, or as much as the system allows us."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
