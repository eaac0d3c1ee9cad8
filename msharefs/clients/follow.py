"""Follow a thread from system call to system call, for a short time, and let it go.

For the gate: a thread is seized while it waits in a call of ours, so that it stops before its
next instruction, and followed until it makes the call that matters. Within a session::

    held = Followed.seize(tid, deadline)    # then answer the call that it waits in
    registers = yield from held.arrive()    # the exit of that call
    registers = yield from held.entry()     # the entry of its next one
    held.skip(registers)                    # ... which is not to be made,
    yield from held.exit()
    held.set_result(-errno.EACCES)          # ... and returns this
    yield from held.let_go()

At an exit it may be borrowed for calls of ours (:class:`msharefs.clients.borrow.Borrowed`).

Promises: signals are delivered to the thread as they come, and those that it ignores do not end
its calls, but for ones that have a time-out and are never restarted (signal(7)); what it forks or starts is not traced;
one that becomes another program is followed on (a shell opens what its command maps), except for
one that was not its process's first thread, which is Gone; one that is stopped by SIGSTOP is let
go at once (:class:`LetGo`). At the deadline TimedOut is raised; then, as at any other time,
:meth:`Followed.let_go` lets it go, a call that it waits in being restarted. If this process dies,
the thread goes on by itself; if it was stopped at the entry of a call that the kernel never
restarts, that returns EINTR (signal(7)).
"""

from __future__ import annotations

import errno
from time import monotonic
from typing import TYPE_CHECKING, Final

from msharefs.clients import arch
from msharefs.clients.arch import Effect
from msharefs.clients.ptrace import Stop, Tracee
from msharefs.clients.tracer import Session, TimedOut

if TYPE_CHECKING:
    from msharefs.clients.arch import Registers

_LAST_WAIT: Final = 1.0
"""Seconds that :meth:`Followed.let_go` waits for the stop in which it can let go by itself."""


class LetGo(Exception):
    """The thread is no longer followed: its process was stopped."""


class Followed:
    """A thread that is ours between one system call and the next."""

    def __init__(self, tracee: Tracee) -> None:
        self.tracee: Final = tracee

    @classmethod
    def seize(cls, tid: int, deadline: float) -> Followed:
        """From a thread's first moment here. ``deadline``: time.monotonic(), for all waits.

        Raises NotAdoptable (traced already, or not to be traced) and Gone.
        """
        return cls(Tracee.seize(tid, deadline))

    def arrive(self) -> Session[Registers]:
        """Wait until it has come out of the call that it was seized in: its registers then.

        A signal may have taken it to a handler since; the registers are those of the call's end.
        """
        tracee = self.tracee
        registers: Registers | None = None
        while True:
            stop = yield tracee
            self._check(stop)
            now = tracee.registers()
            registers = registers or now
            if stop.interrupt:
                tracee.settle(now)
                return registers
            tracee.interrupt()
            tracee.go_on(stop.signal)

    def entry(self) -> Session[Registers]:
        """Let it run to the entry of its next system call; from an exit, or a first stop."""
        tracee = self.tracee
        number = 0
        while True:
            tracee.to_system_call(number)
            stop = yield tracee
            self._check(stop)
            if stop.syscall:
                return tracee.registers()
            number = stop.signal  # it is delivered; 0 at an interrupt, or the end of a group stop

    def exit(self) -> Session[Registers]:
        """From an entry: let it make the call and stop at its exit.

        A tracee's signals interrupt it even if it ignores them. What that did to a call of those
        which :func:`arch.settle` knows is undone: unless a handler runs, it is made again.
        """
        registers = yield from self.entry()
        if registers.result == -errno.EINTR and self.tracee.settle(registers) is Effect.RESTARTED:
            # The kernel looks at such a result only when a signal, or this, waits for the thread.
            self.tracee.interrupt()
        return registers

    def skip(self, registers: Registers) -> None:
        """At an entry: the call is not to be made."""
        registers.skip()
        self.tracee.set_registers(registers)

    def set_result(self, result: int) -> None:
        """At an exit: what the program is to see; minus an errno for an error."""
        registers = self.tracee.registers()
        registers.set_result(result)
        self.tracee.set_registers(registers)

    def let_go(self) -> Session[None]:
        """Let go of it, wherever it is; if it runs, it is stopped for that."""
        tracee = self.tracee
        if not tracee.seized:
            return
        if tracee.stopped:
            if tracee.at_entry():
                yield from self._back_out()
            tracee.detach()
            return
        tracee.interrupt()
        tracee.deadline = monotonic() + _LAST_WAIT
        try:
            yield from self._let_go_stopped()
        except TimedOut:
            tracee.rest = self._let_go_late

    def _let_go_stopped(self) -> Session[None]:
        tracee = self.tracee
        signal = (yield tracee).signal
        if tracee.at_entry():
            yield from self._back_out()
        else:
            tracee.settle(tracee.registers())
        tracee.detach(signal)

    def _let_go_late(self) -> Session[None]:
        """As soon as it stops: it may wait in a request to us that is not to be given up just now."""
        self.tracee.deadline = float("inf")
        yield from self._let_go_stopped()

    def _back_out(self) -> Session[None]:
        """From an entry to before it: who is let go in a call finds it interrupted (signal(7))."""
        tracee = self.tracee
        registers = tracee.registers()
        number = registers.number
        self.skip(registers)
        tracee.deadline = monotonic() + _LAST_WAIT
        tracee.to_system_call()
        yield tracee
        tracee.read_registers(registers)
        arch.restart(registers, number)
        tracee.set_registers(registers)

    def _check(self, stop: Stop) -> None:
        if stop.group:
            self.tracee.detach()
            raise LetGo("stopped")
