"""One userfaultfd: a typed layer over the kernel's calls, worked from outside the process.

For: catching accesses to a client's memory and answering them. The descriptor was made by the
client (:func:`make`, in a borrowed thread) and acts on the client's address space, whoever uses it.

Promises: every call has one of a closed set of outcomes (:class:`Outcome`), or raises OSError for
what is none of them. Reading and waking never wait for anything; every other call waits for the
client's mmap_lock, so it belongs into a thread of its own.

Leaves out: which access is allowed (``region/watch.py``), serving many of them (``faults.py``).

Source: userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import time
from enum import Enum, IntFlag
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from msharefs.clients.arch import Number
from msharefs.clients.identity import duplicate_descriptor

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

PAGE: Final = 4096

UFFD_USER_MODE_ONLY: Final = 1
USERFAULTFD_IOC_NEW: Final = 0xAA00
DEVICE: Final = b"/dev/userfaultfd\0"

_API: Final = 0xC018AA3F
_REGISTER: Final = 0xC020AA00
_UNREGISTER: Final = 0x8010AA01
_WAKE: Final = 0x8010AA02
_COPY: Final = 0xC028AA03
_WRITEPROTECT: Final = 0xC018AA06
_CONTINUE: Final = 0xC020AA07
_POISON: Final = 0xC020AA08

_API_VERSION: Final = 0xAA
_RANGE: Final = struct.Struct("=QQ")
_THREE: Final = struct.Struct("=QQQ")
_FOUR: Final = struct.Struct("=QQQQ")
_FIVE: Final = struct.Struct("=QQQQQ")

_MESSAGE: Final = struct.Struct("=B7xQQQ")
MESSAGE_SIZE: Final = _MESSAGE.size
BATCH: Final = 64
"""Messages taken by one read."""

_PAGEFAULT: Final = 0x12
_FORK: Final = 0x13
_REMAP: Final = 0x14
_REMOVE: Final = 0x15
_UNMAP: Final = 0x16

_FAULT_WRITE: Final = 1
_FAULT_WP: Final = 2
_FAULT_MINOR: Final = 4

_NOWHERE: Final = 1 << 16
"""An address that no program maps (vm.mmap_min_addr): for asking whether the memory is there."""


RETRY_PAUSE: Final = 0.000_2
"""Seconds. How long a thread leaves an address space alone that was just changing."""


class Feature(IntFlag):
    """What UFFDIO_API negotiates."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    THREAD_ID = 1 << 8
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    POISON = 1 << 14
    WP_ASYNC = 1 << 15


NEEDED: Final = (
    Feature.PAGEFAULT_FLAG_WP
    | Feature.EVENT_FORK
    | Feature.EVENT_REMAP
    | Feature.EVENT_UNMAP
    | Feature.MISSING_SHMEM
    | Feature.MINOR_SHMEM
    | Feature.THREAD_ID
    | Feature.EXACT_ADDRESS
    | Feature.WP_HUGETLBFS_SHMEM
)
"""EVENT_REMOVE is not among them: madvise(MADV_DONTNEED) takes nothing away from a shared mapping
(write protection stays as a marker), and would wait for us to read of it."""


class Mode(IntFlag):
    """What is caught in a registered range."""

    MISSING = 1
    WP = 2
    MINOR = 4


class Outcome(Enum):
    """How a call ended."""

    SERVED = "served"
    RETRY = "retry"
    """EAGAIN: the address space is changing this moment (a fork, a move): again, a little later."""
    GONE = "gone"
    """ESRCH: the address space has ended."""
    UNMAPPED = "unmapped"
    """ENOENT: nothing that is watched lies there (any more)."""
    THERE = "there"
    """EEXIST: the page is there already, so a fault of it needs waking only."""
    ABSENT = "absent"
    """EFAULT of CONTINUE: the object has no page there."""
    REFUSED = "refused"
    """EPERM, EINVAL, EBUSY: memory of a kind that cannot be watched, a file that was opened for
    reading only, or memory that is watched by somebody else."""


_OUTCOMES: Final = {
    errno.EAGAIN: Outcome.RETRY,
    errno.ESRCH: Outcome.GONE,
    errno.ENOENT: Outcome.UNMAPPED,
    errno.EEXIST: Outcome.THERE,
}


class Closable(Protocol):
    """Whoever has the descriptor, and may have let go of it."""

    closed: bool


def patiently(holder: Closable, call: Callable[[], Outcome]) -> Outcome:
    """Again while the address space is changing, which ends as soon as the loop has read of it."""
    while True:
        outcome = call()
        if outcome is not Outcome.RETRY or holder.closed:
            return outcome
        time.sleep(RETRY_PAUSE)


def outcome_of(error: OSError, *, refusable: bool) -> Outcome:
    """What a call's failure means; raises it if it is none of those. ``refusable``: (un)register."""
    code = error.errno or 0
    if code in _OUTCOMES:
        return _OUTCOMES[code]
    if refusable and code in {errno.EPERM, errno.EINVAL, errno.EBUSY}:
        return Outcome.REFUSED
    raise error


# -- messages


@attrs.frozen
class PageFault:
    """A thread waits for an access to be let go. ``address`` is exact."""

    address: int
    tid: int
    write: bool
    protected: bool
    """The page is there and write-protected. Otherwise it is not mapped: in the object
    (``minor``) or nowhere."""
    minor: bool


@attrs.frozen
class Forked:
    """The child has a userfaultfd of its own, which watches what the parent's did: ours to close.

    fork() waits until this has been read; the child has not run yet.
    """

    fd: int


@attrs.frozen
class Moved:
    """mremap(2) moved ``length`` bytes. The caller waits until this has been read."""

    old: int
    new: int
    length: int


@attrs.frozen
class Unmapped:
    """munmap(2). The caller waits until this has been read."""

    start: int
    end: int


Message = PageFault | Forked | Moved | Unmapped


def decode(data: bytes) -> list[Message]:
    """The messages of one read, in order."""
    found: list[Message] = []
    for event, first, second, third in _MESSAGE.iter_unpack(data):
        if event == _PAGEFAULT:
            found.append(
                PageFault(
                    second,
                    third & 0xFFFFFFFF,
                    bool(first & _FAULT_WRITE),
                    bool(first & _FAULT_WP),
                    bool(first & _FAULT_MINOR),
                )
            )
        elif event == _FORK:
            found.append(Forked(first & 0xFFFFFFFF))
        elif event == _REMAP:
            found.append(Moved(first, second, third))
        elif event == _UNMAP:
            found.append(Unmapped(first, second))
        elif event != _REMOVE:
            raise ValueError(f"userfaultfd event {event:#x}")
    return found


class UserfaultUnavailable(Exception):
    """The process cannot make a userfaultfd, or the kernel's lacks something we need."""


@attrs.define(eq=False)
class Userfault:
    """Owns the descriptor ``fd``, to its own end. ``user_mode_only``: accesses inside system calls get EFAULT.

    Ranges are page-aligned, in bytes, addresses are the client's.
    """

    fd: int
    user_mode_only: bool

    @classmethod
    def negotiate(cls, fd: int, *, user_mode_only: bool, features: Feature = NEEDED) -> Userfault:
        """Take over a descriptor that was just made. Raises UserfaultUnavailable, closes it then.

        Needs CAP_SYS_PTRACE (EVENT_FORK).
        """
        buffer = bytearray(_THREE.pack(_API_VERSION, int(features), 0))
        try:
            fcntl.ioctl(fd, _API, buffer)
        except OSError as error:
            os.close(fd)
            raise UserfaultUnavailable(f"UFFDIO_API: {error.strerror}") from error
        return cls(fd, user_mode_only)

    def close(self) -> None:
        """What was watched is watched no more, and whoever waits goes on."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        """One whose client was killed before it could be handed on belongs to nobody."""
        self.close()

    # -- never waiting

    def read(self) -> list[Message]:
        """What is there now; empty if nothing is. Raises OSError."""
        try:
            return decode(os.read(self.fd, MESSAGE_SIZE * BATCH))
        except BlockingIOError:
            return []

    def wake(self, address: int, size: int) -> None:
        """Whoever waits for an access there tries it again."""
        fcntl.ioctl(self.fd, _WAKE, _RANGE.pack(address, size))

    # -- waiting for the client's mmap_lock

    def register(self, address: int, size: int, mode: int) -> Outcome:
        """Begin to watch (:class:`Mode`); a mode that was set before is replaced."""
        return self._call(_REGISTER, _FOUR.pack(address, size, mode, 0), refusable=True)

    def unregister(self, address: int, size: int) -> Outcome:
        """Stop to watch: protection of pages is lifted, waiters go on."""
        return self._call(_UNREGISTER, _RANGE.pack(address, size), refusable=True)

    def protect(self, address: int, size: int) -> Outcome:
        """The next store to each page faults, whether the page is there yet or not."""
        return self._call(_WRITEPROTECT, _THREE.pack(address, size, 1))

    def unprotect(self, address: int, size: int) -> Outcome:
        """Stores go on, and whoever waits with one."""
        return self._call(_WRITEPROTECT, _THREE.pack(address, size, 0))

    def resume(self, address: int, size: int, *, protected: bool) -> Outcome:
        """Map pages that the object has (after a minor fault). ABSENT if it has none there."""
        data = _FOUR.pack(address, size, 2 if protected else 0, 0)
        try:
            return self._call(_CONTINUE, data)
        except OSError as error:
            if error.errno == errno.EFAULT:
                return Outcome.ABSENT
            raise

    def zero(self, address: int, *, protected: bool) -> Outcome:
        """Put a page of zeroes where the object has none (after a missing fault)."""
        data = _FIVE.pack(address, _ZEROES_AT, PAGE, 2 if protected else 0, 0)
        return self._call(_COPY, data)

    @property
    def alive(self) -> bool:
        """Whether the address space is still there."""
        return self._call(_WRITEPROTECT, _THREE.pack(_NOWHERE, PAGE, 0), dead=True) is Outcome.THERE

    def _call(
        self, number: int, data: bytes, *, refusable: bool = False, dead: bool = False
    ) -> Outcome:
        try:
            fcntl.ioctl(self.fd, number, bytearray(data))
        except OSError as error:
            if dead and error.errno != errno.ESRCH:
                return Outcome.THERE
            if refusable and error.errno == errno.ENOMEM and not self.alive:
                return Outcome.GONE  # (un)registering says so of an address space that has ended
            return outcome_of(error, refusable=refusable)
        return Outcome.THERE if dead else Outcome.SERVED


_ZEROES: Final = ctypes.create_string_buffer(2 * PAGE)
_ZEROES_AT: Final = (ctypes.addressof(_ZEROES) + PAGE - 1) & ~(PAGE - 1)


# -- making one


class Borrowed(Protocol):
    """A thread of the client that makes system calls for us (``borrow.py``)."""

    @property
    def tid(self) -> int: ...

    def call(self, number: int, *arguments: int) -> Generator[Any, Any, int]:
        """The call's result; negative errno if it failed."""

    def push(self, data: bytes) -> Generator[Any, Any, int]:
        """Put ``data`` where the thread can read it; its address."""


def make(thread: Borrowed) -> Generator[Any, Any, list[Userfault]]:
    """Have the client make userfaultfds and take them. Raises UserfaultUnavailable, OSError.

    The first is for user mode only: accesses inside system calls get EFAULT at once. The second
    catches those as well. It takes a privileged client (CAP_SYS_PTRACE, or the sysctl
    vm.unprivileged_userfaultfd = 1) or one that may open /dev/userfaultfd, and is missing else.
    """
    made: list[Userfault] = []
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        theirs = yield from thread.call(Number.USERFAULTFD, flags | UFFD_USER_MODE_ONLY)
        made.append((yield from _take(thread, theirs, user_mode_only=True)))
        theirs = yield from thread.call(Number.USERFAULTFD, flags)
        if theirs == -errno.EPERM:
            theirs = yield from _by_device(thread, flags)
        if theirs != -errno.EPERM:
            made.append((yield from _take(thread, theirs, user_mode_only=False)))
    except BaseException:
        for userfault in made:
            userfault.close()
        raise
    return made


def _take(thread: Borrowed, theirs: int, *, user_mode_only: bool) -> Generator[Any, Any, Userfault]:
    if theirs < 0:
        raise UserfaultUnavailable(f"userfaultfd: {os.strerror(-theirs)}")
    try:
        ours = duplicate_descriptor(thread.tid, theirs)
        made = Userfault.negotiate(ours, user_mode_only=user_mode_only)
    finally:
        yield from thread.call(Number.CLOSE, theirs)
    return made


def _by_device(thread: Borrowed, flags: int) -> Generator[Any, Any, int]:
    path = yield from thread.push(DEVICE)
    device = yield from thread.call(Number.OPEN, path, os.O_RDWR | os.O_CLOEXEC)
    if device < 0:
        return -errno.EPERM
    made = yield from thread.call(Number.IOCTL, device, USERFAULTFD_IOC_NEW, flags)
    yield from thread.call(Number.CLOSE, device)
    return made if made >= 0 else -errno.EPERM
