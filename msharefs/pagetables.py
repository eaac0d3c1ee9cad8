"""What page tables cost: how many a process needs for the ranges it has touched.

For: ``mshare stat`` and ``mshare report``, which say what the clients of a region spend on page
tables, and what they would with small pages, with huge ones, and with one set of tables for all.

Promises: pure arithmetic on byte ranges, exact for the ranges given. x86-64 with four levels: an
entry has 8 bytes and a table is a page of 4 KiB, so a table of PTEs covers 2 MiB, one of PMDs
1 GiB, one of PUDs 512 GiB. A page of 2 MiB is an entry of a table of PMDs and needs no PTEs.

Leaves out: the top table (PGD), of which each process has one whatever it maps (VmPTE of
proc_pid_status(5) leaves it out too); a fifth level, which a region meets once in 256 TiB; tables
that have become empty, which the kernel frees only when all around them is unmapped.

Source: the kernel's Documentation/arch/x86/x86_64/mm.rst and Documentation/mm/page_tables.rst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

TABLE: Final = 4096
"""Bytes of a table, of any level."""
PTE_SPAN: Final = 2 << 20
PMD_SPAN: Final = 1 << 30
PUD_SPAN: Final = 512 << 30
"""Bytes of address space that a table of that level covers."""
HUGE_PAGE: Final = PTE_SPAN


@attrs.frozen
class Span:
    """``[start, end)`` in bytes; ``huge`` if it is mapped by pages of 2 MiB."""

    start: int
    end: int
    huge: bool = False


@attrs.frozen
class Tables:
    """How many tables of each level; ``size`` in bytes."""

    pte: int = 0
    pmd: int = 0
    pud: int = 0

    @property
    def size(self) -> int:
        return (self.pte + self.pmd + self.pud) * TABLE

    def __add__(self, other: Tables) -> Tables:
        return Tables(self.pte + other.pte, self.pmd + other.pmd, self.pud + other.pud)


def tables_of(spans: Iterable[Span]) -> Tables:
    """The tables behind these spans of one address space.

    Raises ValueError for spans that overlap, are empty, or are not in order.

    >>> tables_of([Span(0, 300 << 30)]).pte * TABLE * 1500 / (1 << 30)
    878.90625
    """
    pte, pmd, pud = _Blocks(PTE_SPAN), _Blocks(PMD_SPAN), _Blocks(PUD_SPAN)
    end = 0
    for span in spans:
        if not end <= span.start < span.end:
            raise ValueError(f"{span} is empty or not behind {end:#x}")
        end = span.end
        if not span.huge:
            pte.add(span)
        pmd.add(span)
        pud.add(span)
    return Tables(pte.count, pmd.count, pud.count)


class _Blocks:
    """How many aligned blocks the spans have a part in."""

    def __init__(self, size: int) -> None:
        self.size: Final = size
        self.count = 0
        self._last = -1

    def add(self, span: Span) -> None:
        last = (span.end - 1) // self.size
        first = max(span.start // self.size, self._last + 1)
        self.count += max(0, last - first + 1)
        self._last = last


def in_small_pages(spans: Iterable[Span]) -> list[Span]:
    """The same bytes with 4 KiB pages; spans that touch become one."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].end == span.start:
            merged[-1] = Span(merged[-1].start, span.end)
        else:
            merged.append(Span(span.start, span.end))
    return merged


def in_huge_pages(spans: Iterable[Span]) -> list[Span]:
    """The same bytes with huge pages wherever a whole aligned one fits."""
    found: list[Span] = []
    for span in in_small_pages(spans):
        first = -(-span.start // HUGE_PAGE) * HUGE_PAGE
        last = span.end // HUGE_PAGE * HUGE_PAGE
        if first >= last:
            found.append(span)
            continue
        parts = (Span(span.start, first), Span(first, last, huge=True), Span(last, span.end))
        found += [part for part in parts if part.start < part.end]
    return found


@attrs.frozen
class Cost:
    """Bytes of page tables of ``clients`` processes that have each touched all of a region.

    ``small``: 4 KiB pages, tables of their own; ``thp``: huge pages, tables of their own;
    ``shared``: 4 KiB pages and one set of tables that every client's top table points to, as the
    kernel's mshare series has it.
    """

    clients: int
    small: int
    thp: int
    shared: int


def cost(mapped: Iterable[Span], clients: int) -> Cost:
    """What a region with memory at ``mapped`` would cost; mapped at an aligned address.

    At another address it may be a table more at each level. Raises ValueError if ``clients`` is
    negative.
    """
    if clients < 0:
        raise ValueError("fewer clients than none")
    spans = in_small_pages(mapped)
    small = tables_of(spans).size
    thp = tables_of(in_huge_pages(spans)).size
    return Cost(clients, small * clients, thp * clients, small if clients else 0)
