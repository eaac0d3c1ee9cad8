"""Answers to the kernel: written at once, or by a task when a handler's value has come.

Promises: whatever a handler does, its request gets one reply that the kernel accepts; an exception
costs that one request, with the errno that the service's boundary gives it.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio

from .wire import (
    MAX_ERRNO,
    OUT_HEADER,
    CopyRequest,
    FallocateRequest,
    Frame,
    FsyncRequest,
    GetxattrRequest,
    IoctlRequest,
    OpenRequest,
    PollRequest,
    ReadRequest,
    Request,
    SeekRequest,
    WriteRequest,
    build_reply,
)

_SETS: Final = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
_TRACER: Final = "TracerPid"
_IGNORED_BY_DEFAULT: Final = sum(
    1 << number - 1 for number in (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)
)
_LOOK_AGAIN: Final = 0.005
"""Seconds between looks at a caller whose request was not given up for what interrupted it. The
kernel tells of the first interruption only, whatever comes then."""

if TYPE_CHECKING:
    from .handlers import Pending

log = logging.getLogger(__name__)

GONE: Final = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE})
"""Errors of the device that mean: the kernel has ended the connection."""

Finish: TypeAlias = Callable[[Any, Any], None]
"""(request, the handler's value): writes the reply. May raise as a handler may."""
Refuse: TypeAlias = Callable[[Any, int], None]
"""(request, errno): writes the reply."""


class Answers:
    """The replies of one connection.

    ``tasks``: the requests that a task is to answer; ``pending``: those that somebody else will.

    ``nursery`` must be set before the first `start`.
    """

    nursery: trio.Nursery

    def __init__(self, device: int, errno_of: Callable[[BaseException, str], int]) -> None:
        self._device = device
        self._errno_of = errno_of
        self.tasks: Final[dict[int, tuple[trio.CancelScope, Request]]] = {}
        self.pending: Final[dict[int, tuple[Pending, Request, Refuse]]] = {}

    def write(self, frame: Frame) -> bool:
        """Whether the kernel took the frame.

        If it finds fault with a reply, it gets EIO instead: without any reply the caller would
        wait for ever.
        """
        try:
            os.write(self._device, frame)
        except OSError as exc:
            _length, code, unique = OUT_HEADER.unpack_from(frame)
            if exc.errno == errno.ENOENT or exc.errno in GONE:
                return False  # nobody waits any more
            log.error("the kernel refused a reply (%d, %d bytes): %s", unique, len(frame), exc)
            if unique and code != -errno.EIO:
                self.write(build_reply(unique, error=errno.EIO))
            return False
        return True

    def refuse(self, request: Request, code: int) -> None:
        """Answer ``request`` with an errno."""
        self.write(build_reply(request.unique, error=code))

    def errno_of(self, exc: BaseException, request: Request) -> int:
        """The service's errno for what a handler has raised. Never fails."""
        try:
            code = self._errno_of(exc, _describe(request))
        except Exception:
            log.exception("errno_of failed for %r", exc)
            return errno.EIO
        if 0 < code <= MAX_ERRNO:
            return code
        log.error("errno_of returned %r for %r", code, exc)
        return errno.EIO

    def start(
        self, request: Any, answer: object, finish: Finish, refuse: Refuse | None = None
    ) -> None:
        """Answer ``request`` in a task: ``finish`` what ``answer`` comes to, or ``refuse``.

        Raises TypeError if ``answer`` cannot be awaited.
        """
        if not isinstance(answer, Awaitable):
            raise TypeError(f"the handler of {request.opcode.name} returned {answer!r}")
        scope = trio.CancelScope()
        self.tasks[request.unique] = scope, request
        self.nursery.start_soon(self._later, request, answer, scope, finish, refuse or self.refuse)

    def wait_for(
        self, request: Any, answer: Pending, finish: Finish, refuse: Refuse | None = None
    ) -> None:
        """Answer ``request`` from within what makes ``answer`` ready."""
        unique, refuse = request.unique, refuse or self.refuse

        def done(value: object) -> None:
            if self.pending.pop(unique, None) is None:
                return
            try:
                finish(request, value)
            except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
                refuse(request, self.errno_of(exc, request))

        self.pending[unique] = answer, request, refuse
        try:
            answer.start(done)
        except BaseException:
            self.pending.pop(unique, None)
            raise

    def holds(self, unique: int) -> bool:
        """Whether that request waits for its answer here."""
        return unique in self.tasks or unique in self.pending

    def abandon(self, code: int) -> None:
        """Answer all that is pending with an errno."""
        for unique in list(self.pending):
            self._give_up(unique, code)

    def _give_up(self, unique: int, code: int) -> None:
        answer, request, refuse = self.pending.pop(unique)
        answer.cancel()
        refuse(request, code)

    def interrupt(self, unique: int) -> bool:
        """A signal waits for the caller of request ``unique``. Whether it is being answered here."""
        request = self._request(unique)
        if request is None:
            return False
        if not self._yields(request):
            self.nursery.start_soon(self._look_again, request)
        return True

    def _request(self, unique: int) -> Request | None:
        if unique in self.pending:
            return self.pending[unique][1]
        return self.tasks[unique][1] if unique in self.tasks else None

    def _yields(self, request: Request) -> bool:
        """Give up a request that was interrupted, unless its caller is not to see that."""
        unique, cause = request.unique, _interruption(getattr(request, "pid", 0))
        if cause is _Interruption.IGNORED:
            return False
        if unique in self.pending:
            self._give_up(unique, errno.EINTR)
            return True
        # A stop by a tracer looks like a signal. An ioctl ends soon by itself, and its caller is not
        # to see that. But if the tracer is ours, somebody's change waits for that very thread, for
        # which it waits in turn; the tracer has it make the call again.
        if cause is _Interruption.STOP and isinstance(request, IoctlRequest):
            return False
        self.tasks[unique][0].cancel()
        return True

    async def _look_again(self, request: Request) -> None:
        """Until it is answered, or a signal comes that does something."""
        while True:
            await trio.sleep(_LOOK_AGAIN)
            if self._request(request.unique) is not request or self._yields(request):
                return

    async def _later(
        self,
        request: Any,
        answer: Awaitable[object],
        scope: trio.CancelScope,
        finish: Finish,
        refuse: Refuse,
    ) -> None:
        code = errno.EINTR
        try:
            try:
                with scope:
                    value = await answer
                    code = 0
            except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
                code = self.errno_of(exc, request)
        except BaseException:
            # The router ends: not a signal to the caller, so not EINTR.
            self.refuse(request, errno.ECONNABORTED)
            raise
        finally:
            del self.tasks[request.unique]
        if not code:
            try:
                finish(request, value)
            except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
                code = self.errno_of(exc, request)
        if code:
            refuse(request, code)


def _describe(request: Request) -> str:
    """What was being done, for the log."""
    if isinstance(request, IoctlRequest):
        return f"ioctl {request.cmd:#x} on node {request.nodeid} by pid {request.pid}"
    if isinstance(
        request,
        FallocateRequest
        | FsyncRequest
        | ReadRequest
        | WriteRequest
        | PollRequest
        | SeekRequest
        | CopyRequest
        | OpenRequest
        | GetxattrRequest,
    ):
        return f"{request.opcode.name} on node {request.nodeid} by pid {request.pid}"
    return request.opcode.name


class _Interruption(Enum):
    """Why the kernel says that a signal waits for a thread."""

    SIGNAL = "signal"
    """One does, or the thread has gone."""
    OURS = "ours"
    """This process traces it, and makes it call again if no signal takes it to a handler."""
    IGNORED = "ignored"
    """Only such as do nothing. They wait because a thread of the process is or was traced: the
    kernel drops them at once if not, and nobody's call is interrupted."""
    STOP = "stop"
    """None: somebody else's tracer stops it."""


def _interruption(tid: int) -> _Interruption:
    """Source: proc_pid_status(5), signal(7)."""
    try:
        status = Path(f"/proc/{tid}/status").read_text(errors="replace")
    except OSError:
        return _Interruption.SIGNAL
    sets = dict(
        line.split(":\t", 1) for line in status.splitlines() if line.startswith((_TRACER, *_SETS))
    )
    own, shared, blocked, ignored, caught = (int(sets[name], 16) for name in _SETS)
    tracer = int(sets[_TRACER])
    if tracer and Path(f"/proc/self/task/{tracer}").exists():
        return _Interruption.OURS
    waiting = (own | shared) & ~blocked
    if not waiting:
        return _Interruption.STOP
    ignored |= _IGNORED_BY_DEFAULT & ~caught
    return _Interruption.SIGNAL if waiting & ~ignored else _Interruption.IGNORED
