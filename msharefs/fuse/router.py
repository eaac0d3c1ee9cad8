"""The frame router: kernel <-> device <-> `Router` <-> `Downstream` <-> libfuse and pyfuse3.

Requests that pyfuse3 has no hook for, and reads, writes, names and opens if the service wants them,
are answered by its handlers (`served`, `naming`); all others go to the library and their replies
come back. INIT is amended both ways (`handshake`), the replies to OPEN and CREATE on their way to
the kernel (`opening`).

Promises:

- Nothing in a frame, nothing a handler raises and nothing the library sends ends the loop.
- Every request that reaches us gets exactly one reply, also when the router is stopped.
- The loop waits for neither the library nor the kernel's locks. A handler that waits costs a task.

Leaves out: mounting and the library's life (`session`), what is in the files (the handlers).
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from trio.lowlevel import wait_readable

from .answers import GONE, Answers
from .decode import BadFrame, decode_request
from .downstream import Downstream
from .handshake import Connection, amend_init_reply, amend_init_request
from .naming import Naming
from .notify import Notifier
from .opening import Opening
from .passthrough import BackingDevice, BackingTable, FuseBacking
from .served import Served
from .wire import (
    FRAME_BUFFER,
    NOTIFY_INVAL_ENTRY,
    NOTIFY_INVAL_INODE,
    OUT_HEADER,
    OUT_SIZE,
    SMALL_REPLY,
    UNANSWERED,
    CopyRequest,
    FallocateRequest,
    ForgetRequest,
    Frame,
    FsyncRequest,
    GetattrRequest,
    GetxattrRequest,
    InitRequest,
    InterruptRequest,
    IoctlRequest,
    NameRequest,
    NotifyCode,
    Opcode,
    OpenRequest,
    OtherRequest,
    PollRequest,
    ReadRequest,
    ReleaseRequest,
    Request,
    SeekRequest,
    WriteRequest,
    build_notification,
    build_reply,
    build_request,
    decode_reply_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .handlers import Handlers

log = logging.getLogger(__name__)

_BURST: Final = 32
"""Frames handled before the other tasks of the loop get their turn."""
_PATIENCE: Final = 0.2
"""Seconds that an interrupted read or write, held by the library, may still take before its caller
gets EINTR: pyfuse3 cannot cancel a handler. Quick ones end as if there had been no signal, as
programs expect of files."""
_DRAIN: Final = 0.5
"""Seconds for the library to finish what it holds when the connection has ended."""
_OWN_NUMBERS: Final = 1 << 62 | 1
"""Numbers of the requests that we make ourselves: odd, as the kernel's never are."""


@attrs.define
class _Forwarded:
    """A request that the library is to answer. ``settled``: nobody waits for its reply."""

    request: Request
    cost: int
    settled: bool = False


class Router:
    """Routes the frames of one connection.

    ``device`` is the FUSE device (non-blocking; it stays the caller's to close). For statistics
    and tests: ``counts`` (requests seen, by opcode), ``downstream``, ``backing``, ``notifier``.
    ``connection`` is what INIT came to, None before ``ready`` is set; ``ended`` is set when no
    more is routed, and ``gone`` then says by which errno the kernel ended it: ENODEV (unmounted),
    ECONNABORTED (aborted; the mount is still there), None if it did not.
    """

    def __init__(
        self,
        device: int,
        handlers: Handlers,
        *,
        downstream: Downstream | None = None,
        backing: BackingDevice | None = None,
    ) -> None:
        self.device: Final = device
        self.downstream: Final = downstream or Downstream()
        self.backing: Final = BackingTable(backing or FuseBacking(device))
        self.notifier: Final = Notifier(device)
        self.counts: Final[Counter[Opcode]] = Counter()
        self.connection: Connection | None = None
        self.ready: Final = trio.Event()
        self.ended: Final = trio.Event()
        self.gone: int | None = None
        self._answers = Answers(device, handlers.errno_of)
        self._served = served = Served(handlers, self._answers, self._forward)
        self._opening = Opening(handlers.opened, self._answers, self.backing, self)
        self._naming = naming = Naming(handlers, self._answers, self._opening, self._forward)
        self._forwarded: dict[int, _Forwarded] = {}
        self._scope = trio.CancelScope()
        self._failure: OSError | None = None
        self._library_dead = False
        self._idle = trio.Event()
        self._own_number = _OWN_NUMBERS
        self._routes: dict[type, Callable[[Any, Frame], None]] = {
            IoctlRequest: served.ioctl,
            FallocateRequest: served.fallocate,
            FsyncRequest: served.fsync,
            ReadRequest: self._on_read,
            WriteRequest: served.write,
            GetxattrRequest: served.getxattr,
            SeekRequest: served.seek,
            PollRequest: served.poll,
            CopyRequest: served.copy,
            InterruptRequest: self._on_interrupt,
            ReleaseRequest: self._on_release,
            InitRequest: self._on_init,
            NameRequest: naming.name,
            GetattrRequest: naming.getattr,
            ForgetRequest: naming.forget,
            OpenRequest: naming.open,
            OtherRequest: self._forward,
        }

    @property
    def passthrough(self) -> bool:
        return self.connection is not None and self.connection.passthrough

    @property
    def waiting(self) -> int:
        """Requests that have no reply yet."""
        forwarded = sum(not entry.settled for entry in self._forwarded.values())
        return forwarded + len(self._answers.tasks) + len(self._answers.pending)

    # -- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Route until the kernel ends the connection or `stop` is called. Once.

        Raises OSError if the library cannot agree with the kernel (EPROTO), or the device fails.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._answers.nursery = nursery
                    nursery.start_soon(self.downstream.run)
                    nursery.start_soon(self._from_library)
                    await self._from_kernel()
                    await self._drain()
                    nursery.cancel_scope.cancel()
        finally:
            self._abandon(errno.ECONNABORTED)
            self._answers.abandon(errno.ECONNABORTED)
            self.ended.set()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End `run` soon. Requests that wait are answered with ECONNABORTED."""
        self._scope.cancel()

    def library_failed(self) -> None:
        """The library answers no more: what it holds, and what it would get, fails with EIO."""
        self._library_dead = True
        self._abandon(errno.EIO)

    def _abandon(self, code: int) -> None:
        """Answer everything that the library has not."""
        forwarded, self._forwarded = self._forwarded, {}
        for entry in forwarded.values():
            if not entry.settled:
                self._answers.refuse(entry.request, code)

    async def _drain(self) -> None:
        """Let the library see its last requests through: a RELEASE or FORGET, when unmounted."""
        with trio.move_on_after(_DRAIN):
            while self._forwarded:
                self._idle = trio.Event()
                await self._idle.wait()

    # -- from the kernel --------------------------------------------------------------------------

    async def _from_kernel(self) -> None:
        buffer = bytearray(FRAME_BUFFER)
        view = memoryview(buffer)
        vector = (buffer,)
        handled = 0
        while True:
            try:
                size = os.readv(self.device, vector)
            except BlockingIOError:
                handled = 0
                await wait_readable(self.device)
                continue
            except OSError as exc:
                if exc.errno in (errno.ENOENT, errno.EINTR):
                    continue  # the request was withdrawn while we were reading it
                if exc.errno not in GONE:
                    raise
                self.gone = exc.errno
                return
            if not size:
                self.gone = errno.ENODEV
                return
            self._take(view[:size])
            handled += 1
            if handled >= _BURST:
                handled = 0
                await trio.lowlevel.checkpoint()
                await self.downstream.room()

    def _take(self, frame: Frame) -> None:
        try:
            request = decode_request(frame)
        except BadFrame as bad:
            # A kernel that is newer than we are asks, once, for what we do not know.
            level = logging.DEBUG if bad.errno == errno.ENOSYS else logging.WARNING
            log.log(level, "request %d refused: %s", bad.unique, bad.reason)
            if bad.unique:
                self._answers.write(build_reply(bad.unique, error=bad.errno))
            return
        self.counts[request.opcode] += 1
        unique = request.unique
        if unique in self._forwarded or self._answers.holds(unique):
            log.error("%s: request %d is still being answered", request.opcode.name, unique)
            return
        self._routes[type(request)](request, frame)

    def _on_release(self, request: ReleaseRequest, frame: Frame) -> None:
        self.backing.release(request.nodeid, request.fh)
        self._naming.release(request, frame)

    def _on_read(self, request: ReadRequest, frame: Frame) -> None:
        self._served.read(request, frame)
        if request.cached and request.nodeid in self.backing:
            # Programs store to the backing file behind the kernel's back: the next splice(2) of
            # the same pages is to ask again. The notification waits for the answer, if it must.
            body = NOTIFY_INVAL_INODE.pack(request.nodeid, request.offset, request.size)
            self.notifier.send(build_notification(NotifyCode.INVAL_INODE, body))

    def drop_name(self, directory: int, name: bytes) -> None:
        """Have the kernel keep this name no longer: it asks anew, and forgets what is not in use."""
        body = NOTIFY_INVAL_ENTRY.pack(directory, len(name), 0) + name + b"\0"
        self.notifier.send(build_notification(NotifyCode.INVAL_ENTRY, body))

    def _on_init(self, request: InitRequest, frame: Frame) -> None:
        self._forward(request, amend_init_request(frame))

    def _on_interrupt(self, request: InterruptRequest, _frame: Frame) -> None:
        # Never handed to the library: pyfuse3 could not act on it, and libfuse would keep one for
        # a request that it has just answered, and answer another one wrongly for it.
        if self._answers.interrupt(request.target):
            return
        entry = self._forwarded.get(request.target)
        if entry is not None and entry.request.opcode in (Opcode.READ, Opcode.WRITE):
            self._answers.nursery.start_soon(self._give_up, entry)

    async def _give_up(self, entry: _Forwarded) -> None:
        """Free the interrupted caller of a request that the library holds on to."""
        await trio.sleep(_PATIENCE)
        unique = entry.request.unique
        if self._forwarded.get(unique) is not entry or entry.settled:
            return
        if self.downstream.withdraw(unique):
            del self._forwarded[unique]
        elif entry.request.opcode is Opcode.READ:
            entry.settled = True  # the reply that comes in the end is dropped
        else:
            return  # a write that is under way: EINTR would deny what may be done
        self._answers.refuse(entry.request, errno.EINTR)

    # -- to the library, and back -----------------------------------------------------------------

    def tell(self, opcode: Opcode, nodeid: int, body: bytes) -> None:
        """Send the library a request of our own, whose reply matters to nobody."""
        self._own_number += 2
        frame = build_request(opcode, self._own_number, nodeid, body)
        self._forward(decode_request(frame), frame, settled=True)

    def _forward(self, request: Request, frame: Frame, *, settled: bool = False) -> None:
        answered = request.opcode not in UNANSWERED
        if self._library_dead:
            if answered and not settled:
                self._answers.refuse(request, errno.EIO)
            return
        cost = 0
        if answered:
            cost = Downstream.cost_of(_reply_size(request))
            self._forwarded[request.unique] = _Forwarded(request, cost, settled)
        try:
            self.downstream.submit(request.unique, frame, cost)
        except OSError as exc:
            log.error("the filesystem library is gone: %s", exc)
            self.library_failed()

    async def _from_library(self) -> None:
        buffer = bytearray(FRAME_BUFFER)
        view = memoryview(buffer)
        handled = 0
        while True:
            try:
                size = self.downstream.socket.recv_into(buffer)
            except BlockingIOError:
                handled = 0
                await wait_readable(self.downstream.socket)
                continue
            except ConnectionError:
                size = 0
            if not size:
                self.library_failed()
                return
            self._replied(view[:size])
            handled += 1
            if handled >= _BURST:
                handled = 0
                await trio.lowlevel.checkpoint()

    def _replied(self, frame: Frame) -> None:
        header = decode_reply_header(frame)
        if header is None:
            log.error("the filesystem library sent %d bytes that are no frame", len(frame))
            if len(frame) < OUT_SIZE or not (unique := OUT_HEADER.unpack_from(frame)[2]):
                return
            frame, header = build_reply(unique, error=errno.EIO), (unique, -errno.EIO)
        unique, error = header
        if not unique:
            self._notify(error, frame)
            return
        entry = self._forwarded.pop(unique, None)
        if entry is None:
            log.debug("the filesystem library answered %d, which nobody asked", unique)
            return
        self.downstream.settle(entry.cost)
        if not self._forwarded:
            self._idle.set()
        if entry.settled:
            return
        request = entry.request
        if isinstance(request, InitRequest):
            self._initialised(request, frame)
        elif isinstance(request, OpenRequest) and not error:
            self._opening.replied(request, frame)
        else:
            self._answers.write(frame)

    def _notify(self, code: int, frame: Frame) -> None:
        if code == NotifyCode.POLL:
            self._answers.write(frame)  # waits for nothing, and should be quick
        else:
            self.notifier.send(bytes(frame))

    def _initialised(self, request: InitRequest, frame: Frame) -> None:
        try:
            reply, self.connection = amend_init_reply(frame, request)
        except OSError as exc:
            self._failure = exc
            self._answers.refuse(request, errno.EPROTO)
            self.stop()
            return
        self._answers.write(reply)
        self.ready.set()


def _reply_size(request: Request) -> int:
    """The most bytes that the library's reply to ``request`` may have."""
    if isinstance(request, OtherRequest):
        return request.reply_size
    if isinstance(request, ReadRequest):
        return request.size
    if isinstance(request, GetxattrRequest):
        return max(request.size, SMALL_REPLY)
    return SMALL_REPLY
