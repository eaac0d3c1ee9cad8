"""A region whose ranges are watched, what it reports, and programs that touch it: fixtures."""

from __future__ import annotations

import json
import os
import select
import time
from contextlib import contextmanager

import attrs
import pytest

from msharefs.abi import Feature
from msharefs.client import Region

PAGE = 4096
MIB = 1 << 20
PATIENCE = 30
ACCESSES = ("fault", "deny", "hold", "release")


@attrs.define(eq=False)
class Events:
    """The events of a region as they come; those that are no accesses are passed over."""

    fd: int
    buffer: bytes = b""

    def next(self):
        deadline = time.monotonic() + PATIENCE
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            line, newline, rest = self.buffer.partition(b"\n")
            if newline:
                self.buffer = rest
                event = json.loads(line)
                assert event["event"] != "overflow", event
                if event["event"] in ACCESSES:
                    return event
                continue
            left = deadline - time.monotonic()
            assert left > 0, "no event came"
            poll.poll(left * 1000)
            try:
                self.buffer += os.read(self.fd, 1 << 17)
            except BlockingIOError:
                continue

    def none(self):
        """No access was reported until now: what is asked for next is in the log after it."""
        try:
            while True:
                data = os.read(self.fd, 1 << 17)
                self.buffer += data
                if not data:
                    break
        except BlockingIOError:
            pass
        found = [json.loads(line) for line in self.buffer.splitlines()]
        self.buffer = b""
        assert [event for event in found if event["event"] in ACCESSES] == []


@contextmanager
def events_of(mount, name="r"):
    fd = os.open(mount.path / ".control" / name / "events", os.O_RDWR | os.O_NONBLOCK)
    try:
        yield Events(fd)
    finally:
        os.close(fd)


@pytest.fixture
def region(mount):
    with Region.create(mount.path / "r", MIB) as made:
        made.map(0, MIB, "rw-")
        if not made.info().features & Feature.NOTIFY:
            pytest.skip("this machine cannot watch ranges (mshare check says why)")
        yield made


@pytest.fixture
def events(mount, region):
    with events_of(mount) as found:
        yield found


@pytest.fixture
def start(start_toucher, mount, region):
    return lambda name="r": start_toucher(mount.path / name)
