"""Files that the library has just opened, before their openers know: what becomes of them.

The library's reply to OPEN or CREATE is amended as the service plans (`OpenPlan`). If that fails,
the open fails, and the library is told to close the file again: the kernel, which knows of no open
file, would not.
"""

from __future__ import annotations

import errno
import logging
from functools import partial
from typing import TYPE_CHECKING, Protocol

from .handlers import OpenedFile, OpenedResult, OpenPlan
from .wire import (
    ENTRY_OUT_SIZE,
    FORGET_IN,
    OPEN_OUT,
    OUT_SIZE,
    RELEASE_IN,
    Frame,
    Opcode,
    OpenReplyFlag,
    OpenRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .answers import Answers
    from .passthrough import BackingTable

log = logging.getLogger(__name__)


class Library(Protocol):
    """What `Opening` needs of the router."""

    @property
    def passthrough(self) -> bool:
        """The kernel has agreed to passthrough."""

    def tell(self, opcode: Opcode, nodeid: int, body: bytes) -> None:
        """Send the library a request of our own, whose reply matters to nobody."""


class Opening:
    """Amends the replies to OPEN and CREATE of one connection."""

    def __init__(
        self,
        opened: Callable[[OpenedFile], OpenedResult],
        answers: Answers,
        backing: BackingTable,
        library: Library,
    ) -> None:
        self._opened = opened
        self._answers = answers
        self._backing = backing
        self._library = library

    def replied(self, request: OpenRequest, frame: Frame) -> None:
        """``frame`` is the library's reply to ``request``, and a success."""
        offset = OUT_SIZE + (ENTRY_OUT_SIZE if request.create else 0)
        if len(frame) != offset + OPEN_OUT.size:
            log.error("%s answered with %d bytes", request.opcode.name, len(frame))
            self._answers.refuse(request, errno.EIO)
            return
        nodeid = request.nodeid
        if request.create:  # the node is the new one, first field of the entry
            nodeid = int.from_bytes(frame[OUT_SIZE : OUT_SIZE + 8], "little")
        opened = OpenedFile(
            nodeid=nodeid,
            fh=OPEN_OUT.unpack_from(frame, offset)[0],
            flags=request.flags,
            pid=request.pid,
            uid=request.uid,
            gid=request.gid,
            created=request.create,
        )
        finish = partial(self._finish, opened, bytearray(frame))
        refuse = partial(self._refuse, opened)
        try:
            plan = self._opened(opened)
            if plan is None or isinstance(plan, OpenPlan):
                finish(request, plan)
            else:
                self._answers.start(request, plan, finish, refuse)
        except Exception as exc:  # noqa: BLE001 - errno_of is the boundary
            refuse(request, self._answers.errno_of(exc, request))

    def _finish(
        self, opened: OpenedFile, reply: bytearray, request: OpenRequest, plan: object
    ) -> None:
        """Let the opener go on, or refuse it with the kernel's errno where it passes nothing through."""
        if plan is not None:
            if not isinstance(plan, OpenPlan):
                raise TypeError(f"opened() returned {plan!r}")
            flags = OpenReplyFlag.DIRECT_IO if plan.direct_io else OpenReplyFlag(0)
            flags |= OpenReplyFlag.STREAM if plan.stream else 0
            flags |= OpenReplyFlag.NOFLUSH if plan.noflush else 0
            flags |= OpenReplyFlag.PARALLEL_DIRECT_WRITES if plan.parallel else 0
            backing_id = 0
            if plan.backing_fd is not None:
                if not self._library.passthrough:
                    raise OSError(errno.EOPNOTSUPP, "the kernel offers no FUSE passthrough")
                flags |= OpenReplyFlag.PASSTHROUGH
                try:
                    backing_id = self._backing.acquire(opened.nodeid, opened.fh, plan.backing_fd)
                except OSError as error:  # ELOOP: too many filesystems are stacked below
                    log.info("a file cannot be passed through: %s", error)
                    self._refuse(opened, request, error.errno or errno.EIO)
                    return
            OPEN_OUT.pack_into(reply, len(reply) - OPEN_OUT.size, opened.fh, flags, backing_id)
        if not self._answers.write(reply):
            self._backing.release(opened.nodeid, opened.fh)
            self._close(opened)

    def _refuse(self, opened: OpenedFile, request: OpenRequest, code: int) -> None:
        self._answers.refuse(request, code)
        self._close(opened)

    def _close(self, opened: OpenedFile) -> None:
        body = RELEASE_IN.pack(opened.fh, opened.flags, 0, 0)
        self._library.tell(Opcode.RELEASE, opened.nodeid, body)
        if opened.created:
            # The kernel never heard of the new node either: what CREATE counted is undone.
            self._library.tell(Opcode.FORGET, opened.nodeid, FORGET_IN.pack(1))
