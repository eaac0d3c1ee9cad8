"""Where in a program's address space a region may lie.

For: mounts on which mmap() takes all of a region, at a multiple of its alignment
(``Semantics.whole``), as the kernel series has it so that page tables can be shared. Elsewhere
that is the program's own affair, and nothing here is asked.

Promises: pure. Leaves out: what is mapped where, and how an mmap() is led to its place
(``clients/placing.py``). Source: mmap(2); the errors are those of the series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from msharefs.region.errors import BadArgument, NoRoom
from msharefs.region.pages import page_up

if TYPE_CHECKING:
    from collections.abc import Iterable

    from msharefs.region.region import Region

MAP_FIXED: Final = 0x10
MAP_LOCKED: Final = 0x2000
MAP_POPULATE: Final = 0x8000
MAP_FIXED_NOREPLACE: Final = 0x100000
_EXACT: Final = MAP_FIXED | MAP_FIXED_NOREPLACE
_TOUCHING: Final = MAP_POPULATE | MAP_LOCKED


@attrs.frozen
class Wanted:
    """Arguments of mmap(2): ``address`` is a hint unless ``flags`` say that it is exact."""

    address: int
    length: int
    flags: int
    offset: int = 0

    @property
    def exact(self) -> bool:
        return bool(self.flags & _EXACT)

    @property
    def touches(self) -> bool:
        """Whether the kernel would touch every page that is mapped, before anybody can forbid it.

        Also those of holes: the memory of all of a region.
        """
        return bool(self.flags & _TOUCHING)


def check_window(region: Region, wanted: Wanted) -> None:
    """Raises BadArgument (NotSized before all else) for what the series does not map."""
    region.check_sized()
    if page_up(wanted.length) != region.size:
        raise BadArgument(
            f"mmap() of {wanted.length} bytes: a region is mapped as a whole, {region.size} bytes"
        )
    if wanted.exact and wanted.address % region.semantics.alignment:
        raise BadArgument(
            f"mmap() at {wanted.address:#x}, which is no multiple of {region.semantics.alignment}"
        )


def place(wanted: Wanted, alignment: int, taken: Iterable[tuple[int, int]], end: int) -> int:
    """The address for a window that may lie anywhere: the hint rounded up, else the highest.

    ``taken``: what is mapped, ``[start, end)`` each, lowest first; ``end`` is that of the address
    space. Raises NoRoom.
    """
    size = page_up(wanted.length)
    hint = rounded_up(wanted.address, alignment)
    best, low = 0, alignment  # nothing lies at 0
    for start, stop in [*taken, (end, end)]:
        high = min(start, end)
        if low <= hint <= high - size and hint:
            return hint
        at = (high - size) // alignment * alignment
        if at >= low:
            best = at
        low = max(low, stop)
    if not best:
        raise NoRoom(f"no {size} free bytes at a multiple of {alignment}")
    return best


def rounded_up(address: int, alignment: int) -> int:
    """The next multiple."""
    return -(-address // alignment) * alignment


def placed(wanted: Wanted, address: int) -> Wanted:
    """The same mapping at ``address``, if that is free, and of all of the region.

    The series passes over the offset, and touches nothing whatever ``flags`` say.
    """
    flags = wanted.flags & ~_TOUCHING
    if not wanted.exact:
        flags |= MAP_FIXED_NOREPLACE
    return attrs.evolve(wanted, address=address, flags=flags, offset=0)
