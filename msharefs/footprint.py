"""What a region costs each of its clients, as /proc says it.

For: ``mshare stat`` and ``mshare report``. Which part of a process maps the region comes from its
``clients`` file, everything else from here.

Measured: what of the region is present in a process's page tables and by which size of page
(PAGEMAP_SCAN, Linux 6.7), and the page tables of the whole process (VmPTE). Derived: the tables
for the region alone, which the kernel does not count by mapping; they follow from what is present,
and are too few by those that have become empty (see pagetables.py).

Promises: reads only; a process that ends meanwhile is passed over, and of one that may not be
looked at the values are None. A process is looked at part by part while it runs.

Leaves out: ranges where an object of its own lies over the region: they are mappings of another
file.

Source: the kernel's Documentation/admin-guide/mm/pagemap.rst; proc_pid_status(5).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from array import array
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.pagetables import Span, Tables, tables_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from msharefs.client import ClientMapping

PAGEMAP_SCAN: Final = 0xC0606610
"""_IOWR('f', 16, struct pm_scan_arg), 96 bytes (linux/fs.h)."""

_PRESENT: Final = 1 << 3
_SWAPPED: Final = 1 << 4
_HUGE: Final = 1 << 6

# size, flags, start, end, walk_end, vec, vec_len, max_pages,
# category_inverted, category_mask, category_anyof_mask, return_mask
_ARGS: Final = struct.Struct("<12Q")
_WALK_END: Final = struct.Struct("<Q")
_WALK_END_AT: Final = 32
_REGIONS: Final = 1024
"""Of three numbers each: start, end, categories."""

_GONE: Final = {errno.ESRCH, errno.ENOENT}
_MISSING: Final = {errno.EACCES, errno.EPERM, errno.ENOTTY, errno.EINVAL}
"""Not for us to see, or a kernel without PAGEMAP_SCAN."""


@attrs.frozen
class Footprint:
    """One process. Sizes in bytes, None if they cannot be had.

    ``mapped``: how much of the region it maps. Of that, ``present`` is in its page tables,
    ``huge`` of it by PMD; ``tables`` are those for the region. ``vmpte``: all of the process's.
    """

    pid: int
    comm: str
    mappings: int
    mapped: int
    present: int | None
    huge: int | None
    tables: Tables | None
    vmpte: int | None


def footprints(clients: Iterable[ClientMapping]) -> Iterator[Footprint]:
    """One of each process, by pid. Blocking: about 20 ms a GiB that is mapped by small pages."""
    ordered = sorted(clients, key=lambda mapping: (mapping.pid, mapping.start))
    for pid, mappings in groupby(ordered, key=lambda mapping: mapping.pid):
        try:
            yield _footprint(pid, list(mappings))
        except OSError as error:
            if error.errno not in _GONE:
                raise


def _footprint(pid: int, mappings: list[ClientMapping]) -> Footprint:
    vmpte = page_tables(pid)
    spans = _spans(pid, mappings)
    sizes = None if spans is None else [(span.end - span.start, span.huge) for span in spans]
    return Footprint(
        pid=pid,
        comm=mappings[0].comm,
        mappings=len(mappings),
        mapped=sum(mapping.end - mapping.start for mapping in mappings),
        present=None if sizes is None else sum(size for size, _ in sizes),
        huge=None if sizes is None else sum(size for size, huge in sizes if huge),
        tables=None if spans is None else tables_of(spans),
        vmpte=vmpte,
    )


def page_tables(pid: int) -> int | None:
    """VmPTE of a process: the bytes of its page tables of all levels but the top one.

    Raises ProcessLookupError if it has ended.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    except PermissionError:
        return None
    _, found, rest = status.partition("\nVmPTE:")
    if not found:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has no memory any more")
    return int(rest.split(None, 1)[0]) * 1024


def _spans(pid: int, mappings: list[ClientMapping]) -> list[Span] | None:
    """What is present of the mappings; None if it is not to be had."""
    try:
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise
    try:
        found = [span for m in mappings for span in scan(pagemap, m.start, m.end)]
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise
    finally:
        os.close(pagemap)
    return found


def scan(pagemap: int, start: int, end: int) -> Iterator[Span]:
    """What has an entry in the page tables between two addresses, lowest first.

    ``pagemap`` is an open /proc/PID/pagemap. Swapped pages, and those that are marked for
    userfaultfd, have an entry as well. Raises OSError: ESRCH if the process has ended, ENOTTY or
    EINVAL without PAGEMAP_SCAN.
    """
    regions = array("Q", bytes(8 * 3 * _REGIONS))
    place, _ = regions.buffer_info()
    wanted, shown = _PRESENT | _SWAPPED, _PRESENT | _SWAPPED | _HUGE
    while start < end:
        args = bytearray(
            _ARGS.pack(_ARGS.size, 0, start, end, 0, place, _REGIONS, 0, 0, 0, wanted, shown)
        )
        found = fcntl.ioctl(pagemap, PAGEMAP_SCAN, args)
        for number in range(found):
            low, high, categories = regions[3 * number : 3 * number + 3]
            yield Span(low, high, huge=bool(categories & _HUGE))
        # walk_end can lie before the end of what was found (seen on 6.18, when the kernel's own
        # buffer was just full at the end): from there on it would be told once more.
        (walk_end,) = _WALK_END.unpack_from(args, _WALK_END_AT)
        start = max(walk_end, high) if found else walk_end
