"""By which way a range is protected in the processes that map it.

*vma*: a thread of each process is borrowed for an mprotect(2). The kernel enforces it by itself,
huge mappings stay whole, and it outlives the server; it costs tens of microseconds a process.

*fault*: the range is write-protected from outside, by each process's userfaultfd. No thread is
stopped and a small range costs a few microseconds a process, but the cost and the page tables grow
with the pages touched, and the protection ends with the server.

Promises: pure. ``way`` is the whole of ``-o protect=auto``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msharefs.abi import PAGE_SIZE

MANY_CLIENTS: Final = 8
"""From here on stopping a thread of each costs more than a millisecond."""
SMALL: Final = 512 * PAGE_SIZE
"""Bytes. The largest range for which write-protecting from outside was measured to be faster than
borrowing threads, with 300 processes that had touched every page of it."""


class Way(StrEnum):
    """``-o protect=``, and what one change is done by (never AUTO)."""

    AUTO = "auto"
    VMA = "vma"
    FAULT = "fault"


class Enforce(StrEnum):
    """``-o enforce=``: what becomes of a process that cannot be made to obey."""

    BEST = "best"
    """It is let in, listed as unenforced with the reason, and an event tells."""
    STRICT = "strict"
    """It is refused (EPERM), and so is a change that does not reach every process."""


def way(choice: Way, size: int, clients: int, *, huge: bool) -> Way:
    """How to make ``size`` bytes read-only in so many clients.

    ``huge``: the memory may be mapped by huge pages, which write-protection by faults would split.
    """
    if choice is not Way.AUTO:
        return choice
    small = size <= SMALL and not huge
    return Way.FAULT if small and clients >= MANY_CLIENTS else Way.VMA
