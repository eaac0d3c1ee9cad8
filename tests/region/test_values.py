"""Protections as text, pages, mappings and events: the small values everything else is made of."""

from __future__ import annotations

import json

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.abi import PROT_ALL, Prot
from msharefs.region import errors
from msharefs.region.events import NOBODY, Actor, Event, EventKind
from msharefs.region.mapping import ANON, PROTS, Mapping, RangeChange
from msharefs.region.pages import U64_END, checked_end, page_down, page_up
from tests.region.model import FILE_A, PAGE, pages_of

# -- protections


@pytest.mark.parametrize(
    ("value", "text"),
    list(enumerate(["---", "r--", "-w-", "rw-", "--x", "r-x", "-wx", "rwx"])),
)
def test_protections_read_as_in_proc_maps(value, text):
    assert Prot(value).text() == text
    assert Prot.parse(text) == value
    assert isinstance(Prot.parse(text), Prot)
    assert PROTS[value] is Prot(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("none", 0),
        ("-", 0),
        ("r", 1),
        ("w", 2),
        ("rw", 3),
        ("x", 4),
        ("rx", 5),
        ("r-", 1),
        ("-w", 2),
    ],
)
def test_short_forms(text, value):
    assert Prot.parse(text) == value


@pytest.mark.parametrize(
    "text", ["", "rwxx", "wr", "rr", "R", "read", "r w", "----", "rw--", "7", "r,w", " r", "None"]
)
def test_anything_else_is_refused_and_repeated_in_the_message(text):
    with pytest.raises(ValueError, match="not a protection") as caught:
        Prot.parse(text)
    assert repr(text) in str(caught.value)


@given(st.text(alphabet="rwx-n", max_size=5))
def test_parse_takes_what_text_says_or_refuses(text):
    try:
        value = Prot.parse(text)
    except ValueError:
        return
    assert set(value.text()) - {"-"} == set(text) - {"-"}


# -- pages


@given(st.integers(0, U64_END))
def test_rounding(size):
    assert page_down(size) <= size <= page_up(size)
    assert page_up(size) - size < PAGE
    assert size - page_down(size) < PAGE
    assert page_up(size) % PAGE == page_down(size) % PAGE == 0


U64 = st.one_of(
    st.integers(0, U64_END - 1),
    st.integers(0, 40).map(lambda n: n * PAGE),
    st.integers(1, 40).map(lambda n: U64_END - n * PAGE),
)


@given(U64, U64, U64)
def test_a_range_is_taken_only_if_it_is_whole_pages_within_the_limit(offset, size, limit):
    good = (
        size > 0
        and offset % PAGE == 0
        and size % PAGE == 0
        and offset + size < U64_END
        and offset + size <= limit
    )
    if good:
        assert checked_end(offset, size, limit) == offset + size
    else:
        with pytest.raises(errors.BadRange):
            checked_end(offset, size, limit)


@pytest.mark.parametrize(
    ("offset", "size", "reason"),
    [
        (1, 0, "zero"),
        (1, PAGE, "multiple"),
        (U64_END - PAGE, PAGE, "overflows"),
        (0, 2 * PAGE, "past the region's end at 0x1000"),
    ],
)
def test_the_first_reason_that_applies_is_given(offset, size, reason):
    with pytest.raises(errors.BadRange, match=reason):
        checked_end(offset, size, PAGE)


# -- mappings


def test_values_cannot_be_changed():
    mapping = Mapping(0, PAGE, PROT_ALL)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        mapping.end = 2 * PAGE
    assert mapping == Mapping(0, PAGE, PROT_ALL)
    assert hash(mapping) == hash(Mapping(0, PAGE, PROT_ALL))


@given(
    obj=st.sampled_from([ANON, FILE_A]),
    first=st.integers(0, 20),
    length=st.integers(1, 20),
    low=st.integers(0, 40),
    high=st.integers(0, 41),
)
def test_clipping_keeps_each_page_what_it_is(obj, first, length, low, high):
    mapping = Mapping(first * PAGE, (first + length) * PAGE, PROTS[3], obj, 100 * PAGE, flags=1)
    if max(low, first) >= min(high, first + length):
        return
    clipped = mapping.clip(low * PAGE, high * PAGE)
    numbers = range(max(low, first), min(high, first + length))
    whole = pages_of(mapping)
    assert pages_of(clipped) == {number: whole[number] for number in numbers}
    assert clipped.size == len(numbers) * PAGE


@given(first=st.integers(0, 9), cut=st.integers(1, 9), obj=st.sampled_from([ANON, FILE_A]))
def test_two_halves_join_to_the_whole(first, cut, obj):
    offset = 0 if obj is ANON else 7 * PAGE
    mapping = Mapping(first * PAGE, (first + 10) * PAGE, PROTS[1], obj, offset)
    at = (first + cut) * PAGE
    low, high = mapping.clip(0, at), mapping.clip(at, U64_END)
    assert high.continues(low)
    assert not low.continues(high)
    assert low.joined(high) == mapping


def test_with_prot_changes_nothing_else():
    mapping = Mapping(PAGE, 3 * PAGE, PROTS[3], FILE_A, 5 * PAGE, PROTS[3], 1)
    assert attrs.asdict(mapping.with_prot(PROTS[1])) == attrs.asdict(mapping) | {"prot": PROTS[1]}


@pytest.mark.parametrize(
    ("old", "new", "replaced", "gained", "lost"),
    [
        (None, 3, False, 3, 0),
        (3, None, True, 0, 3),
        (3, 1, False, 0, 2),
        (1, 5, False, 4, 0),
        (3, 5, False, 4, 2),
        (3, 3, True, 0, 3),
        (3, 5, True, 4, 3),
    ],
)
def test_what_a_range_gains_and_loses(old, new, replaced, gained, lost):
    change = RangeChange(
        0,
        PAGE,
        None if old is None else Mapping(0, PAGE, PROTS[old]),
        None if new is None else Mapping(0, PAGE, PROTS[new]),
        replaced,
    )
    assert (change.gained, change.lost) == (gained, lost)
    assert change.inverse().inverse() == change


# -- events


def test_an_event_is_a_json_object_in_the_order_it_is_printed():
    event = Event(
        EventKind.PROTECT,
        "dir/name",
        Actor(12, 13, "postgres"),
        via="ioctl",
        offset=PAGE,
        length=2 * PAGE,
        detail=(("prot", "r--"),),
    )
    assert json.dumps(event.fields()) == (
        '{"region": "dir/name", "event": "protect", "offset": 4096, "length": 8192,'
        ' "pid": 12, "tid": 13, "comm": "postgres", "via": "ioctl", "prot": "r--"}'
    )


def test_an_event_nobody_caused_has_zeroes():
    fields = Event(EventKind.RESIZE, "name").fields()
    assert (fields["pid"], fields["tid"], fields["comm"]) == (0, 0, "")
    assert Actor() == NOBODY


@pytest.mark.parametrize("kind", list(EventKind))
def test_every_kind_of_event_is_named_by_a_plain_word(kind):
    fields = Event(kind, "name").fields()
    assert fields["event"] == kind.value == kind.name.lower()
    assert type(fields["event"]) is str
