"""What the router asks of the service: the handlers, and the values they answer with.

Everything here is about files and frames. What a file means is the service's affair.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import attrs

if TYPE_CHECKING:
    from .attributes import Attributes
    from .wire import (
        CopyRequest,
        FallocateRequest,
        FsyncRequest,
        GetattrRequest,
        GetxattrRequest,
        IoctlRequest,
        NameRequest,
        OpenRequest,
        PollRequest,
        ReadRequest,
        SeekRequest,
        WriteRequest,
    )


class Forward(Enum):
    """The type of `FORWARD`."""

    FORWARD = "forward"

    def __repr__(self) -> str:
        return "FORWARD"


FORWARD: Final = Forward.FORWARD
"""Not mine: let the library behind the router answer this request."""


@attrs.frozen
class OpenedFile:
    """A file that the filesystem has just opened, before its opener knows.

    ``flags`` are open(2)'s; ``pid`` is the id of the opening thread, which waits for the reply
    (0 if it is not visible from here). ``created`` says that this open made the file.
    """

    nodeid: int
    fh: int
    flags: int
    pid: int
    uid: int
    gid: int
    created: bool = False


@attrs.frozen
class OpenPlan:
    """What becomes of a file that has just been opened.

    ``backing_fd``: open this file in passthrough mode, backed by that descriptor: mappings are
    mappings of it and never reach us. An inode has one backing file for as long as it is open
    anywhere; while it is, later opens of it get the same one, whatever descriptor they name, and
    must be in passthrough mode too (the kernel fails the open with EIO otherwise).
    ``direct_io``: read(2) and write(2) come to us, uncached.
    ``stream``: no file position at all (nor pread), so that a read that waits does not lock out a
    write on the same descriptor. Not with a backing file: the kernel refuses that.
    ``noflush``: send no FLUSH when a descriptor is closed.
    ``parallel``: with ``direct_io``, a write(2) that waits for us does not lock out the file's other
    writes. One that appends, or goes past the end, still does.
    """

    backing_fd: int | None = None
    direct_io: bool = True
    stream: bool = False
    noflush: bool = False
    parallel: bool = False

    def __attrs_post_init__(self) -> None:
        if self.stream and self.backing_fd is not None:
            raise ValueError("a file with a backing file cannot be a stream")


@attrs.frozen
class IoctlReply:
    """What ioctl(2) returns (>= 0, or a negative errno) and what is copied to its argument."""

    result: int = 0
    data: bytes = b""


class Pending(Protocol):
    """An answer that will be there some day, for a call that often waits and must be quick then.

    An awaitable gets a task, which runs a turn of the loop after it was woken; this is answered
    from within whatever makes it ready.
    """

    def start(self, done: Callable[[Any], None]) -> None:
        """Call ``done`` once with the answer; from within :meth:`start` if it is there."""

    def cancel(self) -> None:
        """Nobody waits any more: ``done`` is not to be called."""


OpenedResult: TypeAlias = OpenPlan | Awaitable[OpenPlan | None] | None


@attrs.frozen(kw_only=True)
class Handlers:
    """The service's side of the router.

    A handler that returns a value is answered at once, in the same tick of the loop. A read may
    also be `Pending`. One that returns an awaitable is answered by a task of its own, which a signal to the caller cancels:
    the caller gets EINTR, unless the handler finishes in spite of it (a shield). An exception of
    any kind becomes ``errno_of(exception, what was being done)`` for that one request.

    ``read``, ``write`` and ``copy`` (which return how many bytes they took), ``seek`` (the offset
    found), ``fsync`` and ``getxattr`` may leave a request to the filesystem: `FORWARD`. Of seek and copy
    pyfuse3 knows nothing, and one of them that is forwarded is the last that the kernel sends.
    ``getxattr`` returns the value, whatever the caller's buffer holds (ERANGE if that is too
    small). ``opened`` is asked about each file that the filesystem has opened;
    None leaves the filesystem's reply as it is. If it raises, the open fails with that errno and
    the filesystem is told to release the file (and, of a file just created, to forget one lookup;
    its name stays).

    ``poll`` returns the events of poll(2) that have happened. If it is given a function, somebody
    is about to wait for others: it is to be called once there are, from wherever that is found out.

    ``lookup``, ``getattr``, ``create`` (which returns the new node's attributes and the file's
    number), ``open`` (the number), ``unlink``, ``released`` and ``forget`` (pairs of a node and a
    number of references; no reply is due) are answered without a task, or left to the filesystem.
    The attributes that ``lookup`` and ``create`` return give the kernel a reference to the node.
    """

    ioctl: Callable[[IoctlRequest], IoctlReply | Awaitable[IoctlReply]]
    fallocate: Callable[[FallocateRequest], Awaitable[None] | None]
    read: Callable[[ReadRequest], bytes | Awaitable[bytes] | Pending | Forward]
    opened: Callable[[OpenedFile], OpenedResult]
    errno_of: Callable[[BaseException, str], int]
    write: Callable[[WriteRequest], int | Awaitable[int] | Forward] = lambda _request: FORWARD
    getxattr: Callable[[GetxattrRequest], bytes | Awaitable[bytes] | Forward] = lambda _request: (
        FORWARD
    )
    fsync: Callable[[FsyncRequest], Awaitable[None] | Forward | None] = lambda _request: FORWARD
    poll: Callable[[PollRequest, Callable[[], None] | None], int | Forward] = lambda *_: FORWARD
    seek: Callable[[SeekRequest], int | Awaitable[int] | Forward] = lambda _request: FORWARD
    copy: Callable[[CopyRequest], int | Awaitable[int] | Forward] = lambda _request: FORWARD
    lookup: Callable[[NameRequest], Attributes | Forward] = lambda _request: FORWARD
    getattr: Callable[[GetattrRequest], Attributes | Forward] = lambda _request: FORWARD
    create: Callable[[OpenRequest], tuple[Attributes, int] | Forward] = lambda _request: FORWARD
    open: Callable[[OpenRequest], int | Forward] = lambda _request: FORWARD
    unlink: Callable[[NameRequest], Forward | None] = lambda _request: FORWARD
    released: Callable[[int], Forward | None] = lambda _fh: FORWARD
    forget: Callable[[Sequence[tuple[int, int]]], Forward | None] = lambda _lookups: FORWARD
