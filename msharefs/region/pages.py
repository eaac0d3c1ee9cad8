"""Page arithmetic on region offsets.

Offsets and sizes arrive as unsigned 64-bit numbers from programs, so sums are checked against
2**64 although Python's integers would not overflow.
"""

from __future__ import annotations

from typing import Final

from msharefs.abi import PAGE_SIZE
from msharefs.region.errors import BadRange

PAGE_MASK: Final = PAGE_SIZE - 1
U64_END: Final = 1 << 64


def page_up(size: int) -> int:
    """Round ``size`` (bytes) up to whole pages."""
    return (size + PAGE_MASK) & ~PAGE_MASK


def page_down(offset: int) -> int:
    """Round ``offset`` (bytes) down to its page."""
    return offset & ~PAGE_MASK


def checked_end(offset: int, size: int, limit: int) -> int:
    """The end of ``[offset, offset + size)``, a page-aligned range within ``[0, limit)``.

    All in bytes. Raises BadRange with the first reason that applies, as mmap(2) and munmap(2)
    have them: EINVAL for an empty or unaligned range.
    """
    if size <= 0:
        raise BadRange("the size is zero")
    if offset < 0 or (offset | size) & PAGE_MASK:
        raise BadRange(f"offset {offset:#x} or size {size:#x} is not a multiple of {PAGE_SIZE}")
    end = offset + size
    if end >= U64_END:
        raise BadRange(f"offset {offset:#x} plus size {size:#x} overflows")
    if end > limit:
        raise BadRange(f"{offset:#x}-{end:#x} reaches past the region's end at {limit:#x}")
    return end
