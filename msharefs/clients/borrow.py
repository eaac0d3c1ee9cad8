"""Borrow a thread of another process for a few system calls; give it back exactly as it was.

The thread is seized and stopped, its registers are noted, and it makes system calls at a
``syscall`` instruction: the one by which it entered the kernel or, stopped in its own code, one of
the vdso. Nothing is written to its memory. Then its registers are put back and it is let go: an
interrupted call is restarted by the kernel, time-outs included; a group stop stays in force;
nobody who waits for the process sees anything.

A signal that is delivered meanwhile must not find registers that are not the program's own. So
when one is about to be, the thread gets its registers back, the kernel delivers it (once, with all
that belongs to it, on whichever stack), and the thread is stopped and borrowed anew before the
handler's first instruction. The calls are followed by PTRACE_SYSCALL, not by single steps: a step
ends in a SIGTRAP that the kernel forces upon the thread, which would end an SIG_IGN or a block
that the program has set up for it.

What cannot be had is reported (:attr:`Borrowed.disturbed`): a call that the kernel never restarts
and that has a time-out returns EINTR, a write that was under way a short count, as they would
after SIGSTOP and SIGCONT (signal(7)). So of several threads one is taken that is not in such a
call.

If this process is killed (SIGKILL) while a borrowed thread makes a call, the kernel lets go of the
thread with the registers of that call. A thread that was in a system call then finds that this has
returned what ours returned (0 for mprotect(2): to a read(2), the end of the file) and its arguments
overwritten; one that was stopped in its own code goes on within the vdso and most likely crashes.
The time for which that is so is that of the call until we have heard of its end, some
microseconds for mprotect(2); before and after, the kernel finds the thread's own registers in
place. A stack frame for rt_sigreturn(2) would close the gap, but needs a page of code and some of
memory mapped in every client for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from msharefs.clients import arch
from msharefs.clients.arch import Effect, Number, Registers
from msharefs.clients.gone import Gone
from msharefs.clients.ptrace import Busy, Changed, Tracee, status_field
from msharefs.clients.tracer import Session, TimedOut, pause
from msharefs.region.errors import ClientStuck, NotAdoptable

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
Body: TypeAlias = "Callable[[Borrowed], Session[T]]"

_PAGE: Final = 4096
_PROT_READ_WRITE: Final = 3
_MAP_PRIVATE_ANONYMOUS: Final = 0x22
_AT_SYSINFO_EHDR: Final = 33
_SYSCALL: Final = arch.SYSCALL_INSTRUCTION
_SIZE: Final = ctypes.sizeof(Registers)
_Bytes: Final = ctypes.c_char * _SIZE

_RETRY: Final = 0.001
"""Seconds between tries to seize a thread that another session holds."""


def borrow(
    pid: int,
    body: Body[T],
    *,
    limit: float = 1.0,
    known: bool = False,
    check: Callable[[], None] | None = None,
) -> Session[T]:
    """A session: stop a thread of process ``pid``, run ``body`` with it, give it back.

    ``body`` is a generator function: ``result = yield from thread.call(Number.MPROTECT, ...)``.
    Its return value is the session's. ``limit`` is in seconds, counted from the start. ``known``:
    a process that was found to be without a seccomp filter before is not asked again; should it
    have one since, it is suspended for our calls. ``check`` is called once the thread has stopped:
    to raise Gone if the process is not the one, or not the program, that ``body`` was made for.

    Raises NotAdoptable (traced, 32-bit, seccomp, not to be seen from here), ClientStuck (no thread
    stopped, or a call did not return, within the limit; what is still to be put back then will be
    as soon as the thread stops), Gone (the process ended; or became another program while we
    waited for it to stop, if it was seen: ``check`` sees it always).
    """
    if pid <= 0:
        raise NotAdoptable("the process lives in a foreign pid namespace")
    deadline = monotonic() + limit
    tracee = yield from _stop_one(pid, deadline)
    thread = Borrowed(pid, tracee)
    try:
        thread.take(known=known)
        if check is not None:
            check()
        try:
            result = yield from body(thread)
        except Exception:
            if tracee.stopped:
                yield from thread.forget()
            raise
        yield from thread.forget()
    except TimedOut:
        raise ClientStuck(f"process {pid} did not finish a call in time") from None
    finally:
        if tracee.seized and tracee.stopped:
            with contextlib.suppress(Gone):
                thread.let_go()
    return result


class Borrowed:
    """A stopped thread that makes calls for us; all else about it stays what it was.

    Made by :func:`borrow`. At the gate, where the thread is stopped already (at the exit of a
    system call that was not interrupted, or by an interrupt): make one, :meth:`take`, calls,
    :meth:`put_back`; the tracee is then where it was, stopped at a system call's exit.
    """

    def __init__(self, pid: int, tracee: Tracee) -> None:
        self.pid: Final = pid
        self.tracee: Final = tracee
        self.saved = Registers()
        """The thread's own registers."""
        self.disturbed = False
        """Whether the program will see that its call was interrupted; unavoidably."""
        self._work = bytearray(_SIZE)
        self._work_at = ctypes.addressof(_Bytes.from_buffer(self._work))
        self._instruction = 0
        self._scratch: list[tuple[int, int]] = []
        self._suspended = False
        self._dirty = False  # the thread's registers are not what is in saved

    @property
    def tid(self) -> int:
        return self.tracee.tid

    def take(self, *, known: bool = False) -> None:
        """Note what the thread has, find out whether it may be used. Raises NotAdoptable, Gone.

        ``known``: see :func:`borrow`.
        """
        tracee, saved = self.tracee, self.saved
        tracee.read_registers(saved)
        if not arch.is_64_bit(saved):
            raise NotAdoptable("a 32-bit process")
        if not known and tracee.filtered():
            raise NotAdoptable("a seccomp filter is in force")
        self._instruction = self._find_instruction()
        # Strict mode kills, and is not seen above; where seccomp cannot be suspended, look.
        self._suspended = tracee.suspend_seccomp(suspended=True)
        if not self._suspended and status_field(tracee.tid, "Seccomp") not in {"0", ""}:
            raise NotAdoptable("seccomp is in force")
        self._settle()

    def put_back(self) -> None:
        """Everything as it was. The thread stays stopped and seized."""
        self._restore()
        if self._suspended:
            self._suspended = False
            self.tracee.suspend_seccomp(suspended=False)

    def let_go(self) -> None:
        """Put back and detach; at any stop but a signal's."""
        self._restore()
        self.tracee.detach()

    def _restore(self) -> None:
        if self._dirty:
            self._dirty = False
            self.tracee.set_registers(self.saved)

    def _settle(self) -> None:
        if self.tracee.settle(self.saved, self.read) is Effect.DISTURBED:
            self.disturbed = True

    def call(self, number: int, *arguments: int) -> Session[int]:
        """Make a system call: its result, or minus an errno. Raises Gone, TimedOut."""
        tracee, registers = self.tracee, self._work
        while True:
            registers[:] = memoryview(self.saved).cast("B")
            arch.prepare_call(registers, self._instruction, number, arguments)
            self._dirty = True
            tracee.set_registers_at(self._work_at)
            tracee.rest = self._put_back_late
            tracee.to_system_call()
            stop = yield tracee
            while stop.interrupt or stop.signal == signal.SIGSTOP:
                # The thread runs although its process is being stopped; once let go, it stops.
                tracee.to_system_call(stop.signal)
                stop = yield tracee
            if stop.signal:
                yield from self._deliver(stop.signal)
                continue
            tracee.to_system_call()
            yield tracee
            tracee.rest = None
            result = tracee.result()
            self._restore()  # at once: should this process die, the kernel lets go of the thread
            if not arch.was_interrupted(result):
                return result

    def push(self, data: bytes) -> Session[int]:
        """Put bytes where the thread's calls can read them: the address. Raises OSError.

        In memory of their own, made by a call and unmapped by :meth:`forget`: what lies below the
        stack pointer need not be free, for stacks can be small and lie anywhere.
        """
        size = -len(data) % _PAGE + len(data) or _PAGE
        address = yield from self.call(
            Number.MMAP, 0, size, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS, -1, 0
        )
        if -_PAGE < address < 0:
            raise OSError(-address, f"memory in process {self.pid}: {os.strerror(-address)}")
        self._scratch.append((address, size))
        self.write(address, data)
        return address

    def forget(self) -> Session[None]:
        """Unmap what :meth:`push` made."""
        while self._scratch:
            address, size = self._scratch.pop()
            yield from self.call(Number.MUNMAP, address, size)

    def read(self, address: int, size: int) -> bytes:
        """Its memory; shorter or empty where there is none."""
        try:
            with open(f"/proc/{self.tid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
                return os.pread(memory.fileno(), size, address)
        except (OSError, OverflowError):
            return b""

    def write(self, address: int, data: bytes) -> None:
        try:
            with open(f"/proc/{self.tid}/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
                os.pwrite(memory.fileno(), data, address)
        except (FileNotFoundError, ProcessLookupError):
            raise Gone(f"thread {self.tid}") from None

    def _deliver(self, number: int) -> Session[None]:
        """A signal came before the call: let the program have it, and borrow the thread anew."""
        self._restore()
        tracee = self.tracee
        tracee.rest = None
        tracee.interrupt()
        tracee.go_on(number)
        yield from _first_stop(tracee)
        tracee.read_registers(self.saved)
        self._settle()

    def _find_instruction(self) -> int:
        if self.saved.number >= 0:
            address = arch.after_call(self.saved)
            if arch.entered_by_syscall(self.saved) or self.tracee.word(address)[:2] == _SYSCALL:
                return address
        address = _vdso_instruction.get(self.pid, 0)
        if not address or self.tracee.word(address)[:2] != _SYSCALL:
            address = _look_up_vdso(self.pid)
            if not address or self.tracee.word(address)[:2] != _SYSCALL:
                raise NotAdoptable("no vdso with a system call in it")
            _note_vdso(self.pid, address)
        return address

    def _put_back_late(self) -> Session[None]:
        """After the session gave up while a call was under way: put back when it stops."""
        tracee = self.tracee
        tracee.deadline = float("inf")
        tracee.interrupt()
        while True:
            stop = yield tracee
            if not stop.syscall or not tracee.at_entry():
                break
            registers = tracee.registers()
            registers.skip()
            tracee.set_registers(registers)
            tracee.to_system_call()
        self._restore()
        tracee.detach(stop.signal)


def vdso_instruction(pid: int) -> int:
    """Where a process probably has a ``syscall`` in its vdso; 0 if that cannot be found out."""
    address = _vdso_instruction.get(pid, 0)
    if not address:
        address = _look_up_vdso(pid)
        _note_vdso(pid, address)
    return address


def _note_vdso(pid: int, address: int) -> None:
    if len(_vdso_instruction) >= 1 << 16:
        _vdso_instruction.clear()
    _vdso_instruction[pid] = address


_vdso_instruction: dict[int, int] = {}
"""By process id, for threads that are not in a system call; what is found is looked at again."""


def _own_vdso_offset() -> int:
    libc = ctypes.CDLL(None)
    libc.getauxval.restype = ctypes.c_ulong
    base = int(libc.getauxval(_AT_SYSINFO_EHDR))
    if not base:
        return -1
    with open("/proc/self/maps", "rb") as maps:  # noqa: PTH123
        for line in maps:
            if line.endswith(b"[vdso]\n"):
                start, end = (int(part, 16) for part in line.split(b" ", 1)[0].split(b"-"))
                return ctypes.string_at(start, end - start).find(arch.SYSCALL_INSTRUCTION)
    return -1


_offset: int | None = None


def _look_up_vdso(pid: int) -> int:
    """A ``syscall`` instruction in a process's vdso, or 0. All 64-bit processes have the same."""
    global _offset  # noqa: PLW0603 - found once, the same for all
    if _offset is None:
        _offset = _own_vdso_offset()
    try:
        with open(f"/proc/{pid}/auxv", "rb") as file:  # noqa: PTH123
            auxv = file.read()
    except OSError:
        return 0
    for kind, value in struct.iter_unpack("QQ", auxv[: len(auxv) // 16 * 16]):
        if kind == _AT_SYSINFO_EHDR:
            return value + _offset if _offset >= 0 else 0
    return 0


# --- which thread ---------------------------------------------------------------------------------


def _stop_one(pid: int, deadline: float) -> Session[Tracee]:
    """Seize and stop a thread of the process: the one that is disturbed least."""
    gone: set[int] = set()
    slow: set[int] = set()
    while True:
        tids = _threads(pid)
        if gone:
            tids = [tid for tid in tids if tid not in gone]
        if not tids:
            raise Gone(f"process {pid}")
        choice = [tid for tid in tids if tid not in slow] or tids
        tid = _least_disturbed(pid, choice)
        now, until = monotonic(), deadline
        if len(choice) > 1:  # there is another: do not wait for this one to the end
            until = now + (deadline - now) / 4
        if not tid:
            if now >= deadline:
                raise ClientStuck(f"process {pid} is in an execve that does not end")
            yield from pause(_RETRY)
            continue
        try:
            tracee = Tracee.seize(tid, until)
            yield from _first_stop(tracee)
        except Changed:
            raise
        except Gone:
            gone.add(tid)
        except (Busy, TimedOut) as error:
            if monotonic() >= deadline:
                raise ClientStuck(f"process {pid}: no thread stopped in time") from None
            if isinstance(error, TimedOut):
                slow.add(tid)
            else:
                yield from pause(_RETRY)
        else:
            tracee.deadline = deadline
            return tracee


def _first_stop(tracee: Tracee) -> Session[None]:
    while True:
        stop = yield tracee
        if stop.interrupt:
            return
        if stop.exec:
            raise Changed(f"process {tracee.tid} became another program")
        # A signal was about to be delivered: it is, and the next stop comes before its handler's
        # first instruction.
        tracee.interrupt()
        tracee.go_on(stop.signal)


def _threads(pid: int) -> list[int]:
    place = f"/proc/{pid}/task"
    try:
        if os.stat(place).st_nlink == 3:  # noqa: PTH116 - "." and ".." and one thread: no list needed
            return [pid]
        return [int(name) for name in os.listdir(place)]  # noqa: PTH208 - half the cost
    except (FileNotFoundError, ProcessLookupError):
        return []


def _least_disturbed(pid: int, tids: list[int]) -> int:
    """The thread to take; 0 if one is found in an execve(2), for which seizing any would wait."""
    best, least = tids[0], 99
    for tid in tids:
        found = _reluctance(pid, tid)
        if found == arch.IN_EXEC:
            return 0
        if found < least:
            best, least = tid, found
        if least <= 1:
            break
    return best


def waits_for_child(pid: int) -> bool:
    """Whether the process has but one thread, and that waits in vfork(2) for its child."""
    return _threads(pid) == [pid] and _reluctance(pid, pid) == arch.NEVER


def _reluctance(pid: int, tid: int) -> int:
    """See arch.reluctance; proc_pid_syscall(5) says what a thread waits in."""
    try:
        file = os.open(f"/proc/{pid}/task/{tid}/syscall", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 50
    try:
        words = os.read(file, 256).split()
    except OSError:
        return 50
    finally:
        os.close(file)
    if words[:1] == [b"running"]:
        return 0
    if len(words) < 7:
        return 2  # it sleeps, but in no system call: in a fault
    return arch.reluctance(int(words[0]), tuple(int(word, 16) for word in words[1:7]))
