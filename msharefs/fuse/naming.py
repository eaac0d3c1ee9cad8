"""Names, attributes, opening and closing, as far as the service answers them here.

For: the requests that a program's open(), fstat(), close() and unlink() are made of. They go to the
service's handlers in the tick of the loop in which they are read; the library behind us, to which
they would take a few times as long, gets those that the handlers leave to it, with `FORWARD`.

Leaves out: what becomes of a file that has been opened (`opening`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from .handlers import FORWARD
from .wire import (
    OPEN_OUT,
    ForgetRequest,
    Frame,
    GetattrRequest,
    NameRequest,
    Opcode,
    OpenRequest,
    ReleaseRequest,
    build_reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .answers import Answers
    from .handlers import Forward, Handlers
    from .opening import Opening
    from .wire import Request

log = logging.getLogger(__name__)

R = TypeVar("R", NameRequest, GetattrRequest, OpenRequest)


class Naming:
    """The routes of those requests. ``forward`` hands one to the library."""

    def __init__(
        self,
        handlers: Handlers,
        answers: Answers,
        opening: Opening,
        forward: Callable[[Request, Frame], None],
    ) -> None:
        self._handlers = handlers
        self._answers = answers
        self._opening = opening
        self._forward = forward

    def name(self, request: NameRequest, frame: Frame) -> None:
        """LOOKUP and UNLINK."""
        lookup = request.opcode is Opcode.LOOKUP
        self._answer(request, frame, self._lookup if lookup else self._unlink)

    def _lookup(self, request: NameRequest) -> Forward | None:
        found = self._handlers.lookup(request)
        if found is FORWARD:
            return FORWARD
        if not self._answers.write(build_reply(request.unique, found.as_entry())):
            self._handlers.forget([(found.ino, 1)])  # a reference that nobody has
        return None

    def _unlink(self, request: NameRequest) -> Forward | None:
        if self._handlers.unlink(request) is FORWARD:
            return FORWARD
        self._answers.write(build_reply(request.unique))
        return None

    def getattr(self, request: GetattrRequest, frame: Frame) -> None:
        self._answer(request, frame, self._getattr)

    def _getattr(self, request: GetattrRequest) -> Forward | None:
        found = self._handlers.getattr(request)
        if found is FORWARD:
            return FORWARD
        self._answers.write(build_reply(request.unique, found.as_reply()))
        return None

    def open(self, request: OpenRequest, frame: Frame) -> None:
        """OPEN and CREATE."""
        self._answer(request, frame, self._create if request.create else self._open)

    def _create(self, request: OpenRequest) -> Forward | None:
        made = self._handlers.create(request)
        if made is FORWARD:
            return FORWARD
        found, fh = made
        self._opened(request, fh, found.as_entry())
        return None

    def _open(self, request: OpenRequest) -> Forward | None:
        opened = self._handlers.open(request)
        if opened is FORWARD:
            return FORWARD
        self._opened(request, opened)
        return None

    def _opened(self, request: OpenRequest, fh: int, entry: bytes = b"") -> None:
        body = entry + OPEN_OUT.pack(fh, 0, 0)
        self._opening.replied(request, build_reply(request.unique, body))

    def _answer(self, request: R, frame: Frame, answer: Callable[[R], Forward | None]) -> None:
        """``answer`` answers the request, leaves it to the library, or raises what its caller gets."""
        try:
            left = answer(request)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))
            return
        if left is FORWARD:
            self._forward(request, frame)

    def release(self, request: ReleaseRequest, frame: Frame) -> None:
        try:
            if self._handlers.released(request.fh) is not FORWARD:
                self._answers.write(build_reply(request.unique))
                return
        except Exception:
            log.exception("the handler of RELEASE failed")
        self._forward(request, frame)

    def forget(self, request: ForgetRequest, frame: Frame) -> None:
        try:
            if self._handlers.forget(request.lookups) is not FORWARD:
                return
        except Exception:
            log.exception("the handler of FORGET failed")
            return
        self._forward(request, frame)
