"""Threads in our hands: held from a call of ours until they have mapped what they opened.

For: the ptrace gate (an opener is followed from its open() to its first mmap() of that
descriptor), and for whatever has to be done to a thread at the end of a call that it waits in
(an mmap() that the other gate asks about, an ioctl() whose caller has to obey it as well).

A thread that waits in a request of ours cannot be stopped before we answer. So it is seized and
asked to stop (:meth:`Hands.take`), then the request is answered, and the thread stops before it
comes back to its program.

Promises: nobody is held for longer than :class:`Limits` say; what a held thread does meanwhile, a
signal, a fork or an exec included, goes its way; one that ends is noticed. Followed are duplicates
of the descriptor in the same thread, and exec. Not seen: other threads, forked children, and what
comes after the first mmap().

Leaves out: the verdict on an mmap(), and what is then done to the client; the loop that awaits a
:class:`Held` decides. Sources: ptrace(2), mmap(2), dup(2).
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import attrs
import trio

from msharefs.clients.arch import Number, is_64_bit
from msharefs.clients.borrow import Borrowed
from msharefs.clients.follow import Followed, LetGo
from msharefs.clients.gone import Gone
from msharefs.clients.tracer import TimedOut
from msharefs.region.errors import NotAdoptable

if TYPE_CHECKING:
    from collections.abc import Callable

    from msharefs.clients.arch import Registers
    from msharefs.clients.borrow import Body
    from msharefs.clients.ptrace import Tracee
    from msharefs.clients.tracer import Session, Tracer

log = logging.getLogger(__name__)

T = TypeVar("T")
_Files: TypeAlias = dict[int, tuple[str, object]]
"""By descriptor: what /proc/PID/fd says of it, and what it was opened as."""

MAP_ANONYMOUS: Final = 0x20
_OPENS: Final = frozenset({Number.OPEN, Number.CREAT, Number.OPENAT, Number.OPENAT2})
_DUPS: Final = frozenset({Number.DUP, Number.DUP2, Number.DUP3})
F_DUPFD: Final = 0
F_DUPFD_CLOEXEC: Final = 1030

PATIENCE: Final = 5.0
"""Seconds that a stopped thread waits for the loop to say what becomes of it. Then it goes on."""


@attrs.frozen
class Limits:
    """How long an opener is followed: so many system calls, or so many seconds.

    The first time that a JVM maps a file, there are about 120 calls between open() and mmap().
    """

    calls: int = 256
    seconds: float = 0.5


@attrs.frozen
class MmapCall:
    """The arguments of an mmap(2) that is about to be made; the descriptor is a region's."""

    address: int
    length: int
    prot: int
    flags: int
    offset: int
    what: object
    """What the descriptor was opened as: given to :meth:`Hands.take` or :meth:`Held.opening`."""


@attrs.frozen
class _Refuse:
    code: int


@attrs.frozen
class _Run:
    body: Body[Any]


@attrs.frozen
class _Result:
    """Of the call at whose end the thread is stopped."""

    old: int
    new: int


class _Over:
    """Told last: the thread is in our hands no more."""


_OVER: Final = _Over()


@attrs.frozen
class _Go:
    """Go on: follow, or make the call that was asked about, in another way if ``call`` says so."""

    call: MmapCall | None = None


class _InHand:
    """A thread that is told what to do from the loop, and tells what came of it."""

    def __init__(self, hands: Hands, tid: int, token: trio.lowlevel.TrioToken) -> None:
        self.tid: Final = tid
        self._hands = hands
        self._token = token
        self._told: trio.MemorySendChannel[Any]
        self._told, self._heard = trio.open_memory_channel[Any](64)

    async def run(self, body: Body[T]) -> T:
        """Borrow the stopped thread for some calls. Raises what ``body`` does, and Gone."""
        self._hands.tracer.answer(self.tid, _Run(body))
        result: T = await self.hear()
        return result

    def release(self) -> None:
        """Let it go, if it is still stopped."""
        self._hands.tracer.answer(self.tid, None)

    def replace(self, result: int, new: int) -> None:
        """The call at whose end it is stopped returned ``result``: the program is to see ``new``.

        Not if a signal has taken it to a handler since.
        """
        self._hands.tracer.answer(self.tid, _Result(result, new))

    async def hear(self) -> Any:
        outcome = await self._heard.receive()
        if outcome is _OVER:
            raise Gone(f"thread {self.tid}")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def tell(self, outcome: Any) -> None:
        """From the tracing thread."""
        try:
            self._token.run_sync_soon(self._told.send_nowait, outcome)
        except trio.RunFinishedError:
            return


class Pause(_InHand):
    """A followed thread that is stopped for a while, beside whoever follows it.

    Released, it is followed on.
    """


class Held(_InHand):
    """One thread. The methods are the loop's; each waits until the thread has come to it."""

    def __init__(
        self, hands: Hands, tid: int, pid: int, limits: Limits | None, what: object
    ) -> None:
        self._what = what
        self._opening: deque[object] = deque()
        super().__init__(hands, tid, trio.lowlevel.current_trio_token())
        self.pid: Final = pid
        self._limits = limits
        self._pauses: deque[Pause] = deque()
        self._over = False

    @property
    def over(self) -> bool:
        """Whether the thread is let go of, or about to be."""
        return self._over

    def release(self) -> None:
        """As in `_InHand`. Nothing once it is over: somebody else may have the thread in hand then."""
        if not self._over:
            super().release()

    async def placed(self) -> None:
        """Until the thread is seized: the request it waits in may be answered.

        Raises NotAdoptable if it may not be traced, Gone if it has ended.
        """
        outcome = await self._heard.receive()
        if isinstance(outcome, Exception):
            raise outcome

    def opening(self, what: object) -> None:
        """The thread, which is being followed, waits in an open() of another file of ours.

        To be said before that is answered. It is then followed to its mmap() of that one as well.
        """
        self._opening.append(what)

    async def stopped(self) -> int:
        """Until it has come to the end of its call: that call's result. Raises Gone."""
        result: int = await self.hear()
        return result

    async def at_mmap(self) -> MmapCall | None:
        """Until it is about to map the descriptor that it opened; None if it was let go."""
        heard = await self._heard.receive()
        if isinstance(heard, Exception):
            raise heard
        return None if heard is _OVER else heard

    async def refuse(self, code: int) -> None:
        """The mmap() fails with that errno; the thread is followed on."""
        self._hands.tracer.answer(self.tid, _Refuse(code))

    async def allow(self, call: MmapCall | None = None) -> int:
        """The mmap() is made: the address, or minus an errno. The thread stays stopped after it.

        With ``call`` it is made as that says. If then it fails with EEXIST, because somebody came
        first to that place, the thread makes it anew once it is released, and it is asked about.
        """
        self._hands.tracer.answer(self.tid, _Go(call))
        result: int = await self.hear()
        return result

    async def pause(self) -> Pause:
        """Stop a thread that is being followed, at the end of the call that it is in.

        Of one that waits in a request of ours, at the end of that: do not await this before it is
        answered. It is followed on once the pause is over. Raises Gone if it was let go before.
        """
        pause = Pause(self._hands, self.tid, self._token)
        self._pauses.append(pause)
        if self._over:  # looked at last, so that it is either seen there or by us
            with suppress(ValueError):
                self._pauses.remove(pause)
                raise Gone(f"thread {self.tid}")
        await pause.hear()
        return pause

    # -- in the tracing thread

    def _end(self, outcome: Any) -> None:
        self._over = True
        while self._pauses:
            self._pauses.popleft().tell(_OVER)
        if isinstance(outcome, TimedOut):
            log.info("thread %d was let go late: the machine is busy, or it hangs", self.tid)
            outcome = None
        self.tell(outcome if isinstance(outcome, Exception) else _OVER)
        try:
            self._token.run_sync_soon(self._hands.forget, self)
        except trio.RunFinishedError:
            return

    def session(self) -> Session[None]:
        followed = Followed.seize(self.tid, monotonic() + PATIENCE)
        self.tell(None)
        try:
            registers = yield from followed.arrive()
            if not is_64_bit(registers):
                raise NotAdoptable("a 32-bit process")  # whose numbers mean other calls
            if self._limits is None:
                self.tell(registers.result)
                yield from self._obey(followed.tracee, self.tell)
            elif registers.result >= 0:
                yield from self._follow(followed, registers.result, self._limits)
        except LetGo:
            return
        self._over = True  # before it runs: what it does next is another's, or nobody's
        yield from followed.let_go()

    def _obey(self, tracee: Tracee, tell: Callable[[Any], None]) -> Session[None]:
        """Do what the loop says, with the thread stopped, until it is released."""
        while True:
            order = yield from _ask(tracee)
            if isinstance(order, _Result):
                registers = tracee.registers()
                if registers.result == order.old:
                    registers.set_result(order.new)
                    tracee.set_registers(registers)
                continue
            if not isinstance(order, _Run):
                return
            yield from self._borrow(tracee, order.body, tell)

    def _borrow(
        self, tracee: Tracee, body: Body[Any], tell: Callable[[Any], None]
    ) -> Session[None]:
        thread = Borrowed(self.pid, tracee)
        outcome: Any
        try:
            thread.take()
            try:
                outcome = yield from body(thread)
                yield from thread.forget()
            finally:
                if tracee.seized and tracee.stopped:
                    thread.put_back()
        except (Gone, TimedOut):
            tell(Gone(f"thread {self.tid}"))
            raise
        except Exception as error:  # noqa: BLE001 - it is the loop's to judge
            outcome = error
        tell(outcome)

    def _follow(self, followed: Followed, fd: int, limits: Limits) -> Session[None]:
        """From the exit of one call to that of the next, until it has mapped what it opened."""
        files: _Files = {fd: (_link(self.tid, fd), self._what)}
        followed.tracee.deadline = monotonic() + limits.seconds
        calls = 0
        while True:
            while self._pauses:
                pause = self._pauses.popleft()
                pause.tell(None)
                yield from self._obey(followed.tracee, pause.tell)
            if calls >= limits.calls or not (files or self._opening):
                return
            calls += 1
            try:
                registers = yield from followed.entry()
                number, arguments = registers.number, registers.arguments
                found = self._mapped_file(number, arguments, files)
                if found is not None:
                    if not (yield from self._at_mmap(followed, registers, found)):
                        continue
                    files = {fd: file for fd, file in files.items() if file[1] is not found}
                    continue
                result = (yield from followed.exit()).result
            except TimedOut:
                if not self._pauses:
                    return
                # Somebody waits for this thread: it is wanted at the end of the call that it is in.
                followed.tracee.interrupt()
                calls = limits.calls
                followed.tracee.deadline = monotonic() + PATIENCE
                yield from followed.arrive()
                continue
            _keep_track(number, arguments, result, files)
            if number in _OPENS and self._opening:
                what = self._opening.popleft()
                if result >= 0:
                    files[result] = _link(self.tid, result), what
                    followed.tracee.deadline = monotonic() + limits.seconds
                    calls = 0

    def _at_mmap(self, followed: Followed, registers: Registers, what: object) -> Session[bool]:
        """Ask about an mmap() at its entry, and make it or not: whether that was the end of it."""
        own = registers.arguments
        address, length, prot, flags, _, offset = own
        tracee = followed.tracee
        deadline, tracee.deadline = tracee.deadline, monotonic() + PATIENCE
        self.tell(MmapCall(address, length, prot, flags, offset, what))
        verdict = yield from _ask(tracee)
        if isinstance(verdict, _Refuse):
            followed.skip(registers)
            yield from followed.exit()
            followed.set_result(-verdict.code)
            tracee.deadline = deadline
            return False
        changed = verdict.call if isinstance(verdict, _Go) else None
        if changed is not None:
            place, way = changed.address, changed.flags
            registers.set_arguments((place, length, prot, way, own[4], changed.offset))
            tracee.set_registers(registers)
        registers = yield from followed.exit()
        result = registers.result
        again = changed is not None and result == -errno.EEXIST
        if changed is not None:
            registers.set_arguments(own)
            if again:
                registers.again(Number.MMAP)
            tracee.set_registers(registers)
        if verdict is not None:  # else the loop is not there any more: it goes on unsupervised
            self.tell(result)
            yield from self._obey(tracee, self.tell)
        tracee.deadline = deadline
        return not again

    def _mapped_file(self, number: int, arguments: tuple[int, ...], files: _Files) -> object | None:
        """What an mmap() is of, if the descriptor still stands for a file that was opened."""
        if number != Number.MMAP or arguments[3] & MAP_ANONYMOUS:
            return None
        fd = _int(arguments[4])
        link, what = files.get(fd, ("", None))
        return what if link and _link(self.tid, fd) == link else None


class Hands:
    """All threads that are held. For the loop's thread."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer: Final = tracer
        self._held: dict[int, Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def of_thread(self, tid: int) -> Held | None:
        """Who has it in hand. Not who has just let go of it, and is yet to be forgotten."""
        held = self._held.get(tid)
        return None if held is None or held.over else held

    def take(self, tid: int, pid: int, limits: Limits | None = None, what: object = None) -> Held:
        """Seize a thread that waits in a request of ours; await :meth:`Held.placed` first.

        With ``limits`` it is followed to its first mmap() of the descriptor that the request
        gives it; without, it stays stopped at the end of its call until :meth:`Held.release`.
        """
        held = Held(self, tid, pid, limits, what)
        self._held[tid] = held
        self.tracer.submit(held.session(), held._end)  # noqa: SLF001 - two halves of one thing
        return held

    def forget(self, held: Held) -> None:
        if self._held.get(held.tid) is held:
            del self._held[held.tid]


def _ask(tracee: Tracee) -> Session[Any]:
    """Wait, stopped, for what the loop has to say; None if it says nothing in time."""
    deadline = tracee.deadline
    tracee.deadline = monotonic() + PATIENCE
    try:
        answer: Any = yield tracee
    except TimedOut:
        log.error("thread %d waited for a verdict in vain, it goes on", tracee.tid)
        answer = None
    tracee.deadline = deadline
    return answer


def _link(tid: int, fd: int) -> str:
    """What a descriptor refers to, to be compared; empty if there is none."""
    try:
        try:
            return os.readlink(f"/proc/{tid}/fd/{fd}")  # noqa: PTH115 - a third of the cost
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            # A path of more than a page: the number of the mount and that of the inode will do.
            text = Path(f"/proc/{tid}/fdinfo/{fd}").read_text()
            return " ".join(
                line for line in text.splitlines() if line.startswith(("mnt_id", "ino"))
            )
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ESRCH}:
            return ""
        raise


def _int(value: int) -> int:
    """A descriptor as the kernel takes it from a register."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _keep_track(number: int, arguments: tuple[int, ...], result: int, files: _Files) -> None:
    """A call has ended: which descriptors are a file's after it."""
    first = _int(arguments[0])
    if number == Number.CLOSE:
        files.pop(first, None)
    elif result >= 0 and (
        number in _DUPS
        or (number == Number.FCNTL and _int(arguments[1]) in {F_DUPFD, F_DUPFD_CLOEXEC})
    ):
        if first in files:
            files[result] = files[first]
        else:
            files.pop(result, None)
