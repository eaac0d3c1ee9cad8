"""Clients ask the kernel for huge pages, where the region's table does.

For: ``batch.py``. A tmpfs with ``huge=advise`` gives huge pages to an access by way of a mapping
that madvise(MADV_HUGEPAGE) was called for, and to no other. So a client whose region has mappings
with MAP_HUGETLB calls that by a borrowed thread: together with what else it has to do, and before
the right to touch what is new is given.

Promises: once for each client and range. It is advice: what the kernel says of it is passed over,
and a client that cannot be borrowed for it alone fails no change. mprotect(2), fork(2) and mremap(2)
keep the advice; a forked client, of whom that is not known, is asked once more.

Leaves out: taking advice back. A range that was unmapped, or replaced without the flag, is still
advised in those who had it mapped before, and may get huge pages from them: that is harmless, and
MADV_NOHUGEPAGE would not undo it but forbid them what others map by huge pages. Nor is it seen that
a client has unmapped a window and mapped it anew at the same address, where no gate tells of that
and nobody looked in between: it gets what others touch first.
Kernels that free no empty page tables (CONFIG_PT_RECLAIM, Linux 6.14) show by small pages what was
touched by small pages before.

Sources: madvise(2), the kernel's Documentation/admin-guide/mm/transhuge.rst and mm/shmem.c.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from msharefs.clients.arch import Number
from msharefs.region.spans import SpanSet

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from msharefs.clients.borrow import Body, Borrowed
    from msharefs.clients.procmap import MappedRange
    from msharefs.clients.roster import Client
    from msharefs.clients.tracer import Session
    from msharefs.service.batch import Batch

    Range: TypeAlias = tuple[int, int]

MADV_DONTNEED: Final = 4
MADV_HUGEPAGE: Final = 14


def missing_advice(batch: Batch) -> dict[Client, list[Range]]:
    """The addresses for which each client is still to ask, by the table as it is now."""
    table, served = batch.file.region.table, batch.layout.served
    if not batch.enforcer.advises or not table.huge or not served:
        return {}
    ranges = table.asking_for_huge(served[0].start, served[-1].end)
    if not ranges:
        return {}
    missing: dict[Client, list[Range]] = {}
    known: dict[int, list[Range]] = {}  # by windows, which forked clients share
    for client, windows in batch.windows.items():
        attached = client.regions.get(batch.file.ino)
        if attached is None:
            continue
        wanted = known.get(id(windows))
        if wanted is None:
            wanted = known[id(windows)] = _addresses(windows, ranges)
        lacking = [part for part in wanted if attached.advised.within(*part) != [part]]
        if lacking:
            missing[client] = lacking
    return missing


def _addresses(windows: Iterable[MappedRange], ranges: Sequence[Range]) -> list[Range]:
    """Where ``ranges`` of the region, sorted, are seen; neighbours as one."""
    ends = [end for _, end in ranges]
    found = SpanSet()
    for window in windows:
        shift = window.start - window.offset
        top = window.end - shift
        for start, end in ranges[bisect_right(ends, window.offset) :]:
            if start >= top:
                break
            found.add(max(start, window.offset) + shift, min(end, top) + shift)
    return list(found)


def advising(ranges: Iterable[Range], then: Body[None]) -> Body[None]:
    """What a borrowed thread does for it, and ``then`` the rest."""

    def body(thread: Borrowed) -> Session[None]:
        for start, end in ranges:
            # EINVAL where the kernel has no such pages, ENOMEM where the client has unmapped some.
            # A table of small pages that is left from what lay there would be in the way of a huge
            # one, even if it is empty; the memory itself is shared, and stays.
            yield from thread.call(Number.MADVISE, start, end - start, MADV_DONTNEED)
            yield from thread.call(Number.MADVISE, start, end - start, MADV_HUGEPAGE)
        yield from then(thread)

    return body


def note_advice(
    batch: Batch, asked: Mapping[Client, Iterable[Range]], outcomes: Mapping[Client, Any]
) -> None:
    """Those that did as they were asked need not be asked again."""
    for client, ranges in asked.items():
        attached = client.regions.get(batch.file.ino)
        if attached is not None and not isinstance(outcomes.get(client), Exception):
            for part in ranges:
                attached.advised.add(*part)


def forget_advice(client: Client, inode: int) -> None:
    """Some of what the client maps of a region is mapped anew, which nobody has asked for."""
    attached = client.regions.get(inode)
    if attached is not None:
        attached.advised = SpanSet()
