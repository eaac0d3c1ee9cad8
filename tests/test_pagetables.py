"""The arithmetic of page tables, against the well-known figure and against counting one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.pagetables import (
    PMD_SPAN,
    PTE_SPAN,
    PUD_SPAN,
    TABLE,
    Cost,
    Span,
    Tables,
    cost,
    in_huge_pages,
    in_small_pages,
    tables_of,
)

PAGE = 4096
GIB = 1 << 30


def test_the_figure_of_the_kernel_series():
    """300 GiB shared by 1,500 clients: 878.9 GiB of PTEs, and the levels above beside them."""
    tables = tables_of([Span(0, 300 * GIB)])
    assert tables.pte * TABLE == 300 * GIB // PAGE * 8
    assert round(tables.pte * TABLE * 1500 / GIB, 1) == 878.9
    assert tables == Tables(pte=153_600, pmd=300, pud=1)
    found = cost([Span(0, 300 * GIB)], 1500)
    assert found.small == 1500 * (153_600 + 300 + 1) * 4096
    assert found.thp == 1500 * (300 + 1) * 4096
    assert found.shared == (153_600 + 300 + 1) * 4096


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], Tables()),
        ([Span(0, PAGE)], Tables(1, 1, 1)),
        ([Span(PTE_SPAN - PAGE, PTE_SPAN + PAGE)], Tables(2, 1, 1)),
        ([Span(PUD_SPAN - PAGE, PUD_SPAN + PAGE)], Tables(2, 2, 2)),
        ([Span(0, PAGE), Span(2 * PAGE, 3 * PAGE)], Tables(1, 1, 1)),
        ([Span(0, PMD_SPAN, huge=True)], Tables(0, 1, 1)),
        ([Span(0, PTE_SPAN, huge=True), Span(PTE_SPAN, PTE_SPAN + PAGE)], Tables(1, 1, 1)),
        ([Span(0, 2 * GIB)], Tables(1024, 2, 1)),
    ],
)
def test_tables_are_counted_at_each_level(spans, expected):
    assert tables_of(spans) == expected
    assert expected.size == (expected.pte + expected.pmd + expected.pud) * 4096


@pytest.mark.parametrize(
    "spans",
    [
        [Span(PAGE, PAGE)],
        [Span(2 * PAGE, PAGE)],
        [Span(PAGE, 2 * PAGE), Span(0, PAGE)],
        [Span(0, 2 * PAGE), Span(PAGE, 3 * PAGE)],
    ],
)
def test_what_is_no_list_of_spans_is_refused(spans):
    with pytest.raises(ValueError, match="is empty or not behind"):
        tables_of(spans)


@st.composite
def layouts(draw):
    """Spans over a few GiB, with ends near the borders of tables."""
    near = st.builds(
        lambda base, pages: max(0, base + pages * PAGE),
        st.sampled_from([0, PTE_SPAN, 5 * PTE_SPAN, PMD_SPAN, 3 * PMD_SPAN, PUD_SPAN]),
        st.integers(-600, 600),
    )
    ends = sorted(draw(st.sets(near, max_size=12)))
    return [Span(a, b) for a, b in zip(ends[::2], ends[1::2], strict=False)]


def one_by_one(spans):
    """The tables that hold an entry, found by naming each of them."""
    blocks = {size: set() for size in (PTE_SPAN, PMD_SPAN, PUD_SPAN)}
    for span in spans:
        for size, found in blocks.items():
            if size != PTE_SPAN or not span.huge:
                found.update(range(span.start // size, (span.end - 1) // size + 1))
    return Tables(*(len(found) for found in blocks.values()))


@given(layouts())
def test_counting_agrees_with_naming_each_table(spans):
    assert tables_of(spans) == one_by_one(spans)
    assert tables_of(in_huge_pages(spans)) == one_by_one(in_huge_pages(spans))


@given(layouts())
def test_other_pages_hold_the_same_bytes(spans):
    def size(found):
        return sum(span.end - span.start for span in found)

    huge = in_huge_pages(spans)
    assert size(huge) == size(spans) == size(in_small_pages(huge))
    assert in_small_pages(huge) == in_small_pages(spans)
    for span in huge:
        if span.huge:
            assert not span.start % PTE_SPAN
            assert not span.end % PTE_SPAN
        else:
            assert span.end - span.start < 2 * PTE_SPAN, "no whole huge page fits"
    assert tables_of(huge).size <= tables_of(spans).size


@given(layouts(), st.integers(0, 5000))
def test_only_the_shared_tables_do_not_grow_with_the_clients(spans, clients):
    one, many = cost(spans, 1), cost(spans, clients)
    assert many.small == one.small * clients
    assert many.thp == one.thp * clients
    assert many.shared == (one.small if clients else 0)


def test_no_clients_cost_nothing_and_fewer_are_refused():
    assert cost([Span(0, GIB)], 0) == Cost(0, 0, 0, 0)
    with pytest.raises(ValueError, match="fewer clients"):
        cost([], -1)
