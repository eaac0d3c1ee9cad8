"""The rules that hold for a whole region: its size, ranges, flags, descriptors, read() and write()."""

from __future__ import annotations

import attrs
import pytest

from msharefs.abi import PROT_ALL, Kind, MapFlag, Prot
from msharefs.region import errors
from msharefs.region.mapping import ANON, Mapping, ObjectRef
from msharefs.region.region import READ_ONLY, READ_WRITE, WRITE_ONLY, Region
from msharefs.region.semantics import AUTOMAP, MSHARE
from tests.region.model import FILE_A, PAGE

U64 = 1 << 64
R, W, X = int(Prot.READ), int(Prot.WRITE), int(Prot.EXEC)
RW = R | W
FLAGS = int(MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)


def region_of(size: int, *maps: tuple[int, int, int]) -> Region:
    """A region of ``size`` bytes with memory at ``(first page, end page, prot)``."""
    region = Region(7, "name")
    region.apply_resize(region.plan_resize(size))
    for first, end, prot in maps:
        region.apply(region.plan_map(first * PAGE, (end - first) * PAGE, prot, FLAGS))
    return region


def protections(region: Region) -> list[tuple[int, int, str]]:
    return [(m.start // PAGE, m.end // PAGE, m.prot.text()) for m in region.table]


# -- size


def test_nothing_can_be_done_before_the_size_is_set():
    region = Region(1, "name")
    for attempt in (
        lambda: region.plan_map(0, PAGE, R, FLAGS),
        lambda: region.plan_unmap(0, PAGE),
        lambda: region.plan_protect(0, PAGE, R),
        lambda: region.query(0),
        lambda: region.query(0, or_next=True),
    ):
        with pytest.raises(errors.NotSized):
            attempt()
    assert region.readable(0, 10) == 0, "read() of an empty file is at its end"
    with pytest.raises(errors.AccessHole):
        region.writable(0, 10)
    region.apply_resize(region.plan_resize(0))
    with pytest.raises(errors.BadRange):
        region.plan_map(0, PAGE, R, FLAGS)


def test_the_last_page_is_whole_though_the_size_ends_within_it():
    region = region_of(2 * PAGE + 1, (0, 3, R | W))
    assert region.limit == 3 * PAGE
    assert protections(region) == [(0, 3, "rw-")]
    with pytest.raises(errors.BadRange):
        region.plan_map(3 * PAGE, PAGE, R, FLAGS)
    assert region.readable(0, 100 * PAGE) == 2 * PAGE + 1
    assert region.readable(2 * PAGE, PAGE) == 1
    assert region.readable(2 * PAGE + 1, PAGE) == 0
    assert region.writable(2 * PAGE, PAGE) == 1


@pytest.mark.parametrize(
    ("size", "left"),
    [
        (8 * PAGE, [(0, 2, "rw-"), (4, 8, "r--")]),
        (6 * PAGE + 1, [(0, 2, "rw-"), (4, 7, "r--")]),
        (6 * PAGE, [(0, 2, "rw-"), (4, 6, "r--")]),
        (3 * PAGE, [(0, 2, "rw-")]),
        (1, [(0, 1, "rw-")]),
        (0, []),
        (100 * PAGE, [(0, 2, "rw-"), (4, 8, "r--")]),
    ],
)
def test_shrinking_unmaps_what_lies_past_the_end_and_growing_maps_nothing(size, left):
    region = region_of(8 * PAGE, (0, 2, R | W), (4, 8, R))
    resize = region.plan_resize(size)
    assert (resize.old_size, resize.new_size) == (8 * PAGE, size)
    assert region.size == 8 * PAGE
    region.apply_resize(resize)
    assert region.size == size
    assert protections(region) == left


def test_a_negative_size_is_refused():
    with pytest.raises(errors.BadArgument):
        region_of(PAGE).plan_resize(-1)


# -- ranges


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 0),
        (PAGE, 0),
        (0, 1),
        (0, PAGE + 1),
        (1, PAGE),
        (PAGE - 1, PAGE),
        (0, 9 * PAGE),
        (8 * PAGE, PAGE),
        (7 * PAGE, 2 * PAGE),
        (U64 - PAGE, PAGE),
        (U64 - PAGE, 2 * PAGE),
        (PAGE, U64 - PAGE),
        (2 * PAGE, U64 - PAGE),
        (0, U64 - 1),
        (U64 - 1, U64 - 1),
        (U64 // 2, U64 // 2),
        (-PAGE, PAGE),
        (0, -PAGE),
    ],
)
def test_ranges_that_are_empty_unaligned_overflowing_or_past_the_end(offset, size):
    region = region_of(8 * PAGE, (0, 8, R))
    for attempt in (
        lambda: region.plan_map(offset, size, R, FLAGS),
        lambda: region.plan_unmap(offset, size),
        lambda: region.plan_protect(offset, size, R),
    ):
        with pytest.raises(errors.BadRange):
            attempt()
    assert protections(region) == [(0, 8, "r--")]


def test_the_largest_region_can_be_used_to_its_last_page():
    last = U64 - 2 * PAGE
    region = region_of(U64 - PAGE)
    region.apply(region.plan_map(last, PAGE, R, FLAGS))
    assert region.query(last).end == U64 - PAGE
    with pytest.raises(errors.BadRange):
        region.plan_map(last, 2 * PAGE, R, FLAGS)


# -- flags and protections of CREATE_MAPPING


@pytest.mark.parametrize(
    "flags",
    [
        0,
        MapFlag.SHARED,
        MapFlag.FIXED,
        MapFlag.ANONYMOUS,
        MapFlag.SHARED | MapFlag.ANONYMOUS,
        MapFlag.FIXED | MapFlag.ANONYMOUS,
        0x02 | MapFlag.FIXED,  # MAP_PRIVATE
        0x04 | MapFlag.FIXED,
        0x0F | MapFlag.FIXED,
        FLAGS | 0x8000,  # MAP_POPULATE
        FLAGS | MapFlag.HUGETLB | 21 << 26,  # MAP_HUGE_2MB
        MapFlag.SHARED | MapFlag.FIXED | MapFlag.HUGETLB,
        FLAGS | 0x2000,  # MAP_LOCKED
        FLAGS | 0x80000000,
    ],
)
def test_flags_without_shared_and_fixed_or_with_anything_unknown(flags):
    region = region_of(PAGE)
    with pytest.raises(errors.BadArgument) as caught:
        region.plan_map(0, PAGE, R, int(flags))
    assert type(caught.value) is errors.BadArgument


@pytest.mark.parametrize(
    "flags",
    [
        MapFlag.SHARED | MapFlag.FIXED,
        FLAGS,
        FLAGS | MapFlag.SHARED_VALIDATE,
        FLAGS | MapFlag.NORESERVE,
        FLAGS | MapFlag.FIXED_NOREPLACE,
    ],
)
def test_flags_that_mean_something(flags):
    region = region_of(PAGE)
    obj = ANON if flags & MapFlag.ANONYMOUS else FILE_A
    region.apply(region.plan_map(0, PAGE, R, int(flags), obj=obj))
    kept = region.query(0).flags
    assert kept == int(MapFlag.SHARED | (flags & MapFlag.ANONYMOUS))
    assert type(kept) is int


@pytest.mark.parametrize("prot", [8, 0x10, 0x01000000, 0x02000000, 0xFFFFFFFF])
def test_protections_that_do_not_exist(prot):
    region = region_of(PAGE, (0, 1, R))
    for attempt in (
        lambda: region.plan_map(0, PAGE, prot, FLAGS),
        lambda: region.plan_protect(0, PAGE, prot),
    ):
        with pytest.raises(errors.BadArgument) as caught:
            attempt()
        assert type(caught.value) is errors.BadArgument


@pytest.mark.parametrize("prot", range(8))
def test_every_combination_of_read_write_exec_can_be_mapped_and_set(prot):
    region = region_of(PAGE)
    region.apply(region.plan_map(0, PAGE, prot, FLAGS))
    assert region.rights == prot
    region.apply(region.plan_protect(0, PAGE, 7 - prot))
    assert region.rights == 7 - prot
    assert isinstance(region.query(0).prot, Prot)


def test_huge_pages_are_asked_for_where_the_mount_can():
    flags = int(FLAGS | MapFlag.HUGETLB)
    with pytest.raises(errors.Unsupported, match="huge=advise"):
        region_of(PAGE).plan_map(0, PAGE, R, flags)
    able = attrs.evolve(MSHARE, no_huge="")
    region = Region(1, "r", able)
    region.apply_resize(region.plan_resize(8 * PAGE))
    with pytest.raises(errors.BadArgument, match="file"):
        region.plan_map(0, PAGE, R, flags & ~int(MapFlag.ANONYMOUS), obj=FILE_A)
    region.apply(region.plan_map(0, 6 * PAGE, R, int(FLAGS)))
    region.apply(region.plan_map(2 * PAGE, 2 * PAGE, R, flags))
    assert [(m.start, m.end, m.flags & MapFlag.HUGETLB) for m in region.table] == [
        (0, 2 * PAGE, 0),
        (2 * PAGE, 4 * PAGE, MapFlag.HUGETLB),
        (4 * PAGE, 6 * PAGE, 0),
    ]
    assert region.table.huge == 1
    assert region.table.asking_for_huge(0, 8 * PAGE) == [(2 * PAGE, 4 * PAGE)]
    assert region.table.asking_for_huge(3 * PAGE, 8 * PAGE) == [(3 * PAGE, 4 * PAGE)]
    assert region.table.asking_for_huge(4 * PAGE, 8 * PAGE) == []
    region.apply(region.plan_protect(3 * PAGE, PAGE, RW))
    assert region.table.huge == 2
    assert region.query(3 * PAGE).flags == flags & ~int(MapFlag.FIXED)
    region.apply(region.plan_map(2 * PAGE, PAGE, R, int(FLAGS)))
    region.apply(region.plan_unmap(3 * PAGE, PAGE))
    assert region.table.huge == 0
    assert len(region.table) == 2


def test_a_file_that_asks_for_huge_pages_all_over_is_not_as_growing_has_made_it():
    region = Region(1, "r", attrs.evolve(AUTOMAP, no_huge=""))
    region.apply_resize(region.plan_resize(4 * PAGE))
    assert region.plain
    region.apply(region.plan_map(0, 4 * PAGE, RW, int(FLAGS | MapFlag.HUGETLB)))
    assert not region.plain


def test_protect_takes_no_flags():
    region = region_of(PAGE, (0, 1, R))
    with pytest.raises(errors.BadArgument):
        region.plan_protect(0, PAGE, R, 1)


def test_memory_has_no_offsets_of_its_own():
    region = region_of(8 * PAGE)
    for obj in (ANON, ObjectRef(Kind.ANON)):
        region.apply(region.plan_map(0, 8 * PAGE, R, FLAGS, obj=obj, object_offset=PAGE))
        region.apply(region.plan_unmap(0, PAGE))
        assert list(region.table) == [Mapping(PAGE, 8 * PAGE, Prot.READ, flags=0x21)]


def test_noreplace_is_refused_where_something_lies():
    region = region_of(8 * PAGE, (2, 4, R))
    noreplace = FLAGS | int(MapFlag.FIXED_NOREPLACE)
    with pytest.raises(errors.Occupied):
        region.plan_map(3 * PAGE, 2 * PAGE, R, noreplace)
    region.apply(region.plan_map(4 * PAGE, 2 * PAGE, R, noreplace))
    assert protections(region) == [(2, 6, "r--")]


# -- descriptors: the superset rule


@pytest.mark.parametrize(
    ("prot", "access", "allowed"),
    [
        (0, READ_ONLY, True),
        (0, WRITE_ONLY, True),
        (R, READ_ONLY, True),
        (R | X, READ_ONLY, True),
        (R, WRITE_ONLY, False),
        (R | W, READ_ONLY, False),
        (R | W, WRITE_ONLY, False),
        (W, WRITE_ONLY, True),
        (R | W | X, READ_WRITE, True),
    ],
)
def test_open_must_cover_what_lies_inside(prot, access, allowed):
    region = region_of(4 * PAGE, (0, 1, 0), (2, 3, prot))
    if allowed:
        region.opened(access)
        assert region.descriptors == 1
        region.closed(access)
    else:
        with pytest.raises(errors.ModeTooNarrow):
            region.opened(access)
    assert region.descriptors == 0


def test_a_change_may_not_give_what_an_open_descriptor_lacks():
    region = region_of(4 * PAGE, (0, 1, R))
    region.opened(READ_ONLY)
    region.opened(READ_ONLY)
    region.opened(READ_WRITE)
    for change in (
        region.plan_protect(0, PAGE, R | W),
        region.plan_map(2 * PAGE, PAGE, R | W, FLAGS),
    ):
        with pytest.raises(errors.RightsInUse, match=r"^2 open"):
            region.check_descriptors(change)
    region.check_descriptors(region.plan_protect(0, PAGE, R | X))
    region.check_descriptors(region.plan_map(2 * PAGE, PAGE, R, FLAGS))
    region.closed(READ_ONLY)
    with pytest.raises(errors.RightsInUse, match=r"^1 open"):
        region.check_descriptors(region.plan_protect(0, PAGE, R | W))
    region.closed(READ_ONLY)
    region.check_descriptors(region.plan_protect(0, PAGE, R | W))


def test_what_the_region_gives_already_may_be_given_in_more_places():
    region = region_of(4 * PAGE, (0, 1, R | W))
    region.opened(READ_WRITE)
    change = region.plan_map(PAGE, PAGE, W, FLAGS)
    assert change.gained == Prot.NONE
    region.check_descriptors(change)


def test_an_open_during_a_change_is_held_to_the_rights_to_come():
    region = region_of(4 * PAGE, (0, 1, R))
    change = region.plan_protect(0, PAGE, R | W)
    region.begin(change)
    assert region.rights == R | W
    with pytest.raises(errors.ModeTooNarrow):
        region.opened(READ_ONLY)
    region.end()
    region.opened(READ_ONLY)
    region.closed(READ_ONLY)
    # And to those that still are, while they are being taken away.
    region.apply(change)
    region.begin(region.plan_protect(0, PAGE, R))
    with pytest.raises(errors.ModeTooNarrow):
        region.opened(READ_ONLY)


def test_only_a_writable_descriptor_may_change_the_table():
    Region(1, "r").check_may_change(READ_WRITE)
    Region(1, "r").check_may_change(WRITE_ONLY)
    with pytest.raises(errors.DescriptorReadOnly):
        Region(1, "r").check_may_change(READ_ONLY)


# -- read() and write()


@pytest.mark.parametrize(
    ("offset", "size", "readable", "writable"),
    [
        (0, 2 * PAGE, 2 * PAGE, 2 * PAGE),
        (0, 9 * PAGE, 4 * PAGE, 2 * PAGE),  # short where it may go no further
        (PAGE + 5, 9 * PAGE, 3 * PAGE - 5, PAGE - 5),
        (2 * PAGE, PAGE, PAGE, errors.AccessDenied),
        (4 * PAGE - 1, 2, 1, errors.AccessDenied),
        (4 * PAGE, 1, errors.AccessHole, errors.AccessHole),
        (5 * PAGE, PAGE, errors.AccessDenied, errors.AccessDenied),  # PROT_NONE
        (6 * PAGE, PAGE, errors.AccessDenied, PAGE),  # write-only
        (7 * PAGE, 2 * PAGE, errors.AccessHole, errors.AccessHole),
        (8 * PAGE, 1, 0, errors.AccessHole),  # the end
        (9 * PAGE, 1, 0, errors.AccessHole),
        (4 * PAGE, 0, 0, 0),
        (9 * PAGE, 0, 0, 0),
    ],
)
def test_read_and_write_go_as_far_as_the_table_allows(offset, size, readable, writable):
    region = region_of(8 * PAGE, (0, 2, R | W), (2, 4, R), (5, 6, 0), (6, 7, W))
    for ask, expected in ((region.readable, readable), (region.writable, writable)):
        if isinstance(expected, int):
            assert ask(offset, size) == expected
        else:
            with pytest.raises(errors.RegionError) as caught:
                ask(offset, size)
            assert type(caught.value) is expected


def test_everything_refused_is_a_region_error_and_no_bug_is():
    assert issubclass(errors.BadRange, errors.RegionError)
    assert not issubclass(errors.StaleChange, errors.RegionError)
    assert READ_ONLY | WRITE_ONLY == READ_WRITE == PROT_ALL
