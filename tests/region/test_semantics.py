"""The rules that differ between kinds of mounts: what growing maps, who may open, what write() may."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.abi import MapFlag, Prot
from msharefs.region import errors
from msharefs.region.region import READ_ONLY, READ_WRITE, Region
from msharefs.region.semantics import AUTOMAP, MSHARE

PAGE = 4096
RW = Prot.READ | Prot.WRITE
FLAGS = int(MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)


def resized(*sizes: int) -> Region:
    region = Region(7, "name", AUTOMAP)
    for size in sizes:
        region.apply_resize(region.plan_resize(size))
    return region


def protections(region: Region) -> list[tuple[int, int, str]]:
    return [(m.start // PAGE, m.end // PAGE, m.prot.text()) for m in region.table]


@pytest.mark.parametrize(
    ("sizes", "table"),
    [
        ((1,), [(0, 1, "rw-")]),
        ((1, PAGE), [(0, 1, "rw-")]),
        ((PAGE, PAGE + 1, 3 * PAGE - 1), [(0, 3, "rw-")]),
        ((3 * PAGE, PAGE + 1), [(0, 2, "rw-")]),
        ((3 * PAGE, 0), []),
        ((3 * PAGE, 0, 2 * PAGE), [(0, 2, "rw-")]),
    ],
)
def test_growing_maps_and_shrinking_unmaps(sizes, table):
    region = resized(*sizes)
    assert protections(region) == table
    assert region.size == sizes[-1]


def test_what_was_laid_over_stays_and_what_grows_is_new():
    region = resized(4 * PAGE)
    region.apply(region.plan_protect(2 * PAGE, 2 * PAGE, Prot.READ))
    region.apply(region.plan_unmap(0, PAGE))
    region.apply_resize(region.plan_resize(6 * PAGE))
    assert protections(region) == [(1, 2, "rw-"), (2, 4, "r--"), (4, 6, "rw-")]
    region.apply_resize(region.plan_resize(3 * PAGE))
    region.apply_resize(region.plan_resize(5 * PAGE))
    assert protections(region) == [(1, 2, "rw-"), (2, 3, "r--"), (3, 5, "rw-")]


def test_mapping_anew_by_ioctl_is_the_same_mapping_as_growing_makes():
    region = resized(4 * PAGE)
    region.apply(region.plan_map(PAGE, PAGE, int(RW), FLAGS))
    assert protections(region) == [(0, 4, "rw-")]


def test_a_file_is_plain_until_something_is_laid_over_it():
    assert resized(0).plain
    region = resized(3 * PAGE + 1)
    assert region.plain
    region.apply(region.plan_protect(0, PAGE, Prot.READ))
    assert not region.plain
    region.apply(region.plan_protect(0, PAGE, RW))
    assert region.plain
    region.apply(region.plan_unmap(2 * PAGE, PAGE))
    assert not region.plain
    region.apply_resize(region.plan_resize(2 * PAGE))
    assert region.plain
    region.apply(region.plan_protect(0, 2 * PAGE, Prot.READ))
    assert not region.plain


def test_growing_can_be_undone():
    region = resized(PAGE)
    resize = region.plan_resize(3 * PAGE)
    region.apply_resize(resize)
    region.apply(resize.change.inverse())
    region.size = resize.old_size
    assert protections(region) == [(0, 1, "rw-")]


def test_write_may_go_past_the_end_but_not_through_what_is_protected():
    region = resized(2 * PAGE + 10)
    assert region.writable(0, 100 * PAGE) == 100 * PAGE
    assert region.writable(50 * PAGE, 7) == 7
    region.apply(region.plan_protect(2 * PAGE, PAGE, Prot.READ))
    assert region.writable(0, 100 * PAGE) == 2 * PAGE
    with pytest.raises(errors.AccessDenied):
        region.writable(2 * PAGE + 10, 1)  # the rest of the last page is protected with it
    assert region.writable(3 * PAGE, 5) == 5
    with pytest.raises(errors.AccessDenied):
        region.check_writable(0, 3 * PAGE)
    region.check_writable(0, 2 * PAGE)


def test_nobody_is_refused_for_what_others_may_do():
    region = resized(PAGE)
    region.opened(READ_ONLY)
    change = region.plan_map(0, PAGE, 7, FLAGS)
    assert change.gained == Prot.EXEC
    assert region.contested(change) == Prot.NONE
    region.check_descriptors(change)


def test_the_default_is_the_other_way_round():
    region = Region(1, "name")
    assert region.semantics is MSHARE
    region.apply_resize(region.plan_resize(2 * PAGE))
    region.opened(READ_WRITE)
    assert protections(region) == []
    change = region.plan_map(0, PAGE, int(RW), FLAGS)
    assert region.contested(change) == RW
    region.apply(change)
    with pytest.raises(errors.ModeTooNarrow):
        region.check_open(READ_ONLY)
    assert region.writable(PAGE - 1, 100) == 1
    with pytest.raises(errors.AccessHole):
        region.writable(2 * PAGE, 1)


@given(st.lists(st.integers(0, 40 * PAGE), min_size=1, max_size=20))
def test_the_table_is_one_mapping_of_the_whole_file(sizes):
    region = resized(*sizes)
    pages = -(-sizes[-1] // PAGE)
    assert protections(region) == ([(0, pages, "rw-")] if pages else [])
