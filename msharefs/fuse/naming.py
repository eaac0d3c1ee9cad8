"""Names, attributes, opening and closing, as far as the service answers them here.

For: the requests that a program's open(), fstat(), close() and unlink() are made of. They go to the
service's handlers in the tick of the loop in which they are read; the library behind us, to which
they would take a few times as long, gets those that the handlers leave to it, with `FORWARD`.

Leaves out: what becomes of a file that has been opened (`opening`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

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
    from .attributes import Attributes
    from .handlers import Handlers
    from .opening import Opening
    from .wire import Request

log = logging.getLogger(__name__)


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
        try:
            if request.opcode is Opcode.LOOKUP:
                found = self._handlers.lookup(request)
                if found is not FORWARD:
                    self._found(request, found)
                    return
            elif self._handlers.unlink(request) is not FORWARD:
                self._answers.write(build_reply(request.unique))
                return
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))
            return
        self._forward(request, frame)

    def _found(self, request: NameRequest, found: Attributes) -> None:
        if not self._answers.write(build_reply(request.unique, found.as_entry())):
            self._handlers.forget([(found.ino, 1)])  # a reference that nobody has

    def getattr(self, request: GetattrRequest, frame: Frame) -> None:
        try:
            found = self._handlers.getattr(request)
            if found is not FORWARD:
                self._answers.write(build_reply(request.unique, found.as_reply()))
                return
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))
            return
        self._forward(request, frame)

    def open(self, request: OpenRequest, frame: Frame) -> None:
        """OPEN and CREATE."""
        try:
            if request.create:
                made = self._handlers.create(request)
                if made is not FORWARD:
                    found, fh = made
                    body = found.as_entry() + OPEN_OUT.pack(fh, 0, 0)
                    self._opening.replied(request, build_reply(request.unique, body))
                    return
            else:
                opened = self._handlers.open(request)
                if opened is not FORWARD:
                    body = OPEN_OUT.pack(opened, 0, 0)
                    self._opening.replied(request, build_reply(request.unique, body))
                    return
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            self._answers.refuse(request, self._answers.errno_of(exc, request))
            return
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
