"""The opcodes that the handlers answer: ioctl, fallocate, fsync, read, write, getxattr, lseek, copy.

A handler's value is checked for what the kernel would take, and answered; a value that is still to
come is left to a task (`Answers.start`).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING, Any

from .handlers import FORWARD, Handlers, IoctlReply
from .wire import (
    GETXATTR_OUT,
    LSEEK_OUT,
    NOTIFY_POLL,
    POLL_OUT,
    WRITE_OUT,
    CopyRequest,
    FallocateRequest,
    Frame,
    FsyncRequest,
    GetxattrRequest,
    IoctlRequest,
    NotifyCode,
    PollRequest,
    ReadRequest,
    SeekRequest,
    WriteRequest,
    build_ioctl_reply,
    build_notification,
    build_reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .answers import Answers


class Served:
    """Answers requests by the handlers; ``forward`` takes those that a handler does not want."""

    def __init__(
        self, handlers: Handlers, answers: Answers, forward: Callable[[Any, Frame], None]
    ) -> None:
        self._handlers = handlers
        self._answers = answers
        self._forward = forward

    def ioctl(self, request: IoctlRequest, _frame: Frame) -> None:
        try:
            value = self._handlers.ioctl(request)
            if isinstance(value, IoctlReply):
                self._finish_ioctl(request, value)
            else:
                self._answers.start(request, value, self._finish_ioctl)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))

    def fallocate(self, request: FallocateRequest, _frame: Frame) -> None:
        try:
            value = self._handlers.fallocate(request)
            if value is None:
                self._finish_fallocate(request, value)
            else:
                self._answers.start(request, value, self._finish_fallocate)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))

    def fsync(self, request: FsyncRequest, frame: Frame) -> None:
        try:
            value = self._handlers.fsync(request)
            if value is FORWARD:
                self._forward(request, frame)
            elif value is None:
                self._finish_fsync(request, value)
            else:
                self._answers.start(request, value, self._finish_fsync)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))

    def read(self, request: ReadRequest, frame: Frame) -> None:
        try:
            value = self._handlers.read(request)
            if value is FORWARD:
                self._forward(request, frame)
            elif isinstance(value, bytes):
                self._finish_read(request, value)
            elif isinstance(value, Awaitable):
                self._answers.start(request, value, self._finish_read)
            else:
                self._answers.wait_for(request, value, self._finish_read)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))

    def write(self, request: WriteRequest, frame: Frame) -> None:
        try:
            value = self._handlers.write(request)
            if value is FORWARD:
                self._forward(request, frame)
            elif isinstance(value, int):
                self._finish_write(request, value)
            else:
                self._answers.start(request, value, self._finish_write)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))

    def getxattr(self, request: GetxattrRequest, frame: Frame) -> None:
        try:
            value = self._handlers.getxattr(request)
            if value is FORWARD:
                self._forward(request, frame)
            elif isinstance(value, bytes):
                self._finish_getxattr(request, value)
            else:
                self._answers.start(request, value, self._finish_getxattr)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))

    def poll(self, request: PollRequest, frame: Frame) -> None:
        wake = None if request.waiter is None else partial(self._wake, request.waiter)
        try:
            value = self._handlers.poll(request, wake)
            if value is FORWARD:
                self._forward(request, frame)
            else:
                self._finish_poll(request, value)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))

    def _wake(self, waiter: int) -> None:
        # It waits for no lock that a request could hold.
        self._answers.write(build_notification(NotifyCode.POLL, NOTIFY_POLL.pack(waiter)))

    def seek(self, request: SeekRequest, frame: Frame) -> None:
        try:
            value = self._handlers.seek(request)
            if value is FORWARD:
                self._forward(request, frame)
            elif isinstance(value, int):
                self._finish_seek(request, value)
            else:
                self._answers.start(request, value, self._finish_seek)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))

    def copy(self, request: CopyRequest, frame: Frame) -> None:
        try:
            value = self._handlers.copy(request)
            if value is FORWARD:
                self._forward(request, frame)
            elif isinstance(value, int):
                self._finish_copy(request, value)
            else:
                self._answers.start(request, value, self._finish_copy)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))

    # What a handler returns is checked here, whatever it has promised: the type checker does not
    # see what a task's value comes to, and one wrong reply would leave its caller waiting.

    def _finish_ioctl(self, request: IoctlRequest, value: object) -> None:
        if not isinstance(value, IoctlReply):
            raise TypeError(f"the handler of IOCTL returned {value!r}")
        self._answers.write(build_ioctl_reply(request, value.result, value.data))

    def _finish_fallocate(self, request: FallocateRequest, value: object) -> None:
        if value is not None:
            raise TypeError(f"the handler of FALLOCATE returned {value!r}")
        self._answers.write(build_reply(request.unique))

    def _finish_fsync(self, request: FsyncRequest, value: object) -> None:
        if value is not None:
            raise TypeError(f"the handler of FSYNC returned {value!r}")
        self._answers.write(build_reply(request.unique))

    def _finish_read(self, request: ReadRequest, value: object) -> None:
        if not isinstance(value, bytes):
            raise TypeError(f"the handler of READ returned {value!r}")
        if len(value) > request.size:
            raise ValueError(f"the handler of READ returned {len(value)} of {request.size} bytes")
        self._answers.write(build_reply(request.unique, value))

    def _finish_write(self, request: WriteRequest, value: object) -> None:
        if not isinstance(value, int):
            raise TypeError(f"the handler of WRITE returned {value!r}")
        if not 0 <= value <= len(request.data):
            raise ValueError(f"the handler of WRITE took {value} of {len(request.data)} bytes")
        self._answers.write(build_reply(request.unique, WRITE_OUT.pack(value, 0)))

    def _finish_getxattr(self, request: GetxattrRequest, value: object) -> None:
        if not isinstance(value, bytes):
            raise TypeError(f"the handler of GETXATTR returned {value!r}")
        if not request.size:
            self._answers.write(build_reply(request.unique, GETXATTR_OUT.pack(len(value), 0)))
        elif len(value) > request.size:
            self._answers.refuse(request, errno.ERANGE)
        else:
            self._answers.write(build_reply(request.unique, value))

    def _finish_poll(self, request: PollRequest, value: object) -> None:
        if not isinstance(value, int) or not 0 <= value < 1 << 16:
            raise TypeError(f"the handler of POLL returned {value!r}")
        self._answers.write(build_reply(request.unique, POLL_OUT.pack(value, 0)))

    def _finish_seek(self, request: SeekRequest, value: object) -> None:
        if not isinstance(value, int) or not 0 <= value < 1 << 63:
            raise TypeError(f"the handler of LSEEK returned {value!r}")
        self._answers.write(build_reply(request.unique, LSEEK_OUT.pack(value)))

    def _finish_copy(self, request: CopyRequest, value: object) -> None:
        if not isinstance(value, int):
            raise TypeError(f"the handler of COPY_FILE_RANGE returned {value!r}")
        if not 0 <= value <= min(request.length, 0xFFFF_FFFF):
            raise ValueError(f"COPY_FILE_RANGE copied {value} of {request.length} bytes")
        self._answers.write(build_reply(request.unique, WRITE_OUT.pack(value, 0)))
