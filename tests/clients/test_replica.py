"""The steps of a replica against what each single page of an address space needs."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from msharefs.abi import PAGE_SIZE, Prot
from msharefs.clients.procmap import MappedRange
from msharefs.clients.replica import Comparison, Map, is_replica, steps
from msharefs.clients.shown import Shown, source_of
from msharefs.region.demand import Demand, both

PROTS = (Prot.NONE, Prot.READ, Prot.READ | Prot.WRITE, Prot.READ | Prot.EXEC)
REGION = 20
"""Pages of the region that windows show."""

prots = st.sampled_from(PROTS)
sources = st.sampled_from((None, None, None, (1, 0), (1, -8 * PAGE_SIZE), (2, 0)))
"""Memory; a file in one place and in another; another file."""


@st.composite
def address_spaces(draw) -> list[MappedRange]:
    """Windows in any order: neighbours or apart, of any part of the region, overlapping in it."""
    windows = []
    at = draw(st.integers(0, 5))
    for _ in range(draw(st.integers(0, 6))):
        at += draw(st.integers(0, 2))
        size = draw(st.integers(1, 6))
        first = draw(st.integers(0, REGION))
        shared, source = draw(st.booleans()), draw(sources)
        windows.append(window(at, size, first, draw(prots), shared=shared, source=source))
        at += size
    return draw(st.permutations(windows))


@st.composite
def demand_lists(draw) -> list[Demand]:
    """Sorted and disjoint, with or without gaps, not always over everything."""
    demands = []
    at = draw(st.integers(0, 8))
    while at < REGION + 4 and draw(st.integers(0, 7)):
        at += draw(st.sampled_from([0, 0, 0, 1, 3]))
        end = at + draw(st.integers(1, 8))
        demands.append(demand(at, end, draw(prots), draw(sources)))
        at = end
    return demands


def window(page, pages, first, prot, *, shared=True, source=None) -> MappedRange:
    start = page * PAGE_SIZE
    shown = None if source is None else Shown(7, source, source[1], writable=True)
    end, offset = start + pages * PAGE_SIZE, first * PAGE_SIZE
    return MappedRange(1, start, end, prot, shared, offset, 7, shown)


def demand(start, end, prot, source=None) -> Demand:
    return Demand(start * PAGE_SIZE, end * PAGE_SIZE, prot, source=source)


def pages_of(windows) -> dict[int, tuple[int, Prot, object]]:
    """Address page -> page of the region, protection, what is shown."""
    return {
        (w.start + step) // PAGE_SIZE: ((w.offset + step) // PAGE_SIZE, w.prot, source_of(w))
        for w in windows
        for step in range(0, w.end - w.start, PAGE_SIZE)
    }


def wanted_of(demands) -> dict[int, tuple[Prot, object]]:
    return {
        page: (d.prot, d.source)
        for d in demands
        for page in range(d.start // PAGE_SIZE, d.end // PAGE_SIZE)
    }


def after(windows, calls) -> list[MappedRange]:
    """What /proc shows when the calls have been made: each page a mapping of its own."""
    pages = pages_of(windows)
    for call in calls:
        first, count = call.address // PAGE_SIZE, call.size // PAGE_SIZE
        for page in range(first, first + count):
            assert page in pages, "mprotect() fails with ENOMEM where nothing is mapped"
            shows, _, source = pages[page]
            if isinstance(call, Map):
                assert shows == call.offset // PAGE_SIZE + page - first
                assert source != call.source, "nothing is laid where it lies already"
                source = call.source
            pages[page] = (shows, call.prot, source)
    return [
        window(page, 1, shows, prot, source=source) for page, (shows, prot, source) in pages.items()
    ]


def fewest(windows, demands) -> int:
    """How many calls it takes if each page is set at most once: runs of pages, page by page.

    A run may go over pages that have the protection already, if they are to keep it. Nothing is
    laid over the end of a window, nor over two demands at once.
    """
    pages, wanted = pages_of(windows), wanted_of(demands)
    edges = {(w.start // PAGE_SIZE) for w in windows}
    begins = {d.start // PAGE_SIZE for d in demands}
    calls, running = 0, None
    last = None
    laying = False
    for page in sorted(pages):
        shows, has, source = pages[page]
        to_be, to_show = wanted.get(shows, (None, None))
        lay = to_be is not None and to_show != source
        if page - 1 != last or to_be is None or to_be != running or lay:
            running = None
        if lay:
            calls += not laying or page - 1 != last or page in edges or shows in begins
        elif to_be is not None and has != to_be and running is None:
            calls += 1
            running = to_be
        last, laying = page, lay
    return calls


@given(address_spaces(), demand_lists())
def test_every_page_gets_what_is_demanded_and_no_other_is_touched(windows, demands):
    calls = steps(windows, demands)
    pages, wanted = pages_of(windows), wanted_of(demands)
    touched = [
        page
        for call in calls
        for page in range(call.address // PAGE_SIZE, (call.address + call.size) // PAGE_SIZE)
    ]
    assert touched == sorted(set(touched)), "lowest first, each page at most once"
    assert all(wanted.get(pages[page][0]) is not None for page in touched)
    result = after(windows, calls)
    for shows, prot, source in pages_of(result).values():
        if shows in wanted:
            assert (prot, source) == wanted[shows]
    for page, was in pages.items():
        if was[0] not in wanted:
            assert pages_of(result)[page] == was
    assert steps(result, demands) == []
    assert is_replica(result, demands)
    assert is_replica(windows, demands) == (not calls)
    for call in calls:
        first, count = call.address // PAGE_SIZE, call.size // PAGE_SIZE
        for edge in () if isinstance(call, Map) else (first, first + count - 1):
            assert pages[edge][1] != call.prot, "no longer at its ends than it has to be"


@given(address_spaces(), demand_lists())
def test_they_are_the_fewest_calls(windows, demands):
    assert len(steps(windows, demands)) == fewest(windows, demands)


@given(address_spaces(), demand_lists(), prots)
def test_rights_left_out(windows, demands, within):
    narrower = [Demand(d.start, d.end, d.prot & within, source=d.source) for d in demands]
    assert steps(windows, demands, within=within) == steps(windows, narrower)


@given(
    st.lists(st.tuples(address_spaces(), st.integers(0, 1000)), max_size=6),
    demand_lists(),
)
def test_many_processes_are_compared_as_each_alone(processes, demands):
    """The same layouts come again elsewhere, as in processes forked from one another."""
    comparison = Comparison(demands)
    for windows, shift in processes * 2:
        moved = [
            MappedRange(
                2,
                w.start + shift * PAGE_SIZE,
                w.end + shift * PAGE_SIZE,
                w.prot,
                w.shared,
                w.offset,
                w.inode,
                w.shown,
            )
            for w in windows
        ]
        assert comparison.steps(moved) == steps(moved, demands)


@given(address_spaces(), st.data())
def test_on_the_way_nobody_has_a_right_that_both_tables_do_not_give(windows, data):
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, REGION + 8), max_size=6))), REGION + 10]

    def table() -> list[Demand]:
        return [
            demand(low, high, data.draw(prots), data.draw(sources)) for low, high in pairwise(edges)
        ]

    old, new = table(), table()
    obeying = after(windows, steps(windows, old))
    between = after(obeying, steps(obeying, both(old, new)))
    final = after(between, steps(between, new))
    was, will = wanted_of(old), wanted_of(new)
    for shows, prot, source in pages_of(between).values():
        assert prot == was[shows][0] & will[shows][0]
        assert not prot or source == will[shows][1], "what will be dropped is shown to nobody"
    for shows, prot, source in pages_of(final).values():
        assert (prot, source) == will[shows]


def test_a_plain_region_leaves_its_clients_alone():
    windows = [window(100, 16, 0, PROTS[2])]
    assert steps(windows, [demand(0, 16, PROTS[2]), demand(16, 1 << 40, PROTS[0])]) == []


def test_what_lies_past_the_region_is_closed():
    windows = [window(100, 16, 0, PROTS[2])]
    (call,) = steps(windows, [demand(0, 10, PROTS[2]), demand(10, 1 << 40, PROTS[0])])
    assert (call.address, call.size) == (110 * PAGE_SIZE, 6 * PAGE_SIZE)


def test_neighbouring_windows_of_distant_parts_take_one_call():
    windows = [window(10, 2, 8, PROTS[2]), window(12, 2, 0, PROTS[2])]
    (call,) = steps(windows, [demand(0, 20, PROTS[1])])
    assert (call.address, call.size, call.prot) == (10 * PAGE_SIZE, 4 * PAGE_SIZE, PROTS[1])


def test_what_the_client_narrowed_itself_is_put_right():
    windows = [
        window(10, 4, 0, PROTS[2]),
        window(14, 1, 4, PROTS[0]),
        window(15, 3, 5, PROTS[2]),
    ]
    (call,) = steps(windows, [demand(0, 8, PROTS[2])])
    assert (call.address, call.size) == (14 * PAGE_SIZE, PAGE_SIZE)


def test_nothing_mapped_or_nothing_demanded():
    assert steps([], [demand(0, 8, PROTS[1])]) == []
    assert steps([window(0, 4, 0, PROTS[1])], []) == []
    assert is_replica([], [])


def test_layouts_that_never_come_again_are_not_hoarded():
    comparison = Comparison([demand(0, 1000, PROTS[1])])
    for pages in range(1, 200):
        assert len(comparison.steps([window(0, pages, 0, PROTS[2])])) == 1
    assert len(comparison._known) <= 64


def test_a_file_is_laid_where_memory_was_and_memory_where_a_file_was():
    file = (3, 2 * PAGE_SIZE)
    windows = [window(10, 8, 0, PROTS[2])]
    demands = [demand(0, 2, PROTS[2]), demand(2, 5, PROTS[1], file), demand(5, 8, PROTS[2])]
    (call,) = steps(windows, demands)
    assert call == Map(12 * PAGE_SIZE, 3 * PAGE_SIZE, PROTS[1], file, 2 * PAGE_SIZE)
    laid = after(windows, [call])
    calls = steps(laid, [demand(0, 8, PROTS[2])])
    assert {(c.prot, c.source) for c in calls} == {(PROTS[2], None)}
    assert not is_replica(laid, [demand(0, 8, PROTS[1])])
