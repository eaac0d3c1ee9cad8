"""Another process to try things on, and whether it may be held."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PTRACE_SEIZE: Final = 0x4206

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def other_process() -> Iterator[int]:
    """A child that waits to be ended: its process id."""
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def checked(result: int) -> int:
    """What a call of libc returned. Raises OSError where that is an error."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def try_ptrace() -> None:
    """Raises OSError if other processes may not be held."""
    with other_process() as child:
        checked(int(_libc.ptrace(PTRACE_SEIZE, child, None, None)))
