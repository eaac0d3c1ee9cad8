"""The rules of mmap(2), munmap(2) and mprotect(2), one by one, on a table of mappings."""

from __future__ import annotations

import random

import pytest

from msharefs.abi import Prot
from msharefs.region import errors
from msharefs.region.mapping import ANON, PROTS, Mapping, ObjectRef
from msharefs.region.table import MappingTable
from tests.region.model import (
    FILE_A,
    FILE_A_AGAIN,
    FILE_B,
    PAGE,
    Page,
    Pages,
    check_change,
    check_table,
    pages_of,
)

NONE, R, RW = Prot.NONE, Prot.READ, Prot.READ | Prot.WRITE
RX = Prot.READ | Prot.EXEC


def anon(first: int, end: int, prot: Prot = RW) -> Mapping:
    """Memory over pages ``[first, end)``."""
    return Mapping(first * PAGE, end * PAGE, prot)


def file(first: int, end: int, prot: Prot, obj: ObjectRef = FILE_A, at: int = 0) -> Mapping:
    """A file from its page ``at`` over pages ``[first, end)``."""
    return Mapping(first * PAGE, end * PAGE, prot, obj, at * PAGE, flags=1)


def table_of(*mappings: Mapping) -> MappingTable:
    table = MappingTable()
    for mapping in mappings:
        table.apply(table.plan_map(mapping))
    return table


def protect(table: MappingTable, first: int, end: int, prot: Prot) -> None:
    table.apply(table.plan_protect(first * PAGE, end * PAGE, prot))


def unmap(table: MappingTable, first: int, end: int) -> None:
    table.apply(table.plan_unmap(first * PAGE, end * PAGE))


def test_an_empty_table_has_nothing_and_gives_nothing():
    table = MappingTable()
    assert list(table) == []
    assert (len(table), table.mapped, table.rights) == (0, 0, NONE)
    assert table.at(0) is None
    assert table.at_or_after(0) is None
    with pytest.raises(errors.NothingThere):
        table.query(0)
    assert table.plan_unmap(0, PAGE).ranges == ()
    with pytest.raises(errors.HoleInRange):
        table.plan_protect(0, PAGE, R)


def test_planning_changes_nothing():
    table = table_of(anon(0, 2))
    table.plan_map(anon(1, 5, R))
    table.plan_unmap(0, PAGE)
    table.plan_protect(0, PAGE, R)
    assert list(table) == [anon(0, 2)]
    assert table.version == 1


# -- mmap(2) with MAP_FIXED


def test_map_replaces_what_overlaps_and_splits_what_reaches_out():
    table = table_of(anon(0, 4), anon(6, 10, R))
    change = table.plan_map(file(2, 8, R))
    assert change.removed == (anon(0, 4), anon(6, 10, R))
    assert change.added == (anon(0, 2), file(2, 8, R), anon(8, 10, R))
    assert [(r.start // PAGE, r.end // PAGE, r.replaced) for r in change.ranges] == [
        (2, 4, True),
        (4, 6, False),
        (6, 8, True),
    ]
    table.apply(change)
    assert list(table) == [anon(0, 2), file(2, 8, R), anon(8, 10, R)]


def test_map_in_the_middle_leaves_two_halves_of_a_file_at_the_right_offsets():
    table = table_of(file(0, 10, R, at=100))
    table.apply(table.plan_map(anon(4, 6)))
    assert list(table) == [file(0, 4, R, at=100), anon(4, 6), file(6, 10, R, at=106)]


def test_mapping_the_same_again_gives_new_content():
    table = table_of(anon(0, 2))
    change = table.plan_map(anon(0, 2))
    (part,) = change.ranges
    assert part.replaced
    assert part.old == part.new == anon(0, 2)
    assert part.lost == RW, "whatever was there is gone"
    assert part.gained == NONE
    assert change.mapped_delta == 0
    table.apply(change)
    assert list(table) == [anon(0, 2)]


@pytest.mark.parametrize(("first", "end"), [(0, 1), (1, 3), (3, 6), (0, 9), (2, 3)])
def test_noreplace_refuses_any_overlap(first, end):
    table = table_of(anon(1, 4))
    if end <= 1:
        table.apply(table.plan_map(anon(first, end), replace=False))
        return
    with pytest.raises(errors.Occupied):
        table.plan_map(anon(first, end), replace=False)
    assert list(table) == [anon(1, 4)]


def test_noreplace_fits_exactly_into_a_hole():
    table = table_of(anon(0, 2, R), anon(4, 6, R))
    table.apply(table.plan_map(anon(2, 4), replace=False))
    assert list(table) == [anon(0, 2, R), anon(2, 4), anon(4, 6, R)]


# -- merging


def test_equal_neighbours_become_one_from_either_side_and_across_a_gap():
    table = table_of(anon(0, 2), anon(4, 6))
    assert len(table) == 2
    change = table.plan_map(anon(2, 4))
    assert change.removed == (anon(0, 2), anon(4, 6))
    assert change.added == (anon(0, 6),)
    assert [(r.start, r.end) for r in change.ranges] == [(2 * PAGE, 4 * PAGE)]
    table.apply(change)
    assert list(table) == [anon(0, 6)]


def test_files_merge_only_where_their_offsets_run_on():
    assert list(table_of(file(0, 2, R), file(2, 4, R, at=2))) == [file(0, 4, R)]
    assert len(table_of(file(0, 2, R), file(2, 4, R, at=3))) == 2
    assert len(table_of(file(0, 2, R), file(2, 4, R, at=0))) == 2


@pytest.mark.parametrize(
    "other",
    [
        file(2, 4, RW, at=2),
        file(2, 4, R, FILE_B, at=2),
        file(2, 4, R, FILE_A_AGAIN, at=2),
        Mapping(2 * PAGE, 4 * PAGE, R, FILE_A, 2 * PAGE, max_prot=RX, flags=1),
        Mapping(2 * PAGE, 4 * PAGE, R, FILE_A, 2 * PAGE, flags=0x21),
        anon(2, 4, R),
        file(3, 4, R, at=3),
    ],
    ids=["prot", "object", "descriptor", "max_prot", "flags", "kind", "hole"],
)
def test_neighbours_that_differ_in_anything_stay_two(other):
    table = table_of(file(0, 2, R), other)
    assert list(table) == [file(0, 2, R), other]


def test_protect_merges_with_neighbours_that_become_equal():
    table = table_of(anon(0, 2, R), anon(2, 4), anon(4, 6, R))
    protect(table, 2, 4, R)
    assert list(table) == [anon(0, 6, R)]


# -- munmap(2)


def test_unmap_of_a_hole_is_fine_and_does_nothing():
    table = table_of(anon(0, 2))
    change = table.plan_unmap(2 * PAGE, 10 * PAGE)
    assert (change.removed, change.added, change.ranges) == ((), (), ())
    assert change.rights_before == change.rights_after == RW
    table.apply(change)
    assert list(table) == [anon(0, 2)]


def test_unmap_takes_out_all_that_lies_in_the_range_holes_or_not():
    table = table_of(anon(0, 2), anon(4, 6, R), file(8, 12, R))
    unmap(table, 1, 10)
    assert list(table) == [anon(0, 1), file(10, 12, R, at=2)]
    assert table.mapped == 3 * PAGE


def test_unmap_in_the_middle_splits():
    table = table_of(anon(0, 10))
    unmap(table, 4, 5)
    assert list(table) == [anon(0, 4), anon(5, 10)]
    unmap(table, 0, 10)
    assert list(table) == []
    assert (table.mapped, table.rights) == (0, NONE)


# -- mprotect(2)


def test_protect_splits_and_keeps_file_offsets():
    table = table_of(file(0, 10, RW))
    protect(table, 3, 5, R)
    assert list(table) == [file(0, 3, RW), file(3, 5, R, at=3), file(5, 10, RW, at=5)]


@pytest.mark.parametrize(("first", "end"), [(0, 3), (3, 5), (1, 9), (2, 3), (5, 6), (8, 12)])
def test_protect_over_a_hole_is_refused_whole(first, end):
    before = [anon(0, 2), anon(3, 5), anon(6, 9)]
    table = table_of(*before)
    if table.at(first * PAGE) and table.at(first * PAGE).end >= end * PAGE:
        protect(table, first, end, R)
        return
    with pytest.raises(errors.HoleInRange):
        table.plan_protect(first * PAGE, end * PAGE, R)
    assert list(table) == before


def test_protect_never_exceeds_what_the_object_allows():
    readable = Mapping(4 * PAGE, 6 * PAGE, R, FILE_A, 0, max_prot=RX, flags=1)
    table = table_of(anon(2, 4), readable, anon(6, 8))
    with pytest.raises(errors.ObjectAccess, match=r"without -w-"):
        table.plan_protect(2 * PAGE, 8 * PAGE, RW)
    protect(table, 2, 8, RX)
    assert table.rights == RX


def test_protect_to_what_it_is_already_is_no_change():
    table = table_of(anon(0, 4), file(4, 8, RW))
    change = table.plan_protect(PAGE, 6 * PAGE, RW)
    assert (change.removed, change.added, change.ranges) == ((), (), ())


def test_protect_reports_only_the_ranges_that_change():
    table = table_of(anon(0, 2), anon(2, 4, R), anon(4, 6, NONE))
    change = table.plan_protect(PAGE, 6 * PAGE, R)
    assert [(r.start // PAGE, r.end // PAGE, r.gained, r.lost) for r in change.ranges] == [
        (1, 2, NONE, Prot.WRITE),
        (4, 6, R, NONE),
    ]
    assert not any(r.replaced for r in change.ranges)
    table.apply(change)
    assert list(table) == [anon(0, 1), anon(1, 6, R)]


def test_rights_are_the_union_and_go_when_the_last_holder_goes():
    table = table_of(anon(0, 1, R), anon(2, 3, RW), anon(4, 5, RW), anon(6, 7, RX))
    assert table.rights == Prot.READ | Prot.WRITE | Prot.EXEC
    unmap(table, 2, 3)
    assert Prot.WRITE in table.rights
    change = table.plan_protect(4 * PAGE, 5 * PAGE, NONE)
    assert change.rights_before == Prot.READ | Prot.WRITE | Prot.EXEC
    assert change.rights_after == RX
    assert change.gained == NONE
    assert change.inverse().gained == Prot.WRITE
    table.apply(change)
    assert table.rights == RX


# -- query


def test_query_covers_or_finds_the_next():
    table = table_of(anon(2, 4), file(6, 8, R))
    assert table.query(2 * PAGE) == anon(2, 4)
    assert table.query(4 * PAGE - 1) == anon(2, 4)
    for nowhere in (0, 2 * PAGE - 1, 4 * PAGE, 8 * PAGE, 2**64 - 1):
        with pytest.raises(errors.NothingThere):
            table.query(nowhere)
    assert table.query(0, or_next=True) == anon(2, 4)
    assert table.query(3 * PAGE, or_next=True) == anon(2, 4)
    assert table.query(4 * PAGE, or_next=True) == file(6, 8, R)
    for past in (8 * PAGE, 2**64 - 1):
        with pytest.raises(errors.NothingThere):
            table.query(past, or_next=True)


def test_overlapping_gives_whole_mappings_that_share_a_byte():
    table = table_of(anon(0, 2, R), anon(2, 4), file(6, 8, R))
    assert table.overlapping(PAGE, 2 * PAGE) == [anon(0, 2, R)]
    assert table.overlapping(PAGE, 3 * PAGE) == [anon(0, 2, R), anon(2, 4)]
    assert table.overlapping(2 * PAGE, 6 * PAGE) == [anon(2, 4)]
    assert table.overlapping(4 * PAGE, 6 * PAGE) == []
    assert table.overlapping(5 * PAGE, 7 * PAGE) == [file(6, 8, R)]
    assert table.overlapping(0, 100 * PAGE) == list(table)


# -- applying


def test_a_change_is_applied_only_to_the_table_it_was_planned_for():
    table = table_of(anon(0, 4))
    change = table.plan_unmap(0, PAGE)
    other = table.plan_protect(2 * PAGE, 3 * PAGE, R)
    table.apply(other)
    with pytest.raises(errors.StaleChange):
        table.apply(change)
    assert list(table) == [anon(0, 2), anon(2, 3, R), anon(3, 4)]


def test_a_change_is_applied_once():
    table = table_of(anon(0, 4))
    change = table.plan_unmap(0, PAGE)
    table.apply(change)
    with pytest.raises(errors.StaleChange):
        table.apply(change)
    with pytest.raises(errors.StaleChange):
        table_of().apply(change)


def test_the_way_back_says_what_goes_and_what_comes():
    table = table_of(anon(0, 2))
    change = table.plan_map(file(1, 3, R))
    over, onto_hole = change.inverse().ranges
    assert (over.old, over.new, over.replaced) == (file(1, 2, R), anon(1, 2), True)
    assert (onto_hole.old, onto_hole.new) == (file(2, 3, R, at=1), None)
    assert onto_hole.replaced, "the file goes when mapping it is undone"
    unmapped = table.plan_unmap(0, 2 * PAGE).inverse().ranges[0]
    assert not unmapped.replaced, "over a hole nothing goes"


def test_a_table_of_thousands_agrees_with_the_model():
    """Enough mappings that the sorted starts are split and joined, and long ranges of them."""
    rng = random.Random(20)
    size = 12_000
    table, pages = MappingTable(), Pages()
    objects = [ANON, FILE_A, FILE_B]

    def carry_out(change, after: Pages, new_content: set[int], *, thoroughly: bool) -> Pages:
        if thoroughly:
            check_change(change, pages, after, new_content)
        undo = change.inverse()
        for step in (change, undo, undo.inverse()):
            table.apply(step)
        return after

    for number in range(0, size, 2):
        mapping = Mapping(number * PAGE, (number + 1) * PAGE, PROTS[rng.randrange(8)])
        table.apply(table.plan_map(mapping))
        pages |= pages_of(mapping)
    check_table(table, pages)
    assert len(table) == size // 2

    for step in range(400):
        length = rng.choice([1, 1, 2, 3, 10, 50, 2_500 if step % 40 == 0 else 5])
        first = rng.randrange(size - length)
        numbers = range(first, first + length)
        start, end = first * PAGE, (first + length) * PAGE
        action = rng.choice(["map", "unmap", "protect", "fill"])
        thoroughly = step % 40 == 0
        prot = PROTS[rng.randrange(8)]
        if action == "map":
            obj = rng.choice(objects)
            mapping = Mapping(start, end, prot, obj, 0 if obj is ANON else start)
            change = table.plan_map(mapping)
            pages = carry_out(
                change, pages | pages_of(mapping), set(numbers), thoroughly=thoroughly
            )
        elif action == "unmap":
            gone = set(numbers) & pages.keys()
            after = {number: page for number, page in pages.items() if number not in gone}
            pages = carry_out(table.plan_unmap(start, end), after, gone, thoroughly=thoroughly)
        elif any(number not in pages for number in numbers):
            with pytest.raises(errors.HoleInRange):
                table.plan_protect(start, end, prot)
            if action == "fill":
                for number in numbers:
                    if number not in pages:
                        mapping = Mapping(number * PAGE, (number + 1) * PAGE, prot)
                        table.apply(table.plan_map(mapping, replace=False))
                        pages |= pages_of(mapping)
        else:
            after = dict(pages)
            for number in numbers:
                old = after[number]
                after[number] = Page(
                    int(prot), old.object, old.object_offset, old.max_prot, old.flags
                )
            change = table.plan_protect(start, end, prot)
            pages = carry_out(change, after, set(), thoroughly=thoroughly)
        if thoroughly:
            check_table(table, pages)
    check_table(table, pages)
    unmap(table, 0, size)
    check_table(table, {})
