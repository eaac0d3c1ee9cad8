"""Stores that the kernel notes by itself, page by page, and that somebody asks for now and then.

For: telling which pages of a mapping were stored to, where nobody needs to know of each store as it
happens. Works for a mapping of any file, also one on a disk, which no userfaultfd can catch stores
to; a store costs the kernel's handling of a protected page, once, and nobody waits for us.

How it goes: a client makes a userfaultfd with WP_ASYNC, which we take; a range is registered with
it and write-protected. The first store to a page takes the protection off, and the absence of it is
what a scan of /proc/PID/pagemap finds. To arm a range that is registered already is a scan that
protects again what it finds, in one step, so that no store between two looks is lost.

Forked children inherit all of it. The kernel gives us a descriptor of each, which only has to be
kept open: to look, and to arm again, takes the child's pagemap alone. Which descriptor is which
child's matters only to whom a range of it is to be noted no more, and is found out then.

Promises: a page that was stored to through the client's own page tables since it was armed is found
until it is armed again, though the file's page was written back, reclaimed or cut off meanwhile. A
client that holds its memory map keeps nobody else from being looked at.

Leaves out: who is told; what a client stored that ended, or unmapped the page, before it was looked
at; stores through mappings that are not the region's.

Source: userfaultfd(2), Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
import trio

from msharefs.clients.arch import Number
from msharefs.clients.gone import Gone
from msharefs.clients.identity import duplicate_descriptor
from msharefs.clients.kinship import owned_by, places_in
from msharefs.clients.lanes import Lane, Workers, result_of
from msharefs.clients.pagemap import NotNoted, scan
from msharefs.clients.userfault import (
    UFFD_USER_MODE_ONLY,
    Feature,
    Forked,
    Mode,
    Moved,
    Outcome,
    Unmapped,
    Userfault,
    UserfaultUnavailable,
    patiently,
)
from msharefs.region.errors import ClientStuck

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from msharefs.clients.pagemap import Range
    from msharefs.clients.space import AddressSpace
    from msharefs.clients.userfault import Borrowed

log = logging.getLogger(__name__)

T = TypeVar("T")

NOTING: Final = (
    Feature.PAGEFAULT_FLAG_WP
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.WP_ASYNC
    | Feature.EVENT_FORK
    | Feature.EVENT_REMAP
)
"""Without EVENT_FORK a child is not registered, without EVENT_REMAP what is moved is not any more."""

PATIENCE: Final = 1.0
"""Seconds after which a client that holds its memory map is left behind."""
BURIAL_PAUSE: Final = 2.0
"""Seconds between two looks at whether the owners of inherited descriptors have ended."""


def make(thread: Borrowed) -> Generator[Any, Any, Userfault]:
    """Have the client make a descriptor that notes stores, and take it.

    One for user mode only, which everybody may have, does: stores by system calls are noted too.
    Raises UserfaultUnavailable, OSError.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY
    theirs = yield from thread.call(Number.USERFAULTFD, flags)
    if theirs < 0:
        raise UserfaultUnavailable(f"userfaultfd: {os.strerror(-theirs)}")
    try:
        ours = duplicate_descriptor(thread.tid, theirs)
        made = Userfault.negotiate(ours, user_mode_only=True, features=NOTING)
    finally:
        yield from thread.call(Number.CLOSE, theirs)
    return made


@attrs.define(eq=False)
class Noted:
    """A client whose stores are noted; made by :meth:`Written.add`."""

    space: AddressSpace
    pagemap: int
    userfaults: list[Userfault] = attrs.field(factory=list)
    """Its own: that which it has made for ranges that were not noted yet, and what it inherited, as
    far as somebody had to know."""
    lane: Lane = attrs.field(factory=Lane)
    closed: bool = False
    looking: bool = False


@attrs.frozen
class Armed:
    """What came of arming ranges.

    ``written``: since they were armed before. ``lacking``: what needs a descriptor of the client's
    own, which it has not made yet.
    """

    written: list[Range]
    lacking: list[Range]


@attrs.frozen
class Found:
    """What was ``written``; not ``whole``: some of what was asked about is not noted."""

    written: list[Range]
    whole: bool


class Written:
    """All clients of a mount. Everything but :meth:`run` may be called before it runs."""

    def __init__(self, born: Callable[[], None] = lambda: None) -> None:
        """``born`` is told of each child that has inherited something."""
        self._born = born
        self._epoll = select.epoll()
        self._all: dict[int, Userfault] = {}
        self._inherited: dict[int, Lane] = {}
        """Descriptors of forked children, by number, each with a lane for what may block."""
        self._workers = Workers()
        self._closed = False

    def __len__(self) -> int:
        """How many descriptors there are."""
        return len(self._all)

    # -- life

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled: let those go on who fork or move memory, which waits until we know."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._bury)
            task_status.started()
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for fd, _ in self._epoll.poll(0):
                    self._hear(fd)

    def close(self) -> None:
        """Nothing is noted any more. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for fd, userfault in self._all.items():
            # A call for it may be under way: the number must not be somebody else's meanwhile.
            self._workers.submit(self._inherited.get(fd) or Lane(), userfault.close)
        self._all.clear()
        self._inherited.clear()
        self._workers.close()
        self._epoll.close()

    def add(self, space: AddressSpace) -> Noted:
        """Begin with a client. Raises Gone, OSError."""
        try:
            path = f"/proc/{space.pid}/task/{space.tid}/pagemap"
            pagemap = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise Gone(f"process {space.pid}") from None
        try:
            space.check()  # the number may be another's by now
        except BaseException:
            os.close(pagemap)
            raise
        return Noted(space, pagemap)

    def serve(self, noted: Noted, userfault: Userfault) -> None:
        """``userfault`` is the client's own, ours from now on."""
        if noted.closed or self._closed:
            userfault.close()
            return
        noted.userfaults.append(userfault)
        self._keep(userfault)

    def drop(self, noted: Noted) -> None:
        """The client has gone, or nothing of it is to be noted any more. Idempotent."""
        if noted.closed:
            return
        noted.closed = True
        for userfault in noted.userfaults:
            self._let_go(userfault.fd)
        self._workers.submit(noted.lane, partial(self._end, noted))

    @staticmethod
    def _end(noted: Noted) -> None:
        """In its lane, so that no call for it is under way."""
        os.close(noted.pagemap)
        for userfault in noted.userfaults:
            userfault.close()

    def _keep(self, userfault: Userfault) -> None:
        self._all[userfault.fd] = userfault
        self._epoll.register(userfault.fd, select.EPOLLIN)

    def _let_go(self, fd: int) -> None:
        if self._all.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _hear(self, fd: int) -> None:
        userfault = self._all.get(fd)
        if userfault is None:
            return
        try:
            messages = userfault.read()
        except (OSError, ValueError) as error:
            log.error("a descriptor that notes stores: %s", error)
            self._let_go(fd)
            return
        for message in messages:
            if isinstance(message, Forked):
                child = Userfault(message.fd, userfault.user_mode_only)
                self._inherited[child.fd] = Lane()
                self._keep(child)
                self._born()
            elif not isinstance(message, Moved | Unmapped):
                log.error("a descriptor that notes stores: %s", message)

    async def bury(self) -> None:
        """Close what was inherited by those who have ended; done every now and then."""
        for fd, lane in list(self._inherited.items()):
            userfault = self._all.get(fd)
            if userfault is None:  # somebody else has just buried it
                continue
            with trio.move_on_after(PATIENCE):
                alive = await result_of(self._workers, lane, partial(_alive, userfault))
                if not alive and fd in self._inherited:
                    self._let_go(fd)
                    del self._inherited[fd]
                    userfault.close()

    async def _bury(self) -> None:
        while True:
            await trio.sleep(BURIAL_PAUSE)
            await self.bury()

    # -- arming

    async def arm(self, noted: Noted, ranges: Sequence[Range]) -> Armed:
        """Note the stores to ``ranges`` from now on.

        Each has to lie in one mapping. Raises Gone; ClientStuck: it will be done, but nobody hears
        of what was written; OSError: a range cannot be registered.
        """
        return await self._waiting_for(noted, partial(self._arm, noted, ranges))

    def _arm(self, noted: Noted, ranges: Sequence[Range]) -> Armed:
        """In its lane."""
        armed = Armed([], [])
        for start, end in ranges:
            try:
                armed.written.extend(scan(noted.pagemap, start, end, rearm=True))
                continue
            except NotNoted:
                pass
            if not noted.userfaults:
                armed.lacking.append((start, end))
                continue
            for call in (
                partial(noted.userfaults[0].register, start, end - start, Mode.WP),
                partial(noted.userfaults[0].protect, start, end - start),
            ):
                outcome = patiently(noted, call)
                if outcome is Outcome.GONE:
                    raise Gone(f"process {noted.space.pid}")
                if outcome is Outcome.UNMAPPED:
                    break
                if outcome is not Outcome.SERVED:
                    raise OSError(errno.EBUSY, f"stores at {start:#x} cannot be noted")
        return armed

    async def release(self, noted: Noted, ranges: Sequence[Range]) -> list[Range]:
        """Note the stores to ``ranges`` no more; what was written of them. Raises as :meth:`arm`.

        Somebody else may register them then.
        """
        written = await self._waiting_for(noted, partial(self._release, noted, ranges))
        if self._inherited:
            still = await self._waiting_for(noted, partial(_still, noted, ranges))
            if still:
                await self._adopt(noted)
                written += await self._waiting_for(noted, partial(self._release, noted, ranges))
        return written

    def _release(self, noted: Noted, ranges: Sequence[Range]) -> list[Range]:
        """In its lane."""
        written: list[Range] = []
        for start, end in ranges:
            with suppress(NotNoted):
                written += scan(noted.pagemap, start, end, rearm=False)
            for userfault in noted.userfaults:
                patiently(noted, partial(userfault.unregister, start, end - start))
        return written

    async def _adopt(self, noted: Noted) -> None:
        """Find out which of the inherited descriptors are the client's, and make them its own."""
        for fd, lane in list(self._inherited.items()):
            userfault = self._all.get(fd)
            if userfault is None:
                continue
            with suppress(Gone, OSError), trio.move_on_after(PATIENCE):
                ask = partial(owned_by, userfault, noted.space, places_in(noted.space))
                if await result_of(self._workers, lane, ask) and self._inherited.pop(fd, None):
                    noted.userfaults.append(userfault)

    # -- looking

    async def look(
        self, work: Sequence[tuple[Noted, Callable[[], Iterable[Range]]]]
    ) -> list[Found | None]:
        """What each client has written in the ranges that its function, called in a thread, names.

        None: it has gone, or is stuck. Nothing is armed anew.
        """
        if not work:
            return []
        going = _Round(len(work))
        for index, (noted, ranges) in enumerate(work):
            put = partial(going.put, index)
            if noted.closed or noted.looking:  # as it was left behind before
                put(None)
                continue
            noted.looking = True
            self._workers.submit(noted.lane, partial(_look, noted, ranges, put))
        with trio.move_on_after(PATIENCE):
            await going.done.wait()
        return list(going.results)

    # -- lanes

    async def _waiting_for(self, noted: Noted, job: Callable[[], T]) -> T:
        try:
            with trio.fail_after(PATIENCE):
                return await result_of(self._workers, noted.lane, job)
        except trio.TooSlowError:
            raise ClientStuck(f"process {noted.space.pid} holds its memory map") from None


class _Round:
    """One look at many clients: what each thread has found, and when the last of them has."""

    def __init__(self, count: int) -> None:
        self.results: list[Found | None] = [None] * count
        self.done = trio.Event()
        self._missing = count
        self._lock = threading.Lock()
        self._token = trio.lowlevel.current_trio_token()

    def put(self, index: int, found: Found | None) -> None:
        """From any thread."""
        with self._lock:
            self.results[index] = found
            self._missing -= 1
            last = not self._missing
        if last:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self.done.set)


def _still(noted: Noted, ranges: Sequence[Range]) -> bool:
    """In its lane: whether some of them are noted, by a descriptor that we do not know."""
    for start, end in ranges:
        with suppress(NotNoted):
            scan(noted.pagemap, start, end, rearm=False)
            return True
    return False


def _look(
    noted: Noted,
    ranges: Callable[[], Iterable[Range]],
    put: Callable[[Found | None], None],
) -> None:
    """In the client's lane."""
    found: Found | None = None
    with suppress(Gone, OSError):
        written: list[Range] = []
        whole = True
        for start, end in ranges():
            try:
                written += scan(noted.pagemap, start, end, rearm=False)
            except NotNoted:
                whole = False
        found = Found(written, whole)
    noted.looking = False  # before anybody hears of it, who may ask again at once
    put(found)


def _alive(userfault: Userfault) -> bool:
    return userfault.alive
