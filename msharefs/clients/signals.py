"""Signals to threads whose access was denied or watched, as the processor would send them.

Source: rt_tgsigqueueinfo(2), sigaction(2) (``si_addr``), proc_pid_status(5), proc_pid_syscall(5).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Final

NR_RT_TGSIGQUEUEINFO: Final = 297
SI_QUEUE: Final = -1
"""A code below zero: the kernel lets nobody send what looks as if it came from the kernel."""

_SIGINFO: Final = struct.Struct("=iii4xQQ96x")
"""signo, errno, code; si_addr (or si_pid and si_uid), then si_value: 128 bytes in all."""

_OF_ADDRESS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Stand(Enum):
    """Where a thread is."""

    FAULT = "fault"
    """Waits, and not in a system call: in a page fault of its own code."""
    CALL = "call"
    """Waits for a page inside a system call."""
    ELSEWHERE = "elsewhere"
    """Runs, waits for something else, or has ended."""


def stand_of(tid: int) -> Stand:
    """Where the thread is this moment. One that is just going to sleep is still ELSEWHERE."""
    try:
        text = Path(f"/proc/{tid}/syscall").read_text()
        if text.startswith("-1 "):
            return Stand.FAULT
        if text.startswith("running"):
            return Stand.ELSEWHERE
        waits = Path(f"/proc/{tid}/wchan").read_text()
    except OSError:
        return Stand.ELSEWHERE
    return Stand.CALL if waits == "handle_userfault" else Stand.ELSEWHERE


def takes(tid: int, number: int) -> bool:
    """Whether the signal does something to the thread. False if it has ended.

    It does not if it is blocked or ignored, nor if the process is the first of a pid namespace and
    has no handler: such a one is not to be ended by signals (pid_namespaces(7)).
    """
    bit = 1 << number - 1
    try:
        status = Path(f"/proc/{tid}/status").read_text(errors="replace")
    except OSError:
        return False
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    if (int(fields["SigBlk"], 16) | int(fields["SigIgn"], 16)) & bit:
        return False
    first = "1" in fields.get("NSpid", "").split()[1:]
    return not first or bool(int(fields["SigCgt"], 16) & bit)


def segv(pid: int, tid: int, address: int) -> None:
    """SIGSEGV for an access to ``address`` that did not happen, to a thread that waits in it.

    A thread that blocks or ignores SIGSEGV is killed with its process, as by the kernel (though
    by SIGKILL: nobody but the kernel can force SIGSEGV upon it). Never raises: it may have ended.
    """
    if not takes(tid, signal.SIGSEGV):
        kill(pid)
        return
    _queue(pid, tid, signal.SIGSEGV, address)


def kill(pid: int) -> None:
    """SIGKILL. Never raises: it may have ended."""
    if pid > 0:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def send(pid: int, tid: int, number: int, address: int) -> None:
    """``number`` to a thread, ``address`` as its ``si_addr`` (or, in others, ``si_value``).

    Never raises: it may have ended.
    """
    if pid > 0 and tid > 0:
        _queue(pid, tid, number, address)


def _queue(pid: int, tid: int, number: int, address: int) -> None:
    value = 0 if number in _OF_ADDRESS else address
    first = address if number in _OF_ADDRESS else os.getpid()
    info = _SIGINFO.pack(number, 0, SI_QUEUE, first, value)
    _libc.syscall(
        ctypes.c_long(NR_RT_TGSIGQUEUEINFO),
        ctypes.c_int(pid),
        ctypes.c_int(tid),
        ctypes.c_int(number),
        ctypes.c_char_p(info),
    )
