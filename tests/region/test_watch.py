"""Watches against what each single page says, and every verdict."""

from __future__ import annotations

from itertools import pairwise, product

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.abi import PAGE_SIZE, Kind, NotifyEvent, NotifyMode, OnTimeout, Prot
from msharefs.region.errors import Unsupported
from msharefs.region.mapping import Mapping, ObjectRef
from msharefs.region.watch import Action, Verdict, Watch, Watches, check_watchable, judge

PAGES = 16
READ, WRITE = NotifyEvent.READ, NotifyEvent.WRITE
LOG, SIGNAL, HOLD = NotifyMode.LOG, NotifyMode.SIGNAL, NotifyMode.HOLD
RO, RW, NONE = Prot.READ, Prot.READ | Prot.WRITE, Prot.NONE

ranges = (
    st.tuples(st.integers(0, PAGES), st.integers(0, PAGES))
    .map(sorted)
    .filter(lambda pair: pair[0] < pair[1])
)
kinds = st.sampled_from(
    [
        {"events": WRITE},
        {"events": READ | WRITE},
        {"events": WRITE, "mode": SIGNAL, "signo": 10},
        {"events": WRITE, "mode": HOLD, "timeout_ms": 5, "on_timeout": OnTimeout.ALLOW},
    ]
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("arm"), ranges, kinds),
        st.tuples(st.just("disarm"), ranges),
        st.tuples(st.just("touch"), st.integers(0, PAGES * PAGE_SIZE - 1), st.sampled_from([1, 2])),
        st.tuples(st.just("touch_all"), ranges, st.sampled_from([1, 2])),
    )
)


def of_pages(first, last):
    return first * PAGE_SIZE, last * PAGE_SIZE


@given(steps, ranges)
def test_each_page_is_watched_as_it_was_armed_last(done, window):
    watches, model, reported = Watches(), [None] * PAGES, set()
    for step in done:
        if step[0] == "touch":
            page, kind = step[1] // PAGE_SIZE, step[2]
            first = (page, kind) not in reported
            assert watches.first(step[1], NotifyEvent(kind)) is first
            reported.add((page, kind))
            continue
        first, last = step[1]
        start, end = of_pages(first, last)
        pages = {(page, step[2]) for page in range(first, last)} if step[0] == "touch_all" else ()
        if step[0] == "touch_all":
            new = not pages <= reported
            assert watches.first_of(start + 1, end - 1, NotifyEvent(step[2])) is new
            reported |= pages
            continue
        if step[0] == "arm":
            watches.arm(Watch(start, end, **step[2]))
            model[first:last] = [step[2]] * (last - first)
        else:
            gone = watches.disarm(start, end)
            armed = [page for page in range(first, last) if model[page] is not None]
            assert sum(w.end - w.start for w in gone) == len(armed) * PAGE_SIZE
            model[first:last] = [None] * (last - first)
            if not armed:
                continue
        reported = {(page, kind) for page, kind in reported if not first <= page < last}
    held = list(watches)
    assert len(watches) == len(held)
    for page, kind in enumerate(model):
        found = watches.at(page * PAGE_SIZE + 17)
        if kind is None:
            assert found is None
        else:
            assert attrs.evolve(found, start=0, end=PAGE_SIZE) == Watch(0, PAGE_SIZE, **kind)
    assert all(one.end <= other.start for one, other in pairwise(held))
    assert not any(other.continues(one) for one, other in pairwise(held)), "halves are joined"
    start, end = of_pages(*window)
    inside = watches.within(start, end)
    covered = [page for w in inside for page in range(w.start // PAGE_SIZE, w.end // PAGE_SIZE)]
    assert covered == [page for page in range(*window) if model[page] is not None]


@given(steps)
def test_a_copy_stays_what_it_was(done):
    watches = Watches()
    for step in done:
        if step[0] == "arm":
            watches.arm(Watch(*of_pages(*step[1]), **step[2]))
    watches.first(0, WRITE)
    copy, before = watches.copy(), list(watches)
    watches.disarm(0, PAGES * PAGE_SIZE)
    assert list(copy) == before
    assert not len(watches)
    assert not copy.first(0, WRITE)


def watch(events, mode=LOG):
    return Watch(0, PAGE_SIZE, events, mode)


@pytest.mark.parametrize(
    ("prot", "watched", "access", "verdict"),
    [
        (RW, None, WRITE, Verdict(Action.GO)),
        (RO, None, WRITE, Verdict(Action.DENY)),
        (RO, None, READ, Verdict(Action.GO)),
        (NONE, None, READ, Verdict(Action.DENY)),
        (RW, watch(WRITE), WRITE, Verdict(Action.GO, report=True, once=True)),
        (RW, watch(WRITE), READ, Verdict(Action.GO)),
        (RO, watch(WRITE), WRITE, Verdict(Action.DENY, report=True)),
        (RO, watch(WRITE, HOLD), WRITE, Verdict(Action.DENY, report=True)),
        (NONE, watch(WRITE), READ, Verdict(Action.DENY)),
        (NONE, watch(WRITE), WRITE, Verdict(Action.DENY, report=True)),
        (NONE, watch(READ), READ, Verdict(Action.DENY, report=True)),
        (RW, watch(READ), READ, Verdict(Action.GO, report=True, once=True)),
        (RW, watch(READ), WRITE, Verdict(Action.GO, report=True, once=True)),
        (RW, watch(WRITE, SIGNAL), WRITE, Verdict(Action.SIGNAL, report=True)),
        (RW, watch(WRITE, HOLD), WRITE, Verdict(Action.HOLD, report=True)),
        (RW, watch(WRITE, HOLD), READ, Verdict(Action.GO)),
        (Prot.EXEC, None, READ, Verdict(Action.GO)),
        (Prot.WRITE, None, READ, Verdict(Action.GO)),
    ],
)
def test_verdicts(prot, watched, access, verdict):
    assert judge(prot, watched, access) == verdict


def test_nothing_that_the_table_forbids_is_let_go():
    every = [None, *(watch(e, m) for e in (READ, WRITE, READ | WRITE) for m in NotifyMode)]
    for rights, watched, access in product(range(8), every, (READ, WRITE)):
        allowed = rights & Prot.WRITE if access is WRITE else rights
        denied = judge(Prot(rights), watched, access).action is Action.DENY
        assert denied is not bool(allowed)


@given(st.lists(st.tuples(ranges, st.sampled_from([READ, WRITE]))))
def test_fresh_pages_are_those_that_nobody_has_seen(steps):
    watches, known = Watches(), set()
    for (first, last), kind in steps:
        found = watches.fresh(*of_pages(first, last), kind)
        pages = [page for low, high in found for page in range(low // PAGE_SIZE, high // PAGE_SIZE)]
        assert pages == [page for page in range(first, last) if (page, kind) not in known]
        assert all(one[1] < other[0] for one, other in pairwise(found))
        known.update((page, kind) for page in range(first, last))


@pytest.mark.parametrize(
    ("where", "most", "watch", "notes", "can"),
    [
        (False, 7, {"events": READ | WRITE, "mode": HOLD}, False, True),
        (False, 5, {"events": WRITE, "mode": HOLD}, False, True),
        (False, 5, {"events": READ}, True, False),
        (True, 7, {"events": WRITE}, True, True),
        (True, 7, {"events": WRITE}, False, False),
        (True, 7, {"events": READ}, True, False),
        (True, 7, {"mode": HOLD}, True, False),
        (True, 7, {"mode": SIGNAL, "signo": 11}, False, True),
        (True, 7, {"mode": SIGNAL, "signo": 10}, True, False),
        (True, 5, {"mode": SIGNAL, "signo": 10}, True, True),
    ],
)
def test_how_a_file_can_be_watched(where, most, watch, notes, can):
    shown = Mapping(0, PAGE_SIZE, RO, ObjectRef(Kind.FILE, 1, stored=where), 0, Prot(most))
    wanted = Watch(0, PAGE_SIZE, **watch)
    check_watchable(wanted, Mapping(0, PAGE_SIZE, RW), notes=False)
    if can:
        check_watchable(wanted, shown, notes=notes)
    else:
        with pytest.raises(Unsupported):
            check_watchable(wanted, shown, notes=notes)
