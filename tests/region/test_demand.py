"""Spans and demands against what each single page says."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from msharefs.abi import PAGE_SIZE, Kind, NotifyEvent, Prot
from msharefs.region.demand import (
    SCANNED,
    SIGNALLED,
    Caught,
    Demand,
    Grasp,
    both,
    changed,
    cover,
    demands,
    grasp_of,
    serve,
)
from msharefs.region.mapping import Mapping, ObjectRef
from msharefs.region.spans import SpanSet
from msharefs.region.table import MappingTable

PAGES = 24
PROTS = (Prot.NONE, Prot.READ, Prot.READ | Prot.WRITE, Prot.READ | Prot.EXEC)

ranges = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(sorted)


def pages_of(spans):
    return {page for start, end in spans for page in range(start, end)}


@given(st.lists(st.tuples(st.booleans(), ranges)), ranges)
def test_spans_are_a_set_of_pages(steps, window):
    spans, model = SpanSet(), set()
    for add, (start, end) in steps:
        if add:
            spans.add(start, end)
            model |= set(range(start, end))
        else:
            spans.remove(start, end)
            model -= set(range(start, end))
    held = list(spans)
    assert pages_of(held) == model
    assert all(one[1] < other[0] for one, other in pairwise(held))
    assert all(start < end for start, end in held)
    inside = spans.within(*window)
    assert pages_of(inside) == model & set(range(*window))


def table_of(prots):
    table = MappingTable()
    for page, prot in enumerate(prots):
        if prot is not None:
            mapping = Mapping(page * PAGE_SIZE, (page + 1) * PAGE_SIZE, prot)
            table.apply(table.plan_map(mapping))
    return table


page_prots = st.lists(st.one_of(st.none(), st.sampled_from(PROTS)), min_size=PAGES, max_size=PAGES)


def watches_of(events):
    """Sorted, disjoint (start, end, events) from one number a page."""
    return [
        (page * PAGE_SIZE, (page + 1) * PAGE_SIZE, bits) for page, bits in enumerate(events) if bits
    ]


@given(
    page_prots,
    st.lists(st.integers(0, 3), min_size=PAGES, max_size=PAGES),
    st.lists(st.booleans(), min_size=PAGES, max_size=PAGES),
    ranges,
)
def test_each_page_demands_what_it_would_alone(prots, events, faults, window):
    table = table_of(prots)
    by_fault = SpanSet()
    for page, faulting in enumerate(faults):
        if faulting:
            by_fault.add(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
    start, end = (page * PAGE_SIZE for page in window)
    got = demands(cover(table, start, end), watches_of(events), by_fault)
    at = start
    for demand in got:
        assert demand.start == at < demand.end
        at = demand.end
        for page in range(demand.start // PAGE_SIZE, demand.end // PAGE_SIZE):
            prot = prots[page]
            if prot is None:
                assert (demand.prot, demand.caught) == (Prot.NONE, Caught.NOTHING)
            else:
                want = serve(prot, events[page], by_fault=faults[page])
                assert (int(demand.prot), int(demand.caught)) == want
    assert at == max(start, end)
    for one, other in pairwise(got):
        assert (one.prot, one.caught) != (other.prot, other.caught)


@given(st.sampled_from(PROTS), st.integers(0, 3), st.booleans())
def test_what_the_table_forbids_is_outside_the_mapping_or_caught(prot, watched, by_fault):
    has, caught = serve(prot, watched, by_fault=by_fault)
    if has & Prot.WRITE and not prot & Prot.WRITE:
        assert caught & Caught.STORES
    if has & Prot.READ and not prot & Prot.READ:
        assert caught & Caught.ACCESSES
    assert int(prot) & ~has == 0
    if watched & NotifyEvent.WRITE and prot & Prot.WRITE:
        assert caught & Caught.STORES
    if watched & NotifyEvent.READ:
        assert caught & Caught.ACCESSES


def test_a_plain_region_demands_its_own_protections():
    table = table_of([PROTS[2]] * PAGES)
    got = demands(cover(table, 0, PAGES * PAGE_SIZE))
    assert [(d.start, d.end, d.prot) for d in got] == [(0, PAGES * PAGE_SIZE, PROTS[2])]


@given(page_prots, page_prots, st.lists(st.integers(0, 3), min_size=PAGES, max_size=PAGES))
def test_both_gives_what_either_forbids_to_nobody(old_prots, new_prots, events):
    size = PAGES * PAGE_SIZE
    old = demands(cover(table_of(old_prots), 0, size), watches_of(events))
    new = demands(cover(table_of(new_prots), 0, size))
    met = both(old, new)
    assert (met[0].start, met[-1].end) == (0, size)
    for page in range(PAGES):
        one, other, between = (
            next(d for d in side if d.start <= page * PAGE_SIZE < d.end) for side in (old, new, met)
        )
        assert between.prot == one.prot & other.prot
        assert between.caught == one.caught | other.caught


@given(page_prots, ranges, st.sampled_from((None, *PROTS)), ranges)
def test_what_will_be_is_what_is_after_the_change(prots, target, prot, window):
    table = table_of(prots)
    start, end = (page * PAGE_SIZE for page in target)
    if start == end:
        return
    if prot is None:
        change = table.plan_unmap(start, end)
    else:
        change = table.plan_map(Mapping(start, end, prot))
    low, high = (page * PAGE_SIZE for page in window)
    planned = demands(changed(cover(table, low, high), change.ranges))
    table.apply(change)
    assert planned == demands(cover(table, low, high))


page_sources = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(1, 2), st.integers(0, 30))),
    min_size=PAGES,
    max_size=PAGES,
)


def files_of(prots, sources):
    """A table in which page p shows its own memory, or that page of a file."""
    table = table_of(prots)
    for page, (prot, source) in enumerate(zip(prots, sources, strict=True)):
        if prot is not None and source is not None:
            ref = ObjectRef(Kind.FILE, source[0], 1, 2, source[0])
            start = page * PAGE_SIZE
            mapping = Mapping(start, start + PAGE_SIZE, prot, ref, source[1] * PAGE_SIZE)
            table.apply(table.plan_map(mapping))
    return table


def source_at(demands_, page):
    return next(d.source for d in demands_ if d.start <= page * PAGE_SIZE < d.end)


@given(page_prots, page_sources)
def test_each_page_shows_what_lies_there(prots, sources):
    got = demands(cover(files_of(prots, sources), 0, PAGES * PAGE_SIZE))
    for page, (prot, source) in enumerate(zip(prots, sources, strict=True)):
        shown = source_at(got, page)
        if prot is None or source is None:
            assert shown is None
        else:
            assert shown == (source[0], (page - source[1]) * PAGE_SIZE)
    for one, other in pairwise(got):
        assert (one.prot, one.caught, one.source) != (other.prot, other.caught, other.source)


@given(page_prots, page_sources, page_prots, page_sources)
def test_on_the_way_the_new_is_shown_but_over_what_nobody_saw(
    old_prots, old_sources, new_prots, new_sources
):
    size = PAGES * PAGE_SIZE
    old = demands(cover(files_of(old_prots, old_sources), 0, size))
    new = demands(cover(files_of(new_prots, new_sources), 0, size))
    met = both(old, new)
    for page in range(PAGES):
        seen_before = bool(old_prots[page])
        assert source_at(met, page) == source_at(new if seen_before else old, page)
    unseen = [Demand(0, size, Prot.NONE)]
    assert {demand.source for demand in both(unseen, new)} == {None}
    assert both(new, new) == new


@given(page_prots, page_sources, ranges, st.integers(0, 30))
def test_a_planned_file_is_shown_as_it_will_be(prots, sources, target, first):
    table = files_of(prots, sources)
    start, end = (page * PAGE_SIZE for page in target)
    if start == end:
        return
    ref = ObjectRef(Kind.FILE, 9, 1, 2, 9)
    change = table.plan_map(Mapping(start, end, Prot.READ, ref, first * PAGE_SIZE))
    planned = demands(changed(cover(table, 0, PAGES * PAGE_SIZE), change.ranges))
    table.apply(change)
    assert planned == demands(cover(table, 0, PAGES * PAGE_SIZE))


@given(
    st.sampled_from(PROTS),
    st.integers(0, 15),
    st.booleans(),
    st.sampled_from([Grasp.NONE, Grasp.NOTES]),
)
def test_what_cannot_be_caught_is_protected_by_its_mapping(prot, watched, by_fault, grasp):
    has, caught = serve(prot, watched, by_fault=by_fault, grasp=grasp)
    assert caught & ~Caught.NOTED == 0
    assert not has & Prot.WRITE or prot & Prot.WRITE
    stores = watched & NotifyEvent.WRITE and prot & Prot.WRITE and not watched & SIGNALLED
    assert bool(caught) is bool(stores and grasp is Grasp.NOTES)
    if watched & SIGNALLED and grasp is Grasp.NOTES:
        assert not has & Prot.WRITE
        assert bool(has) is bool(prot)
    else:
        assert has == prot


@given(st.sampled_from(PROTS), st.booleans())
def test_memory_that_is_scanned_is_protected_by_its_mapping_too(prot, by_fault):
    has, caught = serve(prot, NotifyEvent.WRITE | SCANNED, by_fault=by_fault)
    assert has == prot
    assert caught == (Caught.NOTED if prot & Prot.WRITE else Caught.NOTHING)


def test_what_can_be_known_depends_on_where_a_file_lies_and_how_it_was_opened():
    stored = ObjectRef(Kind.FILE, ident=1, stored=True)
    shmem = ObjectRef(Kind.FILE, ident=2)
    every, read_only = Prot(7), Prot(5)
    found = [
        grasp_of(Mapping(0, PAGE_SIZE, Prot.READ, where, 0, most))
        for where in (stored, shmem)
        for most in (every, read_only)
    ]
    assert found == [Grasp.NOTES, Grasp.NONE, Grasp.FAULTS, Grasp.NONE]
    assert grasp_of(None) is grasp_of(Mapping(0, PAGE_SIZE, Prot.READ)) is Grasp.FAULTS
