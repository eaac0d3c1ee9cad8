"""Many processes and threads that store all the time, while the table changes under them.

Judged by content: once a call that takes the right to store has returned, what lies in the range does
not change any more, although everybody goes on trying; and every store that was made is there.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import time

import pytest

from tests.enforcement.clients import PAGE, PATIENCE, Client

PAGES = 8
SLOTS = 64
WORDS = 64
"""Of 8 bytes: what storm.c keeps for each slot."""
ENOUGH = 2_000_000


class Storm:
    """Programs that store, and what they say of it."""

    def __init__(self, share, region, tmp_path):
        self.share, self.region = share, region
        self.path = tmp_path / "counters"
        self.path.write_bytes(bytes(SLOTS * WORDS * 8))
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.counters = memoryview(self._map).cast("Q")
        self.slots = 0

    def start(self, kind, processes, threads):
        program = str(self.share.built("storm") / "a.out")
        arguments = [self.region.path, PAGES, self.path, self.slots, kind, processes, threads]
        process = subprocess.Popen(
            [program, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        client = Client("storm", process.stdout.fileno(), process.stdin.fileno(), process.pid)
        client.process = process
        self.share.clients.append(client)
        client.ready()
        self.slots += processes * (threads or 2)

    def of(self, what):
        return [self.counters[slot * WORDS + what] for slot in range(self.slots)]

    def stores(self):
        return sum(self.of(0))

    def faults(self):
        return self.of(1)

    def last(self, slot, page):
        return self.counters[slot * WORDS + 2 + page]

    def until_all_have(self, what, more=2):
        """Until every thread has stored (0) or faulted (1) so many times more."""
        aims = [count + more for count in self.of(what)]
        deadline = time.monotonic() + PATIENCE
        while any(now < aim for now, aim in zip(self.of(what), aims, strict=True)):
            assert time.monotonic() < deadline, (self.of(what), aims)
            time.sleep(0.001)

    def content(self, first=0, pages=PAGES):
        return os.pread(self.region.fd, pages * PAGE, first * PAGE)

    def close(self):
        self.counters.release()
        self._map.close()


@pytest.fixture
def storm(share, tmp_path):
    found = Storm(share, share.region(PAGES), tmp_path)
    yield found
    found.close()


def rounds(many, least, seconds=12):
    """So many rounds where the processors have nothing else to do, and on a busy machine fewer."""
    begun = time.monotonic()
    for done in range(many):
        if done >= least and time.monotonic() > begun + seconds:
            return
        yield done


def test_no_store_lands_after_the_call_has_returned(storm):
    storm.start("threads", 2, 2)
    storm.start("threads", 2, 2)
    region, size = storm.region, PAGES * PAGE
    storm.until_all_have(0)
    for toggle in rounds(400, 10):
        region.protect(0, size, "r--")
        before = storm.content()
        if toggle % 20 == 0:
            storm.until_all_have(1)
        assert storm.content() == before
        region.protect(0, size, "rw-")
        if toggle % 20 == 0:
            storm.until_all_have(0)
    storm.until_all_have(0, ENOUGH // storm.slots)
    region.protect(0, size, "r--")
    storm.until_all_have(1, PAGES + 1)
    words = memoryview(storm.content()).cast("Q")
    for slot in range(storm.slots):
        for page in range(PAGES):
            assert words[page * PAGE // 8 + slot] == storm.last(slot, page), (slot, page)
    assert [mapping.prot.text() for mapping in region] == ["r--"]


def test_a_part_is_shut_and_the_rest_goes_on(storm):
    storm.start("threads", 2, 2)
    region = storm.region
    for toggle in rounds(40, 6):
        page = toggle % PAGES
        region.protect(page * PAGE, PAGE, "r--" if toggle % 3 else "---")
        if toggle % 3:
            before = storm.content(page, 1)
            storm.until_all_have(1)
            storm.until_all_have(0)
            assert storm.content(page, 1) == before
        else:
            storm.until_all_have(1)
        region.protect(page * PAGE, PAGE, "rw-")
    storm.until_all_have(0)


def test_what_is_unmapped_and_mapped_again_is_empty(storm):
    """Nothing that is stored meanwhile comes back."""
    storm.start("threads", 2, 2)
    region = storm.region
    for _ in rounds(20, 3):
        region.unmap(0, PAGE)
        storm.until_all_have(1)
        region.map(0, PAGE, "r--")
        assert storm.content(0, 1) == bytes(PAGE)
        storm.until_all_have(1)
        assert storm.content(0, 1) == bytes(PAGE)
        region.protect(0, PAGE, "rw-")
    storm.until_all_have(0)


def test_children_that_are_forked_meanwhile_are_not_missed(storm):
    """Children and grandchildren, forked all the time, by processes that are being changed."""
    storm.start("forks", 2, 0)
    region, size = storm.region, PAGES * PAGE
    for toggle in rounds(40, 6):
        region.protect(0, size, "r--")
        before = storm.content()
        if toggle % 5 == 0:
            storm.until_all_have(1)
        for _ in range(20):
            os.sched_yield()
        assert storm.content() == before, toggle
        region.protect(0, size, "rw-")
        if toggle % 5 == 0:
            storm.until_all_have(0)
    assert [mapping.prot.text() for mapping in region] == ["rw-"]
