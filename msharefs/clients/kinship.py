"""Which process a userfaultfd belongs to.

For: forked children. The kernel hands us a child's userfaultfd before the child has a number, and
says nowhere whose it is (neither the message nor /proc/self/fdinfo does); of several children that
live at one moment each could be any of them.

How it is found out: a mapping is cut in two where it is registered in one part only, and
/proc/PID/maps of the owner, and of nobody else, shows the cut. So one page of private anonymous
memory of the process that is asked about is registered and given back at once. It is registered
for write-protection, and no page of it is protected: no access is slowed down or caught.

Promises: exact; who could have made the cut itself is not told of. A process is compared once with
the children that there are: any that come later are not it. One that holds its mmap_lock delays the
answer for :data:`LIMIT` and no longer; then those that are not found are told of as unknown.

Leaves out: what follows from it. Source: ioctl_userfaultfd(2), proc_pid_maps(5).
"""

from __future__ import annotations

import errno
import fcntl
import re
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import attrs
import trio

from msharefs.clients.gone import Gone
from msharefs.clients.lanes import Lane
from msharefs.clients.procmap import PROCMAP_QUERY, has_query, read_text
from msharefs.clients.userfault import PAGE, Mode, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msharefs.clients.lanes import Workers
    from msharefs.clients.served import Served
    from msharefs.clients.space import AddressSpace
    from msharefs.clients.userfault import Userfault

PLACES: Final = 4
"""Mappings that are tried, one after another: some may be watched by somebody else already."""
LIMIT: Final = 1.0
"""Seconds."""
BUSY_PAUSE: Final = 0.000_2
"""Seconds. How long a child's lane is left alone that has just something to do."""

_WP: Final = int(Mode.WP)

_WRITABLE: Final = 0x02
_SHARED: Final = 0x08
_COVERING_OR_NEXT: Final = 0x10
# Of struct procmap_query: size, flags, address; start, end, flags, page size, offset, inode.
_QUESTION: Final = struct.Struct("<QQQ80x")
_ANSWER: Final = struct.Struct("<QQQQQQ")
_ANSWER_AT: Final = 24

_LINE: Final = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) .(.).(.) [0-9a-f]+ [0-9a-f:]+ ([0-9]+)", re.MULTILINE
)


@attrs.define
class Claims:
    """What was found out. ``unknown``: it could not be, this time."""

    found: dict[AddressSpace, Served] = attrs.field(factory=dict)
    unknown: list[AddressSpace] = attrs.field(factory=list)
    ended: list[Served] = attrs.field(factory=list)
    strange: list[tuple[Served, Userfault]] = attrs.field(factory=list)
    """Of those found: descriptors that are another's. Where two threads of one process fork at one
    moment, what we read of its two descriptors does not tell which two belong together."""


@attrs.frozen(eq=False)
class Child:
    """The descriptors of a child whose lane is reserved, so that they stay open.

    ``pid``: who it is if its accesses tell the truth, which in a pid namespace of its own they do
    not.
    """

    served: Served
    userfaults: list[Userfault]
    pid: int | None


class Kinship:
    """Finds out. In the loop, but for the asking, which is done in a thread."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._strangers: WeakSet[AddressSpace] = WeakSet()
        self._turn = trio.Lock()

    async def claim(self, processes: Sequence[AddressSpace], children: Sequence[Served]) -> Claims:
        """Which of ``children`` the processes are, if any."""
        asked = [space for space in processes if space not in self._strangers]
        if not asked or not children:
            self._strangers.update(asked)
            return Claims()
        async with self._turn:
            with trio.move_on_after(LIMIT) as patience:
                held = await self._hold(children)
                return await self._ask(asked, held)
        assert patience.cancelled_caught
        return Claims(unknown=asked)

    async def _hold(self, children: Sequence[Served]) -> list[Child]:
        """Reserve their lanes, so that nobody else uses or closes their descriptors."""
        held: list[Child] = []
        try:
            for child in children:
                while child.halves and not self._workers.reserve(child.lane):  # noqa: ASYNC110 - a thread is at it
                    await trio.sleep(BUSY_PAUSE)
                if child.halves:
                    held.append(Child(child, [half.userfault for half in child.halves], child.pid))
        except BaseException:
            self._let_go(held)
            raise
        return held

    def _let_go(self, children: Sequence[Child]) -> None:
        for child in children:
            self._workers.release(child.served.lane)

    async def _ask(self, processes: Sequence[AddressSpace], children: list[Child]) -> Claims:
        token, done = trio.lowlevel.current_trio_token(), trio.Event()
        claims = Claims()

        def run() -> None:
            try:
                _compare(processes, list(children), claims)
            except BaseException:
                claims.unknown[:] = [space for space in processes if space not in claims.found]
                raise
            finally:
                self._let_go(children)
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(done.set)

        self._workers.submit(Lane(), run)
        await done.wait()
        self._strangers.update(
            space
            for space in processes
            if space not in claims.found and space not in claims.unknown
        )
        return claims


def _compare(
    processes: Sequence[AddressSpace],
    children: list[Child],
    claims: Claims,
) -> None:
    """Children and processes come in the order in which they were forked, mostly."""
    for space in sorted(processes, key=_pid):
        doubtful, places = False, None
        children.sort(key=lambda child: child.pid != space.pid)
        for child in list(children):
            try:
                places = places or places_in(space)
                owns = owned_by(child.userfaults[0], space, places)
            except Gone:
                claims.ended.append(child.served)
                children.remove(child)
                continue
            if owns:
                claims.found[space] = child.served
                claims.strange += _others(child, space, places)
                children.remove(child)
                break
            doubtful |= owns is None
        else:
            if doubtful:
                claims.unknown.append(space)


def _others(
    child: Child, space: AddressSpace, places: Sequence[int]
) -> Iterator[tuple[Served, Userfault]]:
    for userfault in child.userfaults[1:]:
        with suppress(Gone):
            if owned_by(userfault, space, places):
                continue
        yield child.served, userfault


def owned_by(userfault: Userfault, space: AddressSpace, places: Sequence[int]) -> bool | None:
    """Whether the userfaultfd is of that address space; None if that cannot be told.

    ``places`` are from :func:`places_in`. Raises Gone if the address space that the userfaultfd
    is of has ended.
    """
    try:
        maps = space.enter()
    except Gone:
        return False
    try:
        for start in places:
            outcome = _register(userfault, start)
            if outcome is Outcome.SERVED:
                return _cut_off(userfault, maps, start)
            if outcome is not Outcome.REFUSED:
                return None
    except ProcessLookupError:
        return False  # it has ended, and the other has not
    else:
        # There is no such memory in the other; or somebody watches all that there is in this one,
        # which is the same to us: it could not be watched by its own userfaultfd.
        return False
    finally:
        space.leave()


def places_in(space: AddressSpace) -> list[int]:
    """Where private anonymous mappings of several pages begin: some, small ones first."""
    found: list[tuple[int, int]] = []
    try:
        maps = space.enter()
    except Gone:
        return []
    try:
        for start, end, private in _queried(maps) if has_query() else _text(maps):
            if private and end - start > PAGE:
                found.append((end - start, start))
                if len(found) >= PLACES:
                    break
    except ProcessLookupError:
        return []
    finally:
        space.leave()
    return [start for _, start in sorted(found)]


def _register(userfault: Userfault, start: int) -> Outcome | None:
    """None if the owner has as many mappings as it may. Raises Gone if it has ended."""
    try:
        outcome = userfault.register(start, PAGE, _WP)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            return None
        raise
    if outcome is Outcome.GONE:
        raise Gone("the owner of a userfaultfd")
    return outcome


def _cut_off(userfault: Userfault, maps: int, start: int) -> bool | None:
    """Whether the page at ``start`` is cut off from its mapping by being registered."""
    try:
        cut = _extent(maps, start) == (start, start + PAGE)
    finally:
        userfault.unregister(start, PAGE)
    if not cut:
        return False
    return True if _extent(maps, start) != (start, start + PAGE) else None


def _extent(maps: int, address: int) -> tuple[int, int] | None:
    """The mapping in which the address lies. Raises ProcessLookupError if the process has ended."""
    if not has_query():
        return next((m[:2] for m in _text(maps) if m[0] <= address < m[1]), None)
    return _query(maps, address, 0)[:2]


def _queried(maps: int) -> Iterator[tuple[int, int, bool]]:
    at = 0
    with suppress(FileNotFoundError):
        while True:
            start, at, private = _query(maps, at, _WRITABLE | _COVERING_OR_NEXT)
            yield start, at, private


def _query(maps: int, address: int, flags: int) -> tuple[int, int, bool]:
    """Start and end of a mapping, and whether it is private anonymous memory."""
    buffer = bytearray(_QUESTION.pack(104, flags, address))
    fcntl.ioctl(maps, PROCMAP_QUERY, buffer)
    start, end, has, page, _, inode = _ANSWER.unpack_from(buffer, _ANSWER_AT)
    return start, end, not inode and page == PAGE and not has & _SHARED


def _text(maps: int) -> list[tuple[int, int, bool]]:
    """The same of all writable mappings, by the text."""
    try:
        text = read_text(maps)
    except Gone:
        raise ProcessLookupError from None
    if not text:
        raise ProcessLookupError
    return [
        (int(start, 16), int(end, 16), sharing == b"p" and inode == b"0")
        for start, end, write, sharing, inode in _LINE.findall(text)
        if write == b"w"
    ]


def _pid(space: AddressSpace) -> int:
    return space.pid
