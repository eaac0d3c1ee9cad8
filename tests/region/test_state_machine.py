"""Thousands of random steps of a `Region`, each compared with the page-by-page model.

Every change is looked at three times: as a value before anything is applied, applied, and applied
and undone. What is refused must be refused for the right reason and leave nothing behind.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from msharefs.abi import Kind, MapFlag, Prot
from msharefs.region import errors
from msharefs.region.region import READ_ONLY, READ_WRITE, WRITE_ONLY, Region, Resize
from tests.region.model import (
    ANONYMOUS,
    FILE_A,
    FILE_A_AGAIN,
    FILE_B,
    PAGE,
    Page,
    Pages,
    check_change,
    check_table,
    mappings_of,
    pages_of,
    rights_of,
    snapshot,
)

if TYPE_CHECKING:
    from msharefs.region.mapping import Change

NUMBER_OF_PAGES = 20
U64 = 1 << 64

page_numbers = st.integers(0, NUMBER_OF_PAGES - 1)
prots = st.sampled_from([0, 1, 1, 3, 3, 3, 5, 2, 7])
bad_ranges = st.sampled_from(
    [
        (0, 0),
        (PAGE, 0),
        (1, PAGE),
        (0, PAGE - 1),
        (PAGE // 2, PAGE // 2),
        (U64 - PAGE, PAGE),
        (U64 - PAGE, 2 * PAGE),
        (PAGE, U64 - PAGE),
        (PAGE, U64 - 2 * PAGE),
        (NUMBER_OF_PAGES * PAGE, PAGE),
    ]
)
# Where a change goes: most of them where something can happen, the rest where it is refused.
wheres = st.sampled_from(["pages"] * 4 + ["mappings"] * 3 + ["across the end", "bad"])
sizes = st.sampled_from(
    [NUMBER_OF_PAGES * PAGE] * 12
    + [15 * PAGE, 15 * PAGE + 1, 18 * PAGE - 1, 10 * PAGE + 100, 3 * PAGE, 1, 0]
)
objects = st.sampled_from(
    [
        (ANONYMOUS, 7),
        (ANONYMOUS, 7),
        (FILE_A, 7),
        (FILE_A, 5),
        (FILE_A_AGAIN, 7),
        (FILE_B, 7),
        (FILE_B, 3),
    ]
)
# Object offsets that mostly run along with the region's, so that neighbours can become one.
shifts = st.sampled_from([0, 0, 0, 1, 5])
# What becomes of a plan: most are carried out, some undone at once, some never carried out.
fates = st.sampled_from(["apply", "apply", "apply", "apply", "undo", "drop"])
accesses = st.sampled_from([READ_ONLY, WRITE_ONLY, READ_WRITE, READ_WRITE])


@contextmanager
def refused(error: type[errors.RegionError], region: Region):
    """Exactly this error, nothing changed, and a sentence for the event log."""
    before, version = snapshot(region), region.table.version
    with pytest.raises(errors.RegionError) as caught:
        yield
    assert type(caught.value) is error
    assert str(caught.value)
    assert snapshot(region) == before
    assert region.table.version == version


class RegionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.region = Region(1, "a/region")
        self.pages: Pages = {}
        self.size = 0
        self.sized = False
        self.open: list[Prot] = []
        self.pending: Change | None = None
        self.stale: Change | None = None

    @initialize(
        sized=st.sampled_from([True] * 9 + [False]),
        filled=st.lists(
            st.tuples(page_numbers, st.integers(1, 5), prots, objects, shifts),
            min_size=4,
            max_size=12,
        ),
    )
    def begin_with(self, sized, filled) -> None:
        if not sized:
            return
        self.resize(NUMBER_OF_PAGES * PAGE, "apply")
        for first, length, *what in filled:
            size = min(length, NUMBER_OF_PAGES - first) * PAGE
            self.map_range(first * PAGE, size, *what, noreplace=False, fate="apply")

    # -- the model's opinion

    def bad_range(self, offset: int, size: int) -> type[errors.RegionError] | None:
        if not self.sized:
            return errors.NotSized
        last_page_end = -(-self.size // PAGE) * PAGE
        if size == 0 or offset % PAGE or size % PAGE or offset + size > last_page_end:
            return errors.BadRange
        return None

    def draw_range(self, data, kinds=wheres) -> tuple[int, int]:
        """Offset and size in bytes, as the current state suggests them."""
        kind = data.draw(kinds)
        end = -(-self.size // PAGE)
        if kind == "bad" or not end:
            return data.draw(bad_ranges)
        if kind == "across the end":
            return ((end - 1) * PAGE, data.draw(st.integers(2, 4)) * PAGE)
        if kind == "mappings" and self.pages:
            # From where some mapping begins to where one ends.
            mappings = mappings_of(self.pages)
            first = data.draw(st.integers(0, len(mappings) - 1))
            last = data.draw(st.integers(first, min(first + 3, len(mappings) - 1)))
            return mappings[first].start, mappings[last].end - mappings[first].start
        number = data.draw(st.integers(0, end - 1))
        return number * PAGE, data.draw(st.integers(1, min(8, end - number))) * PAGE

    def covered(self, offset: int, size: int) -> list[int]:
        return list(range(offset // PAGE, (offset + size) // PAGE))

    def lacked(self, gained: int) -> bool:
        return any(gained & ~access for access in self.open)

    def carry_out(self, change: Change, after: Pages, new_content: set[int], fate: str) -> None:
        check_change(change, self.pages, after, new_content)
        check_change(change.inverse(), after, self.pages, new_content)
        gained = rights_of(after) & ~rights_of(self.pages)
        if self.lacked(gained):
            with refused(errors.RightsInUse, self.region):
                self.region.check_descriptors(change)
            return
        self.region.check_descriptors(change)
        if fate == "drop":
            return
        before = snapshot(self.region)
        version = self.region.table.version
        self.region.apply(change)
        assert self.region.table.version == version + 1
        self.stale = change
        if fate == "undo":
            check_table(self.region.table, after)
            self.region.apply(change.inverse())
            assert snapshot(self.region) == before
        else:
            self.pages = after

    # -- changes

    @precondition(lambda self: self.pending is None)
    @rule(
        data=st.data(),
        prot=prots,
        kind=objects,
        shift=shifts,
        noreplace=st.sampled_from([False, False, True]),
        fate=fates,
    )
    def map(self, data, prot, kind, shift, noreplace, fate) -> None:
        offset, size = self.draw_range(data)
        self.map_range(offset, size, prot, kind, shift, noreplace=noreplace, fate=fate)

    def map_range(self, offset, size, prot, kind, shift, *, noreplace, fate) -> None:
        obj, max_prot = kind
        prot &= max_prot
        anonymous = obj.kind == Kind.ANON
        flags = MapFlag.SHARED | MapFlag.FIXED
        if anonymous:
            flags |= MapFlag.ANONYMOUS
        if noreplace:
            flags |= MapFlag.FIXED_NOREPLACE
        object_offset = offset + shift * PAGE

        def plan() -> Change:
            return self.region.plan_map(
                offset,
                size,
                prot,
                int(flags),
                obj=obj,
                object_offset=object_offset,
                max_prot=Prot(max_prot),
            )

        numbers = self.covered(offset, size) if size < PAGE * 100 else []
        error = self.bad_range(offset, size)
        if error is None and noreplace and any(number in self.pages for number in numbers):
            error = errors.Occupied
        if error is not None:
            with refused(error, self.region):
                plan()
            return
        kept_flags = 0x21 if anonymous else 0x01
        new = {
            number: Page(
                prot,
                obj,
                0 if anonymous else (number + shift) * PAGE,
                max_prot,
                kept_flags,
            )
            for number in numbers
        }
        self.carry_out(plan(), self.pages | new, set(numbers), fate)

    @precondition(lambda self: self.pending is None)
    @rule(data=st.data(), fate=fates)
    def unmap(self, data, fate) -> None:
        offset, size = self.draw_range(data)
        error = self.bad_range(offset, size)
        if error is not None:
            with refused(error, self.region):
                self.region.plan_unmap(offset, size)
            return
        gone = set(self.covered(offset, size)) & self.pages.keys()
        after = {number: page for number, page in self.pages.items() if number not in gone}
        self.carry_out(self.region.plan_unmap(offset, size), after, gone, fate)

    @precondition(lambda self: self.pending is None)
    @rule(data=st.data(), prot=prots, fate=fates)
    def protect(self, data, prot, fate) -> None:
        self.protect_range(*self.draw_range(data), prot, fate)

    @precondition(lambda self: self.pending is None and self.pages)
    @rule(data=st.data(), prot=prots, fate=fates)
    def protect_what_is_mapped(self, data, prot, fate) -> None:
        """A range without holes, often across several mappings: random ranges seldom are."""
        first = data.draw(st.sampled_from(sorted(self.pages)))
        end = first + 1
        while end in self.pages and data.draw(st.integers(0, 4)):
            end += 1
        self.protect_range(first * PAGE, (end - first) * PAGE, prot, fate)

    def protect_range(self, offset: int, size: int, prot: int, fate: str) -> None:
        error = self.bad_range(offset, size)
        if error is None:
            # The reason that stands lowest in the region is the one given.
            for number in self.covered(offset, size):
                if number not in self.pages:
                    error = errors.HoleInRange
                    break
                if prot & ~self.pages[number].max_prot:
                    error = errors.ObjectAccess
                    break
        if error is not None:
            with refused(error, self.region):
                self.region.plan_protect(offset, size, prot)
            return
        after = dict(self.pages)
        for number in self.covered(offset, size):
            page = after[number]
            after[number] = Page(prot, page.object, page.object_offset, page.max_prot, page.flags)
        self.carry_out(self.region.plan_protect(offset, size, prot), after, set(), fate)

    @precondition(lambda self: self.pending is None)
    @rule(size=sizes, fate=fates)
    def resize(self, size: int, fate: str) -> None:
        resize = self.region.plan_resize(size)
        assert (resize.old_size, resize.new_size) == (self.size, size)
        after = {number: page for number, page in self.pages.items() if number * PAGE < size}
        check_change(resize.change, self.pages, after, self.pages.keys() - after.keys())
        assert not resize.change.gained
        if fate == "drop":
            return
        before = snapshot(self.region)
        self.region.apply_resize(resize)
        self.sized = True
        self.stale = resize.change
        if fate == "undo":
            back = Resize(resize.new_size, resize.old_size, resize.change.inverse())
            self.region.apply_resize(back)
            assert snapshot(self.region) == before
        else:
            self.pages, self.size = after, size

    @precondition(lambda self: self.stale is not None)
    @rule()
    def apply_a_stale_change(self) -> None:
        before, version = snapshot(self.region), self.region.table.version
        with pytest.raises(errors.StaleChange):
            self.region.apply(self.stale)
        assert snapshot(self.region) == before
        assert self.region.table.version == version

    # -- a change under way

    @precondition(lambda self: self.pending is None and self.sized and self.size >= PAGE)
    @rule(data=st.data(), prot=prots)
    def begin(self, data, prot) -> None:
        last = -(-self.size // PAGE) - 1
        offset = data.draw(st.integers(0, last)) * PAGE
        change = self.region.plan_map(offset, PAGE, prot, 0x31)
        if not self.lacked(int(change.gained)):
            self.region.begin(change)
            self.pending = change

    @precondition(lambda self: self.pending is not None)
    @rule(apply=st.booleans())
    def end(self, apply) -> None:
        change = self.pending
        assert change is not None
        self.pending = None
        if apply:
            self.region.apply(change)
            self.stale = change
            for part in change.ranges:
                assert part.new is not None
                self.pages |= pages_of(part.new)
        self.region.end()

    # -- descriptors

    @rule(access=accesses)
    def open_descriptor(self, access) -> None:
        held_to = rights_of(self.pages)
        if self.pending is not None:
            held_to |= int(self.pending.rights_after)
        if held_to & ~access:
            count = self.region.descriptors
            with refused(errors.ModeTooNarrow, self.region):
                self.region.check_open(access)
            with refused(errors.ModeTooNarrow, self.region):
                self.region.opened(access)
            assert self.region.descriptors == count
        else:
            self.region.opened(access)
            self.open.append(access)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_descriptor(self, data) -> None:
        access = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.region.closed(access)

    # -- looking

    @rule(
        offset=st.one_of(
            page_numbers.map(lambda number: number * PAGE),
            st.integers(0, (NUMBER_OF_PAGES + 1) * PAGE),
            st.just(U64 - 1),
        ),
        or_next=st.booleans(),
    )
    def query(self, offset, or_next) -> None:
        if not self.sized:
            with refused(errors.NotSized, self.region):
                self.region.query(offset, or_next=or_next)
            return
        number: int | None = offset // PAGE
        if number not in self.pages:
            above = [other for other in self.pages if other > number]
            number = min(above) if or_next and above else None
        if number is None:
            with refused(errors.NothingThere, self.region):
                self.region.query(offset, or_next=or_next)
            return
        found = self.region.query(offset, or_next=or_next)
        assert found.start <= number * PAGE < found.end
        assert pages_of(found).items() <= self.pages.items()

    @rule(
        offset=st.integers(0, (NUMBER_OF_PAGES + 1) * PAGE),
        size=st.one_of(st.just(0), st.integers(1, 100), st.integers(1, 6 * PAGE)),
    )
    def readable(self, offset, size) -> None:
        self.span(self.region.readable, Prot.READ, offset, size)

    @rule(
        offset=st.integers(0, (NUMBER_OF_PAGES + 1) * PAGE),
        size=st.one_of(st.just(0), st.integers(1, 100), st.integers(1, 6 * PAGE)),
    )
    def writable(self, offset, size) -> None:
        if size and offset >= self.size:
            with refused(errors.AccessHole, self.region):
                self.region.writable(offset, size)
        else:
            self.span(self.region.writable, Prot.WRITE, offset, size)

    def span(self, ask, right, offset, size) -> None:
        wanted = max(min(size, self.size - offset), 0)
        length = 0
        error = None
        while length < wanted:
            page = self.pages.get((offset + length) // PAGE)
            if page is None or not page.prot & right:
                error = errors.AccessHole if page is None else errors.AccessDenied
                break
            length = min(((offset + length) // PAGE + 1) * PAGE - offset, wanted)
        if error is not None and not length:
            with refused(error, self.region):
                ask(offset, size)
        else:
            assert ask(offset, size) == length

    # -- always

    @invariant()
    def table_is_canonical(self) -> None:
        check_table(self.region.table, self.pages)

    @invariant()
    def region_agrees(self) -> None:
        assert (self.region.size, self.region.sized) == (self.size, self.sized)
        assert self.region.limit == -(-self.size // PAGE) * PAGE
        assert all(number * PAGE < self.size for number in self.pages)
        rights = rights_of(self.pages)
        if self.pending is not None:
            rights |= int(self.pending.rights_after)
        assert self.region.rights == rights
        assert self.region.descriptors == len(self.open)

    @invariant()
    def every_descriptor_covers_what_lies_inside(self) -> None:
        assert not self.lacked(rights_of(self.pages))


RegionMachine.TestCase.settings = settings(
    max_examples=400,
    stateful_step_count=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRegion = RegionMachine.TestCase
