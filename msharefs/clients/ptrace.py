"""ptrace(2), typed: one seized thread is a :class:`Tracee`, one report of it a :class:`Stop`.

Promises: every call of a tracee that has ended raises :class:`Gone`; nothing else is hidden.
All calls for a tracee must come from the thread that seized it (the kernel's rule). Leaves out:
waiting, which is the tracer's, and what to do with a stopped thread.

A tracee is seized, never attached to: no signal is sent to it, and its group stops stay what they
are. If this process dies, the kernel lets go of all tracees.

PTRACE_SEIZE waits for an execve(2) that is under way in the process; that waits for the other
threads to end; and one of these that is traced has ended only when its tracer has heard of it,
which waits in PTRACE_SEIZE. So somebody else has to listen meanwhile: :func:`rescue`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from typing import TYPE_CHECKING, ClassVar, Final

from msharefs.clients import arch
from msharefs.clients.arch import RESULT_OFFSET, Registers
from msharefs.clients.gone import Gone
from msharefs.region.errors import NotAdoptable

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

# PyDLL: these calls take about a microsecond, less than giving the interpreter to another thread
# and getting it back would.
_libc = ctypes.PyDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
# Seizing may wait for an execve(2), which may wait for a file of ours to be read.
_ptrace_slow = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace_slow.restype = _ptrace.restype
_ptrace_slow.argtypes = _ptrace.argtypes
_waitpid = _libc.waitpid
_waitpid.restype = ctypes.c_int
_waitpid.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]

_PEEKTEXT: Final = 1
_PEEKUSER: Final = 3
_CONT: Final = 7
_GETREGS: Final = 12
_SETREGS: Final = 13
_DETACH: Final = 17
_SYSCALL: Final = 24
_SETOPTIONS: Final = 0x4200
_GETEVENTMSG: Final = 0x4201
_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_SECCOMP_GET_FILTER: Final = 0x420C
_GET_SYSCALL_INFO: Final = 0x420E

_INFO_ENTRY: Final = 1

_O_TRACESYSGOOD: Final = 1
_O_TRACEEXEC: Final = 1 << 4
_O_SUSPEND_SECCOMP: Final = 1 << 21
_OPTIONS: Final = _O_TRACESYSGOOD | _O_TRACEEXEC

_WNOHANG: Final = 1
_WALL: Final = 0x4000_0000
_WNOTHREAD: Final = 0x2000_0000
_POLL: Final = _WNOHANG | _WALL | _WNOTHREAD

_REAP_ENDED: Final = os.WEXITED | os.WNOHANG | _WALL
_PEEK_ENDED: Final = _REAP_ENDED | os.WNOWAIT
_ENDED: Final = frozenset({os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED})

_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
_EVENT_EXEC: Final = 4
_EVENT_STOP: Final = 128


class Changed(Gone):
    """The process became another program; its memory is another's."""


class Busy(NotAdoptable):
    """This process traces the thread already."""


class Stop:
    """Why a tracee stopped: its wait status taken apart. One object for each status."""

    __slots__ = ("event", "exec", "group", "interrupt", "signal", "status", "syscall")

    def __init__(self, status: int) -> None:
        number = status >> 8 & 0xFF
        self.status: Final = status
        self.event: Final = status >> 16
        self.syscall: Final = number == _SYSCALL_STOP
        """At the entry or the exit of a system call."""
        self.interrupt: Final = self.event == _EVENT_STOP
        """By PTRACE_INTERRUPT, or by a group stop: SIGSTOP and its like, or the end of one."""
        self.group: Final = self.interrupt and number != signal.SIGTRAP
        """A group stop; resumed, the thread would run although its process is stopped."""
        self.exec: Final = self.event == _EVENT_EXEC
        """It has become another program; its thread id may have changed."""
        self.signal: Final = 0 if self.syscall or self.event else number
        """This signal is about to be delivered; the tracee gets it if it is passed on."""

    def __repr__(self) -> str:
        return f"Stop({self.status:#x})"


_stops: dict[int, Stop] = {}
_status = ctypes.c_int()
_message = ctypes.c_ulong()


def poll(status: ctypes.c_int, tid: int = -1) -> int:
    """A thread that has stopped or ended among those which the calling thread traces, or ``tid``.

    0 if there is none, -1 if the calling thread traces nothing of the kind. The wait status is
    left in ``status``. A tracee that ended is thereby reaped for its tracer; its parent learns of
    it from then on.
    """
    return int(_waitpid(tid, ctypes.addressof(status), _POLL))


def stop_of(status: int) -> Stop | None:
    """The stop that a wait status means; None: the thread has ended."""
    if status & 0xFF != 0x7F:
        return None
    stop = _stops.get(status)
    if stop is None:
        stop = _stops.setdefault(status, Stop(status))
    return stop


class Tracee:
    """A thread that the calling thread has seized, or (``tid`` 0) nobody: a mere pause.

    ``deadline`` is in seconds of time.monotonic(). ``stopped`` is kept by the tracer and by what
    resumes; the calls that look at registers and the like need a stopped tracee.
    """

    own_device: ClassVar[int] = -1
    """The st_dev of the mount that this process serves: a request to it that a tracee waits in is
    given up when the tracee is stopped, and has to be made again."""

    __slots__ = ("deadline", "rest", "seized", "stopped", "tid")

    def __init__(self, tid: int, deadline: float) -> None:
        self.tid: Final = tid
        self.deadline = deadline
        self.stopped = False
        self.seized = False
        self.rest: Callable[[], Generator[Tracee, Stop, None]] | None = None
        """What has to be done when the thread stops after its session has given up on it."""

    @classmethod
    def seize(cls, tid: int, deadline: float) -> Tracee:
        """Seize a thread and ask it to stop; it will at the end of the call that it is in.

        Raises Gone, Busy, or NotAdoptable if it may not be traced.
        """
        if _ptrace_slow(_SEIZE, tid, None, _OPTIONS) == -1:
            raise _refused(tid, ctypes.get_errno())
        tracee = cls(tid, deadline)
        tracee.seized = True
        if _ptrace(_INTERRUPT, tid, None, None) == -1:
            tracee._fail("interrupt")
        return tracee

    def interrupt(self) -> None:
        """Ask it to stop. A tracee that is stopped already will stop again when it goes on."""
        if _ptrace(_INTERRUPT, self.tid, None, None) == -1:
            self._fail("interrupt")

    def read_registers(self, into: Registers) -> None:
        if _ptrace(_GETREGS, self.tid, None, ctypes.addressof(into)) == -1:
            self._fail("read registers")

    def registers(self) -> Registers:
        registers = Registers()
        self.read_registers(registers)
        return registers

    def set_registers(self, registers: Registers) -> None:
        self.set_registers_at(ctypes.addressof(registers))

    def set_registers_at(self, address: int) -> None:
        """From ``address`` in this process."""
        if _ptrace(_SETREGS, self.tid, None, address) == -1:
            self._fail("set registers")

    def result(self) -> int:
        """At the exit of a system call: its result, or minus an errno."""
        value = int(_ptrace(_PEEKUSER, self.tid, RESULT_OFFSET, None))
        if value == -1 and ctypes.get_errno():
            self._fail("read a register")
        return value

    def word(self, address: int) -> bytes:
        """The eight bytes of its memory at ``address``; empty if they cannot be read."""
        value = int(_ptrace(_PEEKTEXT, self.tid, address, None))
        if value == -1:
            code = ctypes.get_errno()
            if code in {errno.EIO, errno.EFAULT}:
                return b""
            if code:
                self._fail("read memory")
        return value.to_bytes(8, "little", signed=True)

    def filtered(self) -> bool:
        """Whether a seccomp filter is in force, or strict mode where that can be told."""
        if _ptrace(_SECCOMP_GET_FILTER, self.tid, None, None) != -1:
            return True
        code = ctypes.get_errno()
        if code == errno.EINVAL:
            return False  # no filter; strict mode is what suspend_seccomp is for
        if code == errno.ESRCH:
            self._fail("look at seccomp")
        if code in {errno.EACCES, errno.EIO}:  # not allowed to us, not built into this kernel
            return status_field(self.tid, "Seccomp") not in {"", "0"}
        return True

    def suspend_seccomp(self, suspended: bool) -> bool:
        """Let injected calls pass seccomp, while nothing else is run; False if that is not to be had."""
        options = _OPTIONS | (_O_SUSPEND_SECCOMP if suspended else 0)
        if _ptrace(_SETOPTIONS, self.tid, None, options) != -1:
            return True
        if ctypes.get_errno() == errno.ESRCH:
            self._fail("set options")
        return False

    def at_entry(self) -> bool:
        """At a stop for a system call: whether it is yet to be made."""
        info = ctypes.create_string_buffer(88)
        if _ptrace(_GET_SYSCALL_INFO, self.tid, len(info), info) == -1:
            self._fail("look at the system call")
        return info.raw[0] == _INFO_ENTRY

    def settle(self, registers: Registers, read: arch.Reader = arch.nothing) -> arch.Effect:
        """As :func:`arch.settle`, for registers that the stopped tracee has."""
        before = registers.rax
        effect = arch.settle(registers, read, self.ours)
        if registers.rax != before:
            self.set_registers(registers)
        return effect

    def ours(self, fd: int) -> bool:
        """Whether a descriptor of it is a file that this process serves."""
        try:
            status = os.stat(f"/proc/{self.tid}/fd/{fd}")  # noqa: PTH116 - it is one call
        except OSError:
            return False
        return bool(status.st_dev == Tracee.own_device)

    def event_message(self) -> int:
        if _ptrace(_GETEVENTMSG, self.tid, None, ctypes.byref(_message)) == -1:
            self._fail("read the event")
        return _message.value

    def go_on(self, number: int = 0) -> None:
        """Run on; deliver signal ``number`` if it stopped for one."""
        self.stopped = False
        if _ptrace(_CONT, self.tid, None, number) == -1:
            self._fail("continue")

    def to_system_call(self, number: int = 0) -> None:
        """Run on to the next entry or exit of a system call; deliver signal ``number``."""
        self.stopped = False
        if _ptrace(_SYSCALL, self.tid, None, number) == -1:
            self._fail("continue")

    def detach(self, number: int = 0) -> None:
        """Let go for good; deliver signal ``number`` if it stopped for one."""
        self.stopped = self.seized = False
        if _ptrace(_DETACH, self.tid, None, number) == -1:
            self._fail("detach")

    def _fail(self, doing: str) -> None:
        code = ctypes.get_errno()
        if code == errno.ESRCH:
            # Killed: the report of its end is still to come, and is not for us to act on.
            raise Gone(f"thread {self.tid}")
        raise OSError(code, f"{doing}, thread {self.tid}: {os.strerror(code)}")


def rescue(tids: Iterable[int]) -> list[int]:
    """From any thread of this process: hear of the tracees that have ended; which these are.

    Stops are left to the thread that traces them.
    """
    ended = []
    for tid in tids:
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_PID, tid, _PEEK_ENDED)
            if found is not None and found.si_code in _ENDED:
                os.waitid(os.P_PID, tid, _REAP_ENDED)
                ended.append(tid)
    return ended


def stray(tid: int) -> Tracee:
    """A tracee that stopped and that no session waits for."""
    tracee = Tracee(tid, 0.0)
    tracee.seized = tracee.stopped = True
    return tracee


def status_field(tid: int, name: str) -> str:
    """One line of /proc/TID/status, without its name; empty if the thread has gone."""
    try:
        with open(f"/proc/{tid}/status", "rb") as status:  # noqa: PTH123 - a quarter of the cost
            text = status.read().decode(errors="replace")
    except OSError:
        return ""
    return text.partition(f"\n{name}:\t")[2].partition("\n")[0]


def _refused(tid: int, code: int) -> Exception:
    if code == errno.ESRCH:
        return Gone(f"thread {tid}")
    if code == errno.EPERM:
        tracer = status_field(tid, "TracerPid")
        if tracer not in {"", "0"}:
            if os.path.exists(f"/proc/self/task/{tracer}"):  # noqa: PTH110
                return Busy(f"thread {tid} is held already")
            return NotAdoptable(f"traced by process {tracer}")
        if status_field(tid, "State")[:1] in {"Z", "X", ""}:
            return Gone(f"thread {tid}")
        return NotAdoptable(f"thread {tid} may not be traced")
    return OSError(code, f"seize thread {tid}: {os.strerror(code)}")
