"""What depends on the machine: registers, system call numbers, and what an interrupted call does.

For x86-64 only. :func:`supported` says whether this is such a machine; everything else here may
be used only if it is. Pure but for the registers' layout, which is the kernel's.

Source: ``struct user_regs_struct`` in <sys/user.h>, syscall(2), signal(7) ("Interruption of
system calls and library functions by signal handlers"), restart_syscall(2).
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    Reader = Callable[[int, int], bytes]
    """``read(address, size)`` of the tracee's memory; shorter or empty if it cannot be read."""
    Ours = Callable[[int], bool]
    """Whether a descriptor of the tracee is a file that this process serves."""

_MASK: Final = (1 << 64) - 1
_NO_CALL: Final = _MASK
"""orig_rax of a thread that is not in a system call: the kernel restarts nothing."""

SYSCALL_INSTRUCTION: Final = b"\x0f\x05"
_USER_CS_64: Final = frozenset({0x33, 0xE033})  # the second: as a Xen guest

# What a system call that was interrupted shows to a tracer (include/linux/errno.h). The kernel
# acts on it when the thread goes on: it restarts the call, or makes it EINTR if a handler runs.
_ERESTARTSYS: Final = 512
_ERESTARTNOINTR: Final = 513
_ERESTARTNOHAND: Final = 514
_ERESTART_RESTARTBLOCK: Final = 516
_RESTARTS: Final = frozenset(
    {_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND, _ERESTART_RESTARTBLOCK}
)


_NAMES: Final = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags"
    " rsp ss fs_base gs_base ds es fs gs"
)


class Registers(ctypes.Structure):
    """A thread's general registers, in the order of PTRACE_GETREGS."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in _NAMES.split())

    r8: int
    r9: int
    r10: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    rsp: int

    def copy(self) -> Registers:
        return Registers.from_buffer_copy(self)

    @property
    def number(self) -> int:
        """The system call that the thread is in or has just left; -1 outside of one."""
        return signed(self.orig_rax)

    @property
    def arguments(self) -> tuple[int, int, int, int, int, int]:
        """The system call's arguments, unsigned."""
        return (self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9)

    @property
    def result(self) -> int:
        """What the system call returned: a value, or minus an errno. Valid at its exit."""
        return signed(self.rax)

    def set_result(self, value: int) -> None:
        self.rax = value & _MASK

    def set_arguments(self, values: tuple[int, int, int, int, int, int]) -> None:
        """At the entry of a system call: make it with these. At its exit: what the program sees."""
        self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9 = values

    def again(self, number: int) -> None:
        """At the exit of a system call: it is to be made once more, with the arguments that are set."""
        self.rip -= len(SYSCALL_INSTRUCTION)
        self.rax = number

    def skip(self) -> None:
        """At the entry of a system call: it is not to be made. Its result is set at its exit."""
        self.orig_rax = _NO_CALL


def restart(registers: Registers, number: int) -> None:
    """At the exit of a call that was skipped: let the kernel have it made after all, anew."""
    registers.orig_rax = number
    registers.set_result(-_ERESTARTNOINTR)


ADDRESS_END: Final = (1 << 47) - 4096
"""Where a program's addresses end, unless it asks for higher ones (Documentation/arch/x86/x86_64/
5level-paging.rst)."""

RESULT_OFFSET: Final = Registers.rax.offset  # type: ignore[attr-defined] # ctypes' field descriptor
"""Where the result lies for PTRACE_PEEKUSER: cheaper than all registers."""


_CALL_OFFSET: Final = Registers.r10.offset  # type: ignore[attr-defined]
_pack_call: Final = struct.Struct("<10Q").pack_into  # r10 to rip, as they follow each other


class Number(IntEnum):
    """System calls, by their numbers on x86-64."""

    READ = 0
    WRITE = 1
    OPEN = 2
    CLOSE = 3
    POLL = 7
    MMAP = 9
    MPROTECT = 10
    MUNMAP = 11
    RT_SIGACTION = 13
    IOCTL = 16
    PREAD64 = 17
    PWRITE64 = 18
    READV = 19
    WRITEV = 20
    SELECT = 23
    MREMAP = 25
    MADVISE = 28
    DUP = 32
    DUP2 = 33
    PAUSE = 34
    NANOSLEEP = 35
    SENDFILE = 40
    CONNECT = 42
    ACCEPT = 43
    SENDTO = 44
    RECVFROM = 45
    SENDMSG = 46
    RECVMSG = 47
    CLONE = 56
    FORK = 57
    VFORK = 58
    EXECVE = 59
    WAIT4 = 61
    SEMOP = 65
    MSGRCV = 70
    FCNTL = 72
    CREAT = 85
    FTRUNCATE = 77
    RT_SIGTIMEDWAIT = 128
    RT_SIGSUSPEND = 130
    FUTEX = 202
    IO_GETEVENTS = 208
    RESTART_SYSCALL = 219
    SEMTIMEDOP = 220
    CLOCK_NANOSLEEP = 230
    EPOLL_WAIT = 232
    OPENAT = 257
    PSELECT6 = 270
    PPOLL = 271
    SPLICE = 275
    EPOLL_PWAIT = 281
    FALLOCATE = 285
    ACCEPT4 = 288
    OPENAT2 = 437
    DUP3 = 292
    PWRITEV = 296
    RECVMMSG = 299
    SENDMMSG = 307
    EXECVEAT = 322
    USERFAULTFD = 323
    COPY_FILE_RANGE = 326
    IO_URING_ENTER = 426
    CLONE3 = 435
    EPOLL_PWAIT2 = 441
    FUTEX_WAITV = 449


class Effect(Enum):
    """What stopping a thread means for the system call that it was in."""

    NONE = "none"
    """It was in none, or the call had its result already: the thread goes on as it was."""
    RESTARTED = "restarted"
    """The kernel takes the call up again, time-outs included, once the thread goes on."""
    DISTURBED = "disturbed"
    """The program sees EINTR or a short count, as after SIGSTOP and SIGCONT."""


def _nobodys(_fd: int) -> bool:
    return False


def supported() -> bool:
    """Whether this machine and this interpreter are of the one kind that is served."""
    return platform.machine() == "x86_64" and sys.maxsize > 1 << 32


def require() -> None:
    """Raise OSError (ENOSYS) with one readable line on any other machine."""
    if not supported():
        raise OSError(
            errno.ENOSYS, f"other processes' threads: x86-64 only, not {platform.machine()}"
        )


def signed(value: int) -> int:
    """An unsigned 64-bit register as a signed number."""
    return value - (1 << 64) if value >> 63 else value


def is_64_bit(registers: Registers) -> bool:
    """Whether the thread runs 64-bit code; the numbers and registers of other code differ."""
    return registers.cs in _USER_CS_64


def after_call(registers: Registers) -> int:
    """Where the instruction stands that the thread entered the kernel by, if it was ``syscall``."""
    return (registers.rip - len(SYSCALL_INSTRUCTION)) & _MASK


def entered_by_syscall(registers: Registers) -> bool:
    """Whether the thread is known to be in the kernel by a ``syscall``; if not, it may be as well.

    The instruction leaves the address that follows it in rcx; int 0x80 leaves rcx alone.
    """
    return registers.rcx == registers.rip and registers.number >= 0


def prepare_call(
    registers: bytearray, instruction: int, number: int, arguments: tuple[int, ...]
) -> None:
    """Let the thread make a system call at ``instruction`` (a ``syscall`` in its code).

    ``registers``: the bytes of its Registers; those that the call takes and leaves are set.
    """
    rdi, rsi, rdx, r10, r8, r9, *_ = (*arguments, 0, 0, 0, 0, 0, 0)
    _pack_call(
        registers,
        _CALL_OFFSET,
        r10 & _MASK,
        r9 & _MASK,
        r8 & _MASK,
        number,
        0,  # rcx: no call leaves it as it was
        rdx & _MASK,
        rsi & _MASK,
        rdi & _MASK,
        _NO_CALL,
        instruction,
    )


def was_interrupted(result: int) -> bool:
    """Whether an injected call has to be made again: it was interrupted before it did anything."""
    return -result in _RESTARTS


def settle(registers: Registers, read: Reader, ours: Ours = _nobodys) -> Effect:
    """See to it that the interrupted call, if any, goes on unnoticed; say what could be had.

    ``registers`` are those of a thread that was stopped and will be given them back. Calls that
    the kernel restarts by itself are left alone. Some calls return EINTR even if no handler runs
    (signal(7), the last list); where such a call would wait for ever, its result is turned into
    that of a call which the kernel restarts unless a handler runs. That is exact: a signal that
    does arrive still gives EINTR. Where it has a time-out, nobody knows how much of it is left.
    A request to a server of ``ours`` that was given up for this, as a whole, is made again as well.
    """
    number = registers.number
    if number < 0:
        return Effect.NONE
    result = registers.result
    if -result in _RESTARTS:
        return Effect.RESTARTED
    if result == -errno.EINTR:
        again = number in _REQUESTS and ours(registers.rdi & 0xFFFFFFFF)
        if again or waits_for_ever(number, registers.arguments, read):
            registers.set_result(-_ERESTARTNOHAND)
            return Effect.RESTARTED
        return Effect.DISTURBED
    count = _wanted(number, registers)
    return Effect.DISTURBED if count is not None and 0 < result < count else Effect.NONE


_REQUESTS: Final = frozenset(
    {
        Number.READ,
        Number.WRITE,
        Number.IOCTL,
        Number.PREAD64,
        Number.PWRITE64,
        Number.READV,
        Number.WRITEV,
        Number.FTRUNCATE,
        Number.FALLOCATE,
    }
)
"""Calls on a descriptor that its server may give up, and then has done nothing of."""

_IORING_ENTER_EXT_ARG: Final = 8
_MSG_WAITALL: Final = 0x100


def waits_for_ever(number: int, arguments: tuple[int, ...], read: Reader) -> bool:
    """Whether this call, never restarted by the kernel, has no time-out and can be made anew."""
    match number:
        case Number.EPOLL_WAIT | Number.EPOLL_PWAIT:
            return arguments[3] & 0x8000_0000 != 0  # an int, negative
        case Number.SEMOP:
            return True
        case Number.EPOLL_PWAIT2 | Number.SEMTIMEDOP:
            return arguments[3] == 0
        case Number.RT_SIGTIMEDWAIT:
            return arguments[2] == 0
        case Number.IO_GETEVENTS:
            return arguments[4] == 0
        case Number.IO_URING_ENTER:
            if arguments[1]:  # to_submit: what was submitted must not be submitted again
                return False
            if not arguments[3] & _IORING_ENTER_EXT_ARG:
                return True
            # struct io_uring_getevents_arg: sigmask, sigmask_sz, min_wait_usec, ts
            argument = read(arguments[4], 24)
            return len(argument) == 24 and argument[12:].count(0) == 12
    return False


def _wanted(number: int, registers: Registers) -> int | None:
    """How many bytes a call was asked to move that moves fewer only if it is interrupted."""
    if number in {Number.WRITE, Number.PWRITE64, Number.SENDTO}:
        return registers.rdx
    if number == Number.RECVFROM and registers.r10 & _MSG_WAITALL:
        return registers.rdx
    return None


_RESTARTED_BY_THE_KERNEL: Final = frozenset(
    {
        Number.FUTEX,
        Number.POLL,
        Number.PPOLL,
        Number.SELECT,
        Number.PSELECT6,
        Number.RESTART_SYSCALL,
        Number.NANOSLEEP,
        Number.CLOCK_NANOSLEEP,
        Number.READ,
        Number.ACCEPT,
        Number.ACCEPT4,
        Number.PAUSE,
        Number.WAIT4,
        Number.RT_SIGSUSPEND,
        Number.FUTEX_WAITV,
    }
)

IN_EXEC: Final = 5
_CLONE_VFORK: Final = 0x4000

NEVER: Final = 4

RUNNING: Final = -1
"""Instead of a number: the thread is in user code, or in a fault."""


def reluctance(number: int, arguments: tuple[int, ...]) -> int:
    """How bad it is to stop a thread that is in this call: from 0, unnoticed, to 5.

    At 3 the program sees it, at 4 the thread does not stop at all, at :data:`IN_EXEC` seizing any
    thread of its process would wait.

    ``number`` is :data:`RUNNING` for a thread in user code. Memory is not looked at.
    """
    if number == RUNNING:
        return 0
    if number in {Number.EXECVE, Number.EXECVEAT}:
        return IN_EXEC
    if number in {Number.VFORK, Number.CLONE3} or (
        number == Number.CLONE and arguments[0] & _CLONE_VFORK
    ):
        return NEVER  # waits for its child, and does not stop before
    if number in _RESTARTED_BY_THE_KERNEL:
        return 1
    if number in _NEVER_RESTARTED:
        return 1 if waits_for_ever(number, arguments, nothing) else 3
    return 3 if number in _SHORTENED else 2


_NEVER_RESTARTED: Final = frozenset(
    {
        Number.EPOLL_WAIT,
        Number.EPOLL_PWAIT,
        Number.EPOLL_PWAIT2,
        Number.SEMOP,
        Number.SEMTIMEDOP,
        Number.RT_SIGTIMEDWAIT,
        Number.IO_GETEVENTS,
        Number.IO_URING_ENTER,
    }
)

_SHORTENED: Final = frozenset(
    {
        Number.WRITE,
        Number.PWRITE64,
        Number.WRITEV,
        Number.PWRITEV,
        Number.SENDTO,
        Number.SENDMSG,
        Number.SENDMMSG,
        Number.SENDFILE,
        Number.SPLICE,
        Number.COPY_FILE_RANGE,
        Number.RECVMMSG,
    }
)


def nothing(_address: int, _size: int) -> bytes:
    """A :data:`Reader` for when memory is not to be looked at."""
    return b""
