"""The frame router: kernel <-> device <-> `Router` <-> `Downstream` <-> libfuse and pyfuse3.

Requests that pyfuse3 has no hook for (ioctl, fallocate, and reads and writes if the service wants them) are
answered here by the `Handlers`; all others go to the library and their replies come back. INIT is
amended both ways (`handshake`), the replies to OPEN and CREATE on their way back (`OpenPlan`).

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
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import attrs
import trio
from trio.lowlevel import wait_readable

from .downstream import Downstream
from .handlers import FORWARD, Handlers, IoctlReply, OpenedFile, OpenPlan
from .handshake import Connection, amend_init_reply, amend_init_request
from .notify import Notifier
from .passthrough import BackingDevice, BackingTable, FuseBacking
from .wire import (
    ENTRY_OUT_SIZE,
    FORGET_IN,
    FRAME_BUFFER,
    MAX_ERRNO,
    OPEN_OUT,
    OUT_HEADER,
    OUT_SIZE,
    RELEASE_IN,
    SMALL_REPLY,
    UNANSWERED,
    WRITE_OUT,
    BadFrame,
    FallocateRequest,
    Frame,
    InitRequest,
    InterruptRequest,
    IoctlRequest,
    NotifyCode,
    Opcode,
    OpenReplyFlag,
    OpenRequest,
    OtherRequest,
    ReadRequest,
    ReleaseRequest,
    Request,
    WriteRequest,
    build_ioctl_reply,
    build_reply,
    build_request,
    decode_reply_header,
    decode_request,
)

log = logging.getLogger(__name__)

_BURST: Final = 32
"""Frames handled before the other tasks of the loop get their turn."""
_PATIENCE: Final = 0.2
"""Seconds that an interrupted read or write, held by the library, may still take before its caller
gets EINTR: pyfuse3 cannot cancel a handler. Quick ones end as if there had been no signal, as
programs expect of files."""
_DRAIN: Final = 0.5
"""Seconds for the library to finish what it holds when the connection has ended."""
_OURS: Final = 1 << 62 | 1
"""Numbers of the requests that we make ourselves: odd, as the kernel's never are."""
_GONE: Final = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE})
_ANY_READ: Final = 0xFFFF_FFFF


@attrs.define
class _Forwarded:
    """A request that the library is to answer. ``settled``: its caller has a reply already."""

    request: Request
    cost: int
    settled: bool = False


class Router:
    """Routes the frames of one connection.

    ``device`` is the FUSE device (non-blocking; it stays the caller's to close). Attributes for
    statistics and tests: ``counts`` (requests seen, by opcode), ``downstream``, ``backing``,
    ``notifier``; ``connection`` is what INIT came to, None before ``ready`` is set.
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
        """The errno by which the kernel ended the connection: ENODEV (unmounted) or ECONNABORTED
        (aborted; the mount is still there). None if it did not."""
        self._handlers = handlers
        self._forwarded: dict[int, _Forwarded] = {}
        self._tasks: dict[int, trio.CancelScope] = {}
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery
        self._failure: OSError | None = None
        self._library_dead = False
        self._idle = trio.Event()
        self._next_own = _OURS
        self._routes: dict[type, Callable[[Any, Frame], None]] = {
            IoctlRequest: self._on_ioctl,
            FallocateRequest: self._on_fallocate,
            ReadRequest: self._on_read,
            WriteRequest: self._on_write,
            InterruptRequest: self._on_interrupt,
            ReleaseRequest: self._on_release,
            InitRequest: self._on_init,
            OpenRequest: self._forward,
            OtherRequest: self._forward,
        }

    @property
    def waiting(self) -> int:
        """Requests that have no reply yet."""
        forwarded = sum(not entry.settled for entry in self._forwarded.values())
        return forwarded + len(self._tasks)

    # -- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Route until the kernel ends the connection or `stop` is called. Once.

        Raises OSError if the library cannot agree with the kernel (EPROTO), or the device fails.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self.downstream.run)
                    nursery.start_soon(self._from_library)
                    await self._from_kernel()
                    await self._drain()
                    nursery.cancel_scope.cancel()
        finally:
            self._abandon(errno.ECONNABORTED)
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
        for unique, entry in forwarded.items():
            if not entry.settled:
                self._write(build_reply(unique, error=code))

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
                if exc.errno not in _GONE:
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
                self._write(build_reply(bad.unique, error=bad.errno))
            return
        self.counts[request.opcode] += 1
        unique = request.unique
        if unique in self._forwarded or unique in self._tasks:
            log.error("%s: request %d is still being answered", request.opcode.name, unique)
            return
        self._routes[type(request)](request, frame)

    def _on_ioctl(self, request: IoctlRequest, _frame: Frame) -> None:
        try:
            answer = self._handlers.ioctl(request)
            if isinstance(answer, IoctlReply):
                reply = build_ioctl_reply(request, answer.result, answer.data)
            else:
                self._start(request, answer, self._finish_ioctl)
                return
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            reply = build_reply(request.unique, error=self._errno(exc, request))
        self._write(reply)

    def _on_fallocate(self, request: FallocateRequest, _frame: Frame) -> None:
        try:
            answer = self._handlers.fallocate(request)
            if answer is not None:
                self._start(request, answer, self._finish_fallocate)
                return
            reply = build_reply(request.unique)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            reply = build_reply(request.unique, error=self._errno(exc, request))
        self._write(reply)

    def _on_read(self, request: ReadRequest, frame: Frame) -> None:
        try:
            answer = self._handlers.read(request)
            if answer is FORWARD:
                self._forward(request, frame)
            elif isinstance(answer, bytes):
                self._finish_read(request, answer)
            else:
                self._start(request, answer, self._finish_read)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._refuse(request, self._errno(exc, request))

    def _on_write(self, request: WriteRequest, frame: Frame) -> None:
        try:
            answer = self._handlers.write(request)
            if answer is FORWARD:
                self._forward(request, frame)
            elif isinstance(answer, int):
                self._finish_write(request, answer)
            else:
                self._start(request, answer, self._finish_write)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._refuse(request, self._errno(exc, request))

    def _on_release(self, request: ReleaseRequest, frame: Frame) -> None:
        self.backing.release(request.nodeid, request.fh)
        self._forward(request, frame)

    def _on_init(self, request: InitRequest, frame: Frame) -> None:
        self._forward(request, amend_init_request(frame))

    def _on_interrupt(self, request: InterruptRequest, _frame: Frame) -> None:
        # Never handed to the library: pyfuse3 could not act on it, and libfuse would keep one for
        # a request that it has just answered, and answer another one wrongly for it.
        scope = self._tasks.get(request.target)
        if scope is not None:
            scope.cancel()
            return
        entry = self._forwarded.get(request.target)
        if entry is not None and entry.request.opcode in (Opcode.READ, Opcode.WRITE):
            self._nursery.start_soon(self._give_up_on, request.target, entry)

    async def _give_up_on(self, unique: int, entry: _Forwarded) -> None:
        """Free the caller of a request that the library holds on to."""
        await trio.sleep(_PATIENCE)
        if self._forwarded.get(unique) is not entry or entry.settled:
            return
        if self.downstream.withdraw(unique):
            del self._forwarded[unique]
        elif entry.request.opcode is Opcode.READ:
            entry.settled = True  # the reply that comes in the end is dropped
        else:
            return  # a write that is under way: EINTR would deny what may be done
        self._write(build_reply(unique, error=errno.EINTR))

    # -- to the library, and back -----------------------------------------------------------------

    def _forward(self, request: Request, frame: Frame) -> None:
        unique = request.unique
        if self._library_dead:
            if request.opcode not in UNANSWERED:
                self._write(build_reply(unique, error=errno.EIO))
            return
        cost = 0
        if request.opcode not in UNANSWERED:
            cost = Downstream.cost_of(_reply_size(request))
            self._forwarded[unique] = _Forwarded(request, cost)
        try:
            self.downstream.submit(unique, frame, cost)
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
            try:
                self._answered(view[:size])
            except Exception:
                log.exception("a frame of the filesystem library was dropped")
            handled += 1
            if handled >= _BURST:
                handled = 0
                await trio.lowlevel.checkpoint()

    def _answered(self, frame: Frame) -> None:
        header = decode_reply_header(frame)
        if header is None:
            log.error("the filesystem library sent %d bytes that are no frame", len(frame))
            if len(frame) < OUT_SIZE:
                return
            unique, error = OUT_HEADER.unpack_from(frame)[2], -errno.EIO
            frame = build_reply(unique, error=errno.EIO) if unique else frame
        else:
            unique, error = header
        if not unique:
            if header is not None:
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
            self._opened(request, frame)
        else:
            self._write(frame)

    def _notify(self, code: int, frame: Frame) -> None:
        if code == NotifyCode.POLL:
            self._write(frame)  # waits for nothing, and should be quick
        else:
            self.notifier.send(bytes(frame))

    def _initialised(self, request: InitRequest, frame: Frame) -> None:
        try:
            reply, self.connection = amend_init_reply(frame, request)
        except OSError as exc:
            self._failure = exc
            self._write(build_reply(request.unique, error=errno.EPROTO))
            self.stop()
            return
        self._write(reply)
        self.ready.set()

    # -- files that have been opened --------------------------------------------------------------

    def _opened(self, request: OpenRequest, frame: Frame) -> None:
        offset = OUT_SIZE + (ENTRY_OUT_SIZE if request.create else 0)
        if len(frame) != offset + OPEN_OUT.size:
            log.error("%s answered with %d bytes", request.opcode.name, len(frame))
            self._write(build_reply(request.unique, error=errno.EIO))
            return
        fh = OPEN_OUT.unpack_from(frame, offset)[0]
        nodeid = request.nodeid
        if request.create:
            nodeid = int.from_bytes(frame[OUT_SIZE : OUT_SIZE + 8], "little")
        opened = OpenedFile(
            nodeid, fh, request.flags, request.pid, request.uid, request.gid, request.create
        )
        reply = bytearray(frame)
        refuse = partial(self._refuse_open, opened)
        try:
            plan = self._handlers.opened(opened)
            if plan is None or isinstance(plan, OpenPlan):
                self._finish_open(opened, reply, request, plan)
            else:
                self._start(request, plan, partial(self._finish_open, opened, reply), refuse)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            refuse(request, self._errno(exc, request))

    def _finish_open(
        self, opened: OpenedFile, reply: bytearray, _request: OpenRequest, plan: object
    ) -> None:
        """Amend the library's reply as planned, and let the opener go on.

        Raises OSError if the file cannot be given its backing file.
        """
        if plan is not None:
            if not isinstance(plan, OpenPlan):
                raise TypeError(f"opened() returned {plan!r}")
            flags = OpenReplyFlag.DIRECT_IO if plan.direct_io else OpenReplyFlag(0)
            flags |= OpenReplyFlag.STREAM if plan.stream else 0
            flags |= OpenReplyFlag.NOFLUSH if plan.noflush else 0
            backing_id = 0
            if plan.backing_fd is not None:
                if self.connection is None or not self.connection.passthrough:
                    raise OSError(errno.EOPNOTSUPP, "the kernel offers no FUSE passthrough")
                flags |= OpenReplyFlag.PASSTHROUGH
                backing_id = self.backing.acquire(opened.nodeid, opened.fh, plan.backing_fd)
            OPEN_OUT.pack_into(reply, len(reply) - OPEN_OUT.size, opened.fh, flags, backing_id)
        if not self._write(reply):
            self.backing.release(opened.nodeid, opened.fh)
            self._close_in_library(opened)

    def _refuse_open(self, opened: OpenedFile, request: Request, code: int) -> None:
        self._refuse(request, code)
        self._close_in_library(opened)

    def _close_in_library(self, opened: OpenedFile) -> None:
        # The kernel sends no RELEASE for an open that failed, and no FORGET for a failed create:
        # tell the library what it must know ourselves, and keep its reply.
        body = RELEASE_IN.pack(opened.fh, opened.flags & 0xFFFF_FFFF, 0, 0)
        self._tell(Opcode.RELEASE, opened, body)
        if opened.created:
            self._tell(Opcode.FORGET, opened, FORGET_IN.pack(1))

    def _tell(self, opcode: Opcode, opened: OpenedFile, body: bytes) -> None:
        if self._library_dead:
            return
        self._next_own += 2
        unique = self._next_own
        frame = build_request(opcode, unique, opened.nodeid, body, uid=opened.uid, gid=opened.gid)
        self._forward(decode_request(frame), frame)
        if entry := self._forwarded.get(unique):
            entry.settled = True

    # -- answers ----------------------------------------------------------------------------------

    def _start(
        self,
        request: Any,
        answer: object,
        finish: Callable[[Any, Any], None],
        refuse: Callable[[Any, int], None] | None = None,
    ) -> None:
        """Answer ``request`` in a task, when ``answer`` has come to a value."""
        if not isinstance(answer, Awaitable):
            raise TypeError(f"the handler of {request.opcode.name} returned {answer!r}")
        scope = self._tasks[request.unique] = trio.CancelScope()
        refuse = refuse or self._refuse
        self._nursery.start_soon(self._answer_later, request, answer, scope, finish, refuse)

    async def _answer_later(
        self,
        request: Any,
        answer: Awaitable[object],
        scope: trio.CancelScope,
        finish: Callable[[Any, Any], None],
        refuse: Callable[[Any, int], None],
    ) -> None:
        code = errno.EINTR
        try:
            try:
                with scope:
                    value = await answer
                    code = 0
            except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
                code = self._errno(exc, request)
        except BaseException:
            # The router ends: not a signal to the caller, so not EINTR.
            self._refuse(request, errno.ECONNABORTED)
            raise
        finally:
            del self._tasks[request.unique]
        if not code:
            try:
                finish(request, value)
            except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
                code = self._errno(exc, request)
        if code:
            refuse(request, code)

    def _finish_ioctl(self, request: IoctlRequest, value: object) -> None:
        if not isinstance(value, IoctlReply):
            raise TypeError(f"the handler of IOCTL returned {value!r}")
        self._write(build_ioctl_reply(request, value.result, value.data))

    def _finish_fallocate(self, request: FallocateRequest, value: object) -> None:
        if value is not None:
            raise TypeError(f"the handler of FALLOCATE returned {value!r}")
        self._write(build_reply(request.unique))

    def _finish_read(self, request: ReadRequest, value: object) -> None:
        if not isinstance(value, bytes):
            raise TypeError(f"the handler of READ returned {value!r}")
        if len(value) > request.size:
            raise ValueError(f"the handler of READ returned {len(value)} of {request.size} bytes")
        self._write(build_reply(request.unique, value))

    def _finish_write(self, request: WriteRequest, value: object) -> None:
        if not isinstance(value, int) or not 0 <= value <= len(request.data):
            raise TypeError(f"the handler of WRITE returned {value!r}")
        self._write(build_reply(request.unique, WRITE_OUT.pack(value, 0)))

    def _refuse(self, request: Request, code: int) -> None:
        self._write(build_reply(request.unique, error=code))

    def _errno(self, exc: BaseException, request: Request) -> int:
        """The service's errno for a handler's exception. Never fails."""
        try:
            code = self._handlers.errno_of(exc, _describe(request))
        except Exception:
            log.exception("errno_of failed for %r", exc)
            return errno.EIO
        if 0 < code <= MAX_ERRNO:
            return code
        log.error("errno_of returned %r for %r", code, exc)
        return errno.EIO

    def _write(self, frame: Frame) -> bool:
        """Whether the kernel took the frame.

        If it finds fault with a reply, it gets EIO instead: without any reply the caller would
        wait for ever.
        """
        try:
            os.write(self.device, frame)
        except OSError as exc:
            _length, code, unique = OUT_HEADER.unpack_from(frame)
            if exc.errno == errno.ENOENT or exc.errno in _GONE:
                return False  # nobody waits any more
            log.error("the kernel refused a reply (%d, %d bytes): %s", unique, len(frame), exc)
            if unique and code != -errno.EIO:
                self._write(build_reply(unique, error=errno.EIO))
            return False
        return True


def _reply_size(request: Request) -> int:
    """The most bytes that the library's reply to ``request`` may have."""
    if isinstance(request, OtherRequest):
        return request.reply_size
    if isinstance(request, ReadRequest):
        return request.size
    return SMALL_REPLY


def _describe(request: Request) -> str:
    """What was being done, for the log."""
    if isinstance(request, IoctlRequest):
        return f"ioctl {request.cmd:#x} on node {request.nodeid} by pid {request.pid}"
    if isinstance(request, FallocateRequest | ReadRequest | WriteRequest | OpenRequest):
        return f"{request.opcode.name} on node {request.nodeid} by pid {request.pid}"
    return request.opcode.name
