"""Changes at random, with processes that come, fork, map parts and go: all show what the model says."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
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
    run_state_machine_as_test,
)

from tests.enforcement.clients import PAGE

if TYPE_CHECKING:
    from tests.enforcement.conftest import Share

PAGES = 8
CLIENTS = 3
PROTS = ("---", "r--", "rw-")
SECONDS = 25


def joined(prots, first):
    """What a process that maps pages from ``first`` on has: (page, pages, protection), joined."""
    found = []
    for page, prot in enumerate(prots, first):
        if found and found[-1][2] == prot:
            found[-1] = (found[-1][0], found[-1][1] + 1, prot)
        else:
            found.append((page, 1, prot))
    return found


class Machine(RuleBasedStateMachine):
    """A region of up to PAGES pages; ``pages`` holds the protection of each, None for a hole."""

    share: Share
    number = 0

    @initialize()
    def begin(self):
        Machine.number += 1
        self.region = self.share.region(PAGES, name=f"m{Machine.number}", prot="")
        self.pages = [None] * PAGES
        self.bytes = [0] * PAGES
        self.limit = PAGES
        self.running = []
        self.join(0, PAGES)

    ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES))

    def within(self, where):
        start, size = where
        start = min(start, self.limit - 1)
        return start, min(start + size, self.limit)

    @precondition(lambda self: self.limit)
    @rule(where=ranges, prot=st.sampled_from(PROTS))
    def create(self, where, prot):
        start, end = self.within(where)
        self.region.map(start * PAGE, (end - start) * PAGE, prot)
        self.pages[start:end] = [prot] * (end - start)
        self.bytes[start:end] = [0] * (end - start)

    @precondition(lambda self: self.limit)
    @rule(where=ranges, prot=st.sampled_from(PROTS))
    def protect(self, where, prot):
        start, end = self.within(where)
        if None in self.pages[start:end]:
            with pytest.raises(OSError):
                self.region.protect(start * PAGE, (end - start) * PAGE, prot)
        else:
            self.region.protect(start * PAGE, (end - start) * PAGE, prot)
            self.pages[start:end] = [prot] * (end - start)

    @precondition(lambda self: self.limit)
    @rule(where=ranges)
    def unmap(self, where):
        start, end = self.within(where)
        self.region.unmap(start * PAGE, (end - start) * PAGE)
        self.pages[start:end] = [None] * (end - start)
        self.bytes[start:end] = [0] * (end - start)

    @rule(limit=st.integers(1, PAGES))
    def resize(self, limit):
        self.region.resize(limit * PAGE)
        self.pages[limit:] = [None] * (PAGES - limit)
        self.bytes[limit:] = [0] * (PAGES - limit)
        self.limit = limit

    @precondition(lambda self: len(self.running) < CLIENTS)
    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def join(self, first, count):
        client = self.share.start()
        client.first, client.count = first, min(count, PAGES - first)
        assert client.map(self.region.path, client.count, client.first) == 0
        self.running.append(client)

    @precondition(lambda self: 0 < len(self.running) < CLIENTS)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(range(len(self.running))))
        parent = self.running[parent]
        child = self.share.fork(parent)
        child.first, child.count = parent.first, parent.count
        self.running.append(child)

    @precondition(lambda self: len(self.running) > 1)
    @rule(data=st.data())
    def leave(self, data):
        client = self.running.pop(data.draw(st.sampled_from(range(len(self.running)))))
        if client.process is not None and any(c.process is None for c in self.running):
            assert client.ask("unmap", client.count * PAGE) == "result 0"  # its children go on
            return
        client.close()
        self.share.clients.remove(client)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), value=st.integers(1, 255))
    def store(self, data, value):
        client = self.running[data.draw(st.sampled_from(range(len(self.running))))]
        page = data.draw(st.integers(client.first, client.first + client.count - 1))
        offset = (page - client.first) * PAGE + 5
        if self.pages[page] == "rw-":
            client.store(offset, value)
            self.bytes[page] = value
        else:
            assert client.fault_of("store", offset, value) == client.address(page * PAGE + 5)

    @invariant()
    def everybody_shows_the_model(self):
        for client in self.running:
            part = range(client.first, client.first + client.count)
            if self.share.tells:
                assert client.ranges() == joined([self.pages[p] or "---" for p in part], part[0])
            for page in part:
                answer = client.ask("load", (page - client.first) * PAGE + 5)
                if self.pages[page] in {"r--", "rw-"}:
                    assert answer == f"value {self.bytes[page]}"
                else:
                    assert answer == f"segv {client.address(page * PAGE + 5):x}"
        for page in range(self.limit):
            if self.pages[page] in {"r--", "rw-"}:
                assert os.pread(self.region.fd, 1, page * PAGE + 5)[0] == self.bytes[page]

    def teardown(self):
        if hasattr(self, "region"):
            self.share.close()


def test_everybody_shows_what_the_model_says(share):
    with tempfile.TemporaryDirectory() as place:
        share.place = Path(place)
        machine = type("Bound", (Machine,), {"share": share})
        begun = time.monotonic()
        for _ in range(10):
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=4,
                    stateful_step_count=12,
                    deadline=None,
                    database=None,
                    report_multiple_bugs=False,
                    suppress_health_check=list(HealthCheck),
                ),
            )
            if time.monotonic() > begun + SECONDS / 2:  # as many as there is time for
                break
