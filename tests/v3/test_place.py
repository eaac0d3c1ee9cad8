"""Where a window is put, given what is mapped: pure, and compared with trying every place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.region import errors
from msharefs.region.region import Region
from msharefs.region.semantics import V3
from msharefs.region.window import Wanted, check_window, place, placed

UNIT = V3.alignment
PAGE = 4096
END = (1 << 47) - PAGE
SHARED, FIXED, NOREPLACE, POPULATE = 1, 0x10, 0x100000, 0x8000

pages = st.integers(0, (END // PAGE) - 1)


@st.composite
def mapped(draw):
    """What a process may have mapped: disjoint ranges, lowest first."""
    cuts = sorted(draw(st.sets(pages, max_size=24)))
    return [(low * PAGE, high * PAGE) for low, high in zip(cuts[::2], cuts[1::2], strict=False)]


def free(at, size, taken):
    return at >= UNIT and at + size <= END and all(h <= at or at + size <= low for low, h in taken)


@given(mapped(), st.integers(1, 4), st.integers(0, END))
def test_it_is_the_hint_if_that_is_free_and_else_the_highest(taken, units, hint):
    size = units * UNIT
    candidates = [at for at in range(UNIT, END, UNIT) if free(at, size, taken)]
    wanted = Wanted(hint, size, SHARED)
    rounded = -(-hint // UNIT) * UNIT
    if not candidates:
        with pytest.raises(errors.NoRoom):
            place(wanted, UNIT, taken, END)
    elif rounded in candidates:
        assert place(wanted, UNIT, taken, END) == rounded
    else:
        assert place(wanted, UNIT, taken, END) == max(candidates)


def test_what_lies_beyond_the_end_takes_nothing():
    vsyscall = (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000)
    assert place(Wanted(0, UNIT, SHARED), UNIT, [vsyscall], END) == END // UNIT * UNIT - UNIT


def test_lengths_and_addresses():
    region = Region(7, "r", V3)
    with pytest.raises(errors.NotSized):
        check_window(region, Wanted(0, UNIT, SHARED))
    region.apply_resize(region.plan_resize(2 * UNIT))
    check_window(region, Wanted(0, 2 * UNIT, SHARED))
    check_window(region, Wanted(PAGE, 2 * UNIT - PAGE + 1, SHARED))
    check_window(region, Wanted(3 * UNIT, 2 * UNIT, SHARED | FIXED))
    for length in (PAGE, UNIT, 2 * UNIT - PAGE, 2 * UNIT + 1):
        with pytest.raises(errors.BadArgument):
            check_window(region, Wanted(0, length, SHARED))
    for flag in (FIXED, NOREPLACE):
        with pytest.raises(errors.BadArgument):
            check_window(region, Wanted(UNIT + PAGE, 2 * UNIT, SHARED | flag))


def test_what_is_placed_touches_nothing_and_replaces_nothing_unasked():
    made = placed(Wanted(1, UNIT, SHARED | POPULATE, 5 * PAGE), 3 * UNIT)
    assert made == Wanted(3 * UNIT, UNIT, SHARED | NOREPLACE, 0)
    exact = Wanted(UNIT, UNIT, SHARED | FIXED)
    assert placed(exact, UNIT) == exact
