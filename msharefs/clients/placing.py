"""Lead a process's mmap() to a place, or move what it has just mapped there.

For: mounts that have a say in where a region lies (``region/window.py``, which chooses). The gate
that sees the arguments before the call is made has it made at the place; the other one moves the
mapping before its program knows where it is.

Leaves out: which place. Sources: mmap(2), mremap(2), proc_pid_syscall(5), proc_pid_maps(5).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from msharefs.clients.arch import Number
from msharefs.clients.gone import Gone
from msharefs.region.window import Wanted

if TYPE_CHECKING:
    from msharefs.clients.borrow import Body, Borrowed
    from msharefs.clients.tracer import Session

_PROT_NONE: Final = 0
_RESERVING: Final = 0x104022
"""MAP_PRIVATE, ANONYMOUS, NORESERVE, FIXED_NOREPLACE."""
_MOVING: Final = 3
"""MREMAP_MAYMOVE, MREMAP_FIXED."""
_MAX_ERRNO: Final = 4095

_TRIES: Final = 100
_PAUSE: Final = 0.0005
"""Seconds. A thread that asks us something is asleep within microseconds of asking."""


def taken(pid: int) -> list[tuple[int, int]]:
    """What a process has mapped, ``[start, end)`` each, lowest first. Blocks. Raises Gone."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_bytes().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"process {pid}") from None
    ranges = (line.split(b" ", 1)[0].split(b"-") for line in lines)
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


async def asked_mmap(tid: int) -> Wanted | None:
    """The arguments of the mmap() in which a thread waits for us; None if they are not to be had."""
    for _ in range(_TRIES):
        words = _system_call(tid)
        if words[:1] != ["running"]:  # it has come to its sleep
            if len(words) < 7 or int(words[0]) != Number.MMAP:
                return None
            address, length, _, flags, _, offset = (int(word, 16) for word in words[1:7])
            return Wanted(address, length, flags, offset)
        await trio.sleep(_PAUSE)
    return None


def _system_call(tid: int) -> list[str]:
    try:
        return Path(f"/proc/{tid}/syscall").read_text().split()
    except OSError:
        return []


def moving(result: int, address: int, size: int, to: int) -> Body[bool]:
    """Move what the thread has just mapped, from ``address``; False if it is not to be done now.

    The thread is stopped at the end of its mmap(), which returned ``result``; unless a signal has
    taken it to a handler since, for then that cannot be replaced any more. The two places must not
    overlap. Raises FileExistsError if something lies at ``to``, OSError.
    """

    def body(thread: Borrowed) -> Session[bool]:
        if thread.saved.number != Number.MMAP or thread.saved.result != result:
            return False
        # Moving goes over whatever is there. So the place is taken first, which fails then.
        kept = yield from thread.call(Number.MMAP, to, size, _PROT_NONE, _RESERVING, -1, 0)
        if -_MAX_ERRNO <= kept < 0:
            raise OSError(-kept, os.strerror(-kept))
        moved = yield from thread.call(Number.MREMAP, address, size, size, _MOVING, to)
        if -_MAX_ERRNO <= moved < 0:
            yield from thread.call(Number.MUNMAP, to, size)
            raise OSError(errno.ENOMEM, f"mremap: {os.strerror(-moved)}")
        return True

    return body
