"""Holds and watched calls as the service keeps them, without a mount."""

from __future__ import annotations

import attrs
import pytest
import trio
import trio.testing

from msharefs.abi import NotifyEvent, NotifyMode, OnTimeout, Prot
from msharefs.region.errors import AccessDenied, BadArgument, NothingThere
from msharefs.region.events import Actor, Event, EventKind
from msharefs.region.region import Region
from msharefs.region.watch import Watch
from msharefs.service.changes import RegionState
from msharefs.service.eventlog import Ring
from msharefs.service.holds import Decision, Holds
from msharefs.service.notifications import Notifications

PAGE = 4096
WRITER = Actor(1 << 30, 1 << 30, "writer")
DECIDER = Actor(77, 77, "decider")


@attrs.define(eq=False)
class File:
    """As much of a region file as holds look at."""

    ino: int = 16
    region: Region = attrs.field(factory=lambda: Region(16, "r"))


@attrs.define(eq=False)
class Log:
    """As much of Changes as notifications use."""

    told: list = attrs.field(factory=list)
    states: RegionState = attrs.field(factory=lambda: RegionState(Ring(16)))

    def tell(self, _file, event):
        self.told.append(event)
        return len(self.told)

    def state(self, _file):
        return self.states

    def of(self, kind):
        return [event for event in self.told if event.kind is kind]


def hold_event(file, offset=0):
    return Event(EventKind.HOLD, file.region.name, WRITER, "store", offset, 1)


@pytest.fixture
def log():
    return Log()


def begin(holds, file, watch, offset=0):
    found = []
    hold = holds.begin(file, watch, hold_event(file, offset), found.append)
    return hold, found


def watch(**more):
    return Watch(0, 8 * PAGE, NotifyEvent.WRITE, NotifyMode.HOLD, **more)


def how_it_ended(log):
    detail = dict(log.told[-1].detail)
    assert log.told[-1].kind is EventKind.RELEASE
    return detail["hold"], detail["decision"], detail["reason"]


@pytest.mark.parametrize("word", ["allow", "deny"])
def test_a_decision_settles_and_is_told(log, word):
    file, holds = File(), Holds(log.tell)
    holds.opened(file)
    hold, found = begin(holds, file, watch())
    assert holds.decide(f"{word} {hold.seq}\n".encode(), file, DECIDER) == len(word) + 3
    assert found == [Decision(word)]
    assert how_it_ended(log) == (hold.seq, word, "decided")
    assert not len(holds)
    with pytest.raises(NothingThere):
        holds.decide(f"{word} {hold.seq}".encode(), file, DECIDER)


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"allow", b"allow x", b"allow 1 2", b"maybe 1", b"allow -1", b"ALLOW 1"]
)
def test_nonsense_is_refused_and_changes_nothing(log, text):
    file, holds = File(), Holds(log.tell)
    holds.opened(file)
    hold, found = begin(holds, file, watch())
    with pytest.raises(BadArgument):
        holds.decide(b"allow %d\n" % hold.seq + text if text else text, file, DECIDER)
    assert not found


def test_several_lines_at_once_and_a_short_count_at_one_that_is_unknown(log):
    file, holds = File(), Holds(log.tell)
    holds.opened(file)
    one, first = begin(holds, file, watch())
    other, second = begin(holds, file, watch(), PAGE)
    text = b"allow %d\ndeny %d\nallow 999\n" % (one.seq, other.seq)
    assert holds.decide(text, file, DECIDER) == text.index(b"allow 999")
    assert (first, second) == ([Decision.ALLOW], [Decision.DENY])


def test_another_region_s_file_decides_nothing_and_the_mount_s_all(log):
    file, other, holds = File(), File(24), Holds(log.tell)
    holds.opened(file)
    hold, found = begin(holds, file, watch())
    with pytest.raises(NothingThere):
        holds.decide(b"allow %d" % hold.seq, other, DECIDER)
    assert holds.decide(b"allow %d" % hold.seq, None, DECIDER)
    assert found == [Decision.ALLOW]


@pytest.mark.parametrize("policy", list(OnTimeout))
async def test_time_over(log, autojump_clock, policy):
    file, holds = File(), Holds(log.tell)
    holds.opened(file)
    async with trio.open_nursery() as nursery:
        await nursery.start(holds.run)
        start = trio.current_time()
        late, _ = begin(holds, file, watch(timeout_ms=9000, on_timeout=policy))
        hold, found = begin(holds, file, watch(timeout_ms=250, on_timeout=policy), PAGE)
        never, _ = begin(holds, file, watch(), PAGE)
        await trio.sleep(0.249)
        assert not found
        await trio.sleep(0.002)
        assert 0.25 <= trio.current_time() - start < 0.3
        assert how_it_ended(log) == (hold.seq, policy.name.lower(), "timeout")
        await trio.sleep(20)
        assert how_it_ended(log)[0] == late.seq
        assert len(holds) == 1
        holds.gone(never)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("policy", list(OnTimeout))
def test_nobody_there_to_decide(log, policy):
    file, holds = File(), Holds(log.tell)
    hold, found = begin(holds, file, watch(on_timeout=policy))
    assert hold is None
    assert found == [Decision(policy.name.lower())]
    assert how_it_ended(log)[1:] == (policy.name.lower(), "nobody")


def test_the_last_one_to_close_an_events_file_ends_what_it_could_decide(log):
    file, other, holds = File(), File(24), Holds(log.tell)
    holds.opened(file)
    holds.opened(file)
    holds.opened(None)
    holds.opened(other)
    _, found = begin(holds, file, watch())
    _, elsewhere = begin(holds, other, watch())
    holds.closed(file)
    holds.closed(file)
    assert not found, "the mount's is open"
    holds.closed(None)
    assert found == [Decision.DENY]
    assert not elsewhere
    holds.closed(other)
    assert elsewhere == [Decision.DENY]


def test_a_change_has_those_in_its_range_judged_again(log):
    file, holds = File(), Holds(log.tell)
    holds.opened(file)
    _, first = begin(holds, file, watch(), 100)
    _, second = begin(holds, file, watch(), PAGE)
    holds.changed(file, PAGE, 2 * PAGE)
    assert (first, second) == ([], [Decision.AGAIN])
    holds.changed(File(24), 0, PAGE)
    assert not first


# -- calls


@pytest.fixture
def notes(log):
    file = File()
    file.region.apply_resize(file.region.plan_resize(8 * PAGE))
    flags = 0x31
    file.region.apply(file.region.plan_map(0, 8 * PAGE, Prot.READ | Prot.WRITE, flags))
    return file, Notifications(log, lambda _ino: file)


def admit(notes, file, offset, length, *, store=True):
    return notes.admit(file, offset, length, store=store, actor=WRITER, via="write")


def test_a_call_reports_each_page_once(log, notes):
    file, notes = notes
    log.states.watches.arm(Watch(PAGE, 3 * PAGE))
    assert admit(notes, file, 100, 3 * PAGE) == 3 * PAGE
    (event,) = log.told
    assert (event.kind, event.offset, event.length) == (EventKind.FAULT, PAGE, 2 * PAGE)
    assert admit(notes, file, PAGE, PAGE) == PAGE
    assert admit(notes, file, 0, PAGE) == PAGE
    assert admit(notes, file, PAGE, PAGE, store=False) == PAGE
    assert len(log.told) == 1


async def test_a_held_call_waits_and_what_lies_before_a_denied_range_is_written(log, notes):
    file, notes = notes
    notes.holds.opened(file)
    log.states.watches.arm(Watch(0, PAGE))
    log.states.watches.arm(Watch(PAGE, 2 * PAGE, NotifyEvent.WRITE, NotifyMode.HOLD))
    log.states.watches.arm(Watch(3 * PAGE, 4 * PAGE))
    for word, result in (("allow", 4 * PAGE), ("deny", PAGE - 10)):
        done = []

        async def call(done=done):
            done.append(await admit(notes, file, 10, 4 * PAGE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            assert not done
            seq = len(log.told)
            assert log.told[-1].kind is EventKind.HOLD
            assert (log.told[-1].offset, log.told[-1].length) == (PAGE, PAGE)
            notes.holds.decide(f"{word} {seq}".encode(), file, DECIDER)
        assert done == [result]
    assert [e.offset for e in log.of(EventKind.FAULT)] == [10, 3 * PAGE]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(admit_and_be_denied, notes, file, PAGE)
        await trio.testing.wait_all_tasks_blocked()
        notes.holds.decide(b"deny %d" % len(log.told), file, DECIDER)


async def admit_and_wait(notes, file, offset):
    await admit(notes, file, offset, 10)


async def admit_and_be_denied(notes, file, offset):
    with pytest.raises(AccessDenied):
        await admit(notes, file, offset, 10)


async def test_a_held_call_is_judged_again_after_a_change_and_forgotten_when_given_up(log, notes):
    file, notes = notes
    notes.holds.opened(file)
    log.states.watches.arm(Watch(0, PAGE, NotifyEvent.WRITE, NotifyMode.HOLD))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(admit_and_wait, notes, file, 0)
        await trio.testing.wait_all_tasks_blocked()
        log.states.watches.disarm(0, PAGE)
        notes.changed(file, 0, PAGE)
        assert how_it_ended(log)[1:] == ("again", "changed")
    log.states.watches.arm(Watch(0, PAGE, NotifyEvent.WRITE, NotifyMode.HOLD))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(admit_and_wait, notes, file, 0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert how_it_ended(log)[1:] == ("none", "gone")
    assert not len(notes.holds)
