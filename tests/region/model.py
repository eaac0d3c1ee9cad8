"""A region as anybody would write it down: one entry for each page, and every answer by counting.

Slow and plain on purpose. What it shares with the package is the vocabulary (objects,
protections, errors), never the way of working something out.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import attrs

from msharefs.abi import Kind, Prot
from msharefs.region.mapping import Change, Mapping, ObjectRef

if TYPE_CHECKING:
    from msharefs.region.region import Region
    from msharefs.region.table import MappingTable

PAGE = 4096

ANONYMOUS = ObjectRef(Kind.ANON)
FILE_A = ObjectRef(Kind.FILE, ident=1, dev_major=8, dev_minor=1, ino=100)
FILE_B = ObjectRef(Kind.FILE, ident=2, dev_major=8, dev_minor=1, ino=200)
FILE_A_AGAIN = ObjectRef(Kind.FILE, ident=3, dev_major=8, dev_minor=1, ino=100)
"""The file of FILE_A, opened a second time."""


@attrs.frozen
class Page:
    """What lies in one page; ``object_offset`` is the page's own, 0 for memory."""

    prot: int
    object: ObjectRef
    object_offset: int
    max_prot: int
    flags: int


Pages = dict[int, Page]


def pages_of(mapping: Mapping) -> Pages:
    """A mapping, page by page, by page number."""
    is_file = mapping.object.kind == Kind.FILE
    return {
        number: Page(
            int(mapping.prot),
            mapping.object,
            mapping.object_offset + number * PAGE - mapping.start if is_file else 0,
            int(mapping.max_prot),
            int(mapping.flags),
        )
        for number in range(mapping.start // PAGE, mapping.end // PAGE)
    }


def mappings_of(pages: Pages) -> list[Mapping]:
    """The fewest mappings that say the same, lowest first."""
    runs: list[tuple[int, int]] = []
    for number in sorted(pages):
        if runs and runs[-1][1] == number and _same_run(pages, number):
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return [
        Mapping(
            first * PAGE,
            end * PAGE,
            Prot(pages[first].prot),
            pages[first].object,
            pages[first].object_offset,
            Prot(pages[first].max_prot),
            pages[first].flags,
        )
        for first, end in runs
    ]


def _same_run(pages: Pages, number: int) -> bool:
    """Whether a page goes on where the page below it, which is mapped, leaves off."""
    below, page = pages[number - 1], pages[number]
    step = PAGE if page.object.kind == Kind.FILE else 0
    return page == attrs.evolve(below, object_offset=below.object_offset + step)


def rights_of(pages: Pages) -> int:
    union = 0
    for page in pages.values():
        union |= page.prot
    return union


def snapshot(region: Region) -> tuple[object, ...]:
    """All that a change may change but the version, down to the table's own bookkeeping."""
    table = region.table
    return (
        list(table),
        len(table),
        table.mapped,
        table.rights,
        region.rights,
        region.size,
        region.limit,
        list(table._count_of_prot),
        list(table._starts),
        dict(table._by_start),
        dict(table._by_end),
    )


def check_table(table: MappingTable, pages: Pages) -> None:
    """The table says what the model says, in the one canonical way, and its indexes agree."""
    mappings = list(table)
    assert mappings == mappings_of(pages)
    assert len(table) == len(mappings)
    for mapping in mappings:
        assert mapping.start < mapping.end
        assert mapping.start % PAGE == mapping.end % PAGE == 0
    for below, above in itertools.pairwise(mappings):
        assert below.end <= above.start, "sorted and disjoint"
        assert not above.continues(below), "neighbours that could be one are one"
    assert table.mapped == len(pages) * PAGE == sum(m.size for m in mappings)
    assert table.rights == rights_of(pages)
    assert list(table._starts) == [m.start for m in mappings]
    assert table._by_start == {m.start: m for m in mappings}
    assert table._by_end == {m.end: m for m in mappings}
    assert table._count_of_prot == [sum(m.prot == prot for m in mappings) for prot in range(8)]


def check_change(change: Change, before: Pages, after: Pages, new_content: set[int]) -> None:
    """A change says exactly how ``after`` differs from ``before``.

    ``new_content`` are the pages whose content is not what it was: unmapped, mapped, or mapped
    anew although the table looks the same.
    """
    differing = {
        number
        for number in before.keys() | after.keys()
        if before.get(number) != after.get(number) or number in new_content
    }
    seen: set[int] = set()
    last_end = 0
    for part in change.ranges:
        assert last_end <= part.start < part.end, "ranges are sorted, disjoint and not empty"
        last_end = part.end
        for side, pages in ((part.old, before), (part.new, after)):
            numbers = range(part.start // PAGE, part.end // PAGE)
            if side is None:
                assert not any(number in pages for number in numbers)
            else:
                assert (side.start, side.end) == (part.start, part.end), "clipped to the range"
                assert pages_of(side) == {number: pages.get(number) for number in numbers}
            seen.update(numbers)
        assert not (part.old is None and part.new is None)
        _check_rights(part, before, after, new_content)
    assert seen == differing

    for mappings in (change.removed, change.added):
        for below, above in itertools.pairwise(mappings):
            assert below.end <= above.start, "sorted and disjoint"
    whole_before, whole_after = mappings_of(before), mappings_of(after)
    kept = [m for m in whole_before if m not in change.removed]
    assert len(kept) + len(change.removed) == len(whole_before), "removed are whole and were there"
    assert sorted([*kept, *change.added], key=lambda m: m.start) == whole_after

    assert change.rights_before == rights_of(before)
    assert change.rights_after == rights_of(after)
    assert change.gained == rights_of(after) & ~rights_of(before)
    assert change.mapped_delta == (len(after) - len(before)) * PAGE
    assert bool(change.ranges) == bool(differing)
    twice = change.inverse().inverse()
    assert twice == attrs.evolve(change, version=change.version + 2)


def _check_rights(part, before: Pages, after: Pages, new_content: set[int]) -> None:
    for number in range(part.start // PAGE, part.end // PAGE):
        old = before[number].prot if number in before else 0
        new = after[number].prot if number in after else 0
        goes = number in before and number in new_content
        assert part.replaced == goes
        assert part.gained == new & ~old
        assert part.lost == (old if goes else old & ~new)
