"""Watched ranges whose stores are noted by the kernel: nobody waits, and nothing is lost."""

from __future__ import annotations

import errno
import os
import select
import signal
import time

import pytest

from msharefs.abi import NotifyEvent, NotifyMode
from msharefs.client import Region
from tests.conftest import GATE
from tests.service.test_notifications import MIB, PAGE, PATIENCE, do, refused


@pytest.fixture
def mount(start_mount):
    return start_mount(f"gate={GATE or 'ptrace'},log_period=20")


def found(events, count):
    """The next pages that were reported: page and process of each, sorted."""
    pages = []
    while len(pages) < count:
        event = events.next()
        assert (event["event"], event["via"], event["tid"]) == ("fault", "scan", 0)
        assert event["mode"] == "log"
        first, last = event["offset"] // PAGE, (event["offset"] + event["length"]) // PAGE
        pages += [(page, event["pid"]) for page in range(first, last)]
    assert len(pages) == count
    return sorted(pages)


def test_pages_are_found_once_whoever_stored_to_them(region, events, start):
    one, other = start(), start()
    do(one, "w 0")
    region.notify(0, MIB, scan=True)
    do(one, f"w {3 * PAGE}")
    do(one, f"w {4 * PAGE + 5}")
    assert found(events, 2) == [(3, one.pid), (4, one.pid)]
    do(other, f"w {4 * PAGE}")
    assert do(other, f"k {7 * PAGE}") == "call 100"
    assert found(events, 1) == [(7, other.pid)]
    region.notify(0, MIB, scan=True)
    do(one, f"w {4 * PAGE}")
    assert found(events, 1) == [(4, one.pid)]
    events.none()


def test_what_was_stored_before_is_told_before_it_is_armed_anew_or_given_up(region, events, start):
    one = start()
    region.notify(0, MIB, scan=True)
    do(one, f"w {2 * PAGE}")
    region.notify(0, MIB, scan=True)
    assert found(events, 1) == [(2, one.pid)]
    do(one, f"w {2 * PAGE}")
    do(one, f"w {5 * PAGE}")
    region.notify(0, MIB, NotifyEvent.DISARM)
    assert found(events, 2) == [(2, one.pid), (5, one.pid)]
    do(one, f"w {6 * PAGE}")
    region.notify(0, MIB, scan=True)
    do(one, f"w {7 * PAGE}")
    region.unmap(0, MIB)
    assert found(events, 1) == [(7, one.pid)]
    events.none()


def test_a_page_that_write_has_reported_is_not_reported_again(region, events, start):
    one = start()
    region.notify(0, MIB, scan=True)
    os.pwrite(region.fd, b"x", PAGE + 9)
    event = events.next()
    assert (event["via"], event["offset"], event["pid"]) == ("write", PAGE + 9, os.getpid())
    do(one, f"w {PAGE}")
    do(one, f"w {2 * PAGE}")
    assert found(events, 1) == [(2, one.pid)]


def test_a_child_and_who_comes_later_are_looked_at(region, events, start):
    one = start()
    region.notify(0, MIB, scan=True)
    one.tell(f"h {9 * PAGE}")
    heard = [one.hear(), one.hear()]
    child = int(next(line for line in heard if line != "child wrote").split()[1])
    try:
        assert found(events, 1) == [(9, child)]
        late = start()
        do(late, f"w {10 * PAGE}")
        assert found(events, 1) == [(10, late.pid)]
        region.notify(0, MIB, scan=True)
        do(one, f"w {9 * PAGE}")
        assert found(events, 1) == [(9, one.pid)]
    finally:
        os.kill(child, signal.SIGKILL)


def test_protection_is_the_mapping_s_own(region, events, start):
    one, other = start(), start()
    region.notify(0, MIB, scan=True)
    region.protect(0, PAGE, "r--")
    do(one, f"w {PAGE}")
    assert found(events, 1) == [(1, one.pid)]
    assert do(other, "w 0") == "signal 11 code 1 at 0"
    region.protect(0, PAGE, "rw-")
    do(one, "w 0")
    assert found(events, 1) == [(0, one.pid)]
    events.none()


@pytest.mark.parametrize("mode", ["log", "signal"])
def test_from_one_way_to_the_other_and_back(region, events, start, mode):
    one = start()
    keywords = {} if mode == "log" else {"mode": NotifyMode.SIGNAL, "signo": signal.SIGALRM}
    for _ in range(2):
        region.notify(0, MIB, scan=True)
        do(one, f"w {PAGE}")
        assert found(events, 1) == [(1, one.pid)]
        region.notify(0, MIB, **keywords)
        do(one, f"w {PAGE + 3}")
        event = events.next()
        assert (event["via"], event["offset"], event["tid"]) == ("store", PAGE + 3, one.pid)
    events.none()


def test_a_process_that_maps_it_and_has_one_thread_watches_itself(mount, region, events):
    with Region.open(mount.path / "r") as opened, opened.mmap() as memory:
        region.notify(0, MIB, scan=True)
        memory[3 * PAGE] = 1
        assert found(events, 1) == [(3, os.getpid())]
        memory[4 * PAGE] = 1
        region.notify(0, MIB, scan=True)
        assert found(events, 1) == [(4, os.getpid())]
        memory[3 * PAGE] = 1
        assert found(events, 1) == [(3, os.getpid())]
        events.none()


def test_what_is_mapped_later_by_a_process_itself_is_noted_soon(mount, region, events):
    with Region.open(mount.path / "r") as opened, opened.mmap() as one:
        region.notify(0, MIB, scan=True)
        with opened.mmap() as other:
            one[PAGE] = 1
            assert found(events, 1) == [(1, os.getpid())]
            told = None
            for page in range(2, MIB // PAGE):  # each in vain until the second mapping is noted
                other[page * PAGE] = 1
                if select.select([events.fd], [], [], 0.05)[0]:
                    told = events.next()
                    break
            assert told is not None
            assert (told["via"], told["pid"]) == ("scan", os.getpid())


def test_nothing_is_left_of_who_has_ended(mount, region, events, start):
    one = start()
    do(one, "w 0")
    before = mount.descriptors()
    region.notify(0, MIB, scan=True)
    other = start()
    for page in range(1, 4):
        assert do(other, f"f {page * PAGE}") == "child wrote"
        assert other.hear().endswith("status 0")
    for toucher in (one, other):
        toucher.process.kill()
        toucher.process.wait()
    deadline = time.monotonic() + PATIENCE
    while mount.descriptors() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_cannot_be_scanned_for_is_refused(region):
    refused(errno.EINVAL, lambda: region.notify(0, MIB, NotifyEvent.READ, scan=True))
    refused(errno.EINVAL, lambda: region.notify(0, MIB, mode=NotifyMode.HOLD, scan=True))
