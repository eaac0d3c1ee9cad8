"""Answers to the kernel: written at once, or by a task when a handler's value has come.

Promises: whatever a handler does, its request gets one reply that the kernel accepts; an exception
costs that one request, with the errno that the service's boundary gives it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import trio

from .wire import (
    MAX_ERRNO,
    OUT_HEADER,
    CopyRequest,
    FallocateRequest,
    Frame,
    GetxattrRequest,
    IoctlRequest,
    OpenRequest,
    ReadRequest,
    Request,
    SeekRequest,
    WriteRequest,
    build_reply,
)

log = logging.getLogger(__name__)

GONE: Final = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE})
"""Errors of the device that mean: the kernel has ended the connection."""

Finish: TypeAlias = Callable[[Any, Any], None]
"""(request, the handler's value): writes the reply. May raise as a handler may."""
Refuse: TypeAlias = Callable[[Any, int], None]
"""(request, errno): writes the reply."""


class Answers:
    """The replies of one connection. ``tasks``: the requests that a task is to answer.

    ``nursery`` must be set before the first `start`.
    """

    nursery: trio.Nursery

    def __init__(self, device: int, errno_of: Callable[[BaseException, str], int]) -> None:
        self._device = device
        self._errno_of = errno_of
        self.tasks: Final[dict[int, trio.CancelScope]] = {}

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
        scope = self.tasks[request.unique] = trio.CancelScope()
        self.nursery.start_soon(self._later, request, answer, scope, finish, refuse or self.refuse)

    def interrupt(self, unique: int) -> bool:
        """A signal waits for the caller of request ``unique``. Whether a task is answering it."""
        scope = self.tasks.get(unique)
        if scope is None:
            return False
        scope.cancel()
        return True

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
        | ReadRequest
        | WriteRequest
        | SeekRequest
        | CopyRequest
        | OpenRequest
        | GetxattrRequest,
    ):
        return f"{request.opcode.name} on node {request.nodeid} by pid {request.pid}"
    return request.opcode.name
