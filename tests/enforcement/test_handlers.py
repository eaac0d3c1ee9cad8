"""Handlers of SIGSEGV: one that jumps away, one that repairs by an ioctl, and many at the same moment."""

from __future__ import annotations

import os
import time

import pytest

from tests.enforcement.clients import PAGE


def test_a_handler_that_jumps_away_goes_on(share):
    region = share.region()
    client = share.mapped(region)
    region.protect(0, PAGE, "r--")
    for offset in range(0, PAGE, 128):
        assert client.fault_of("store", offset, 1) == client.address(offset)
    assert os.pread(region.fd, PAGE, 0) == bytes(PAGE)
    region.protect(0, PAGE, "rw-")
    client.store(0, 1)
    assert os.pread(region.fd, 1, 0) == b"\1"


@pytest.mark.parametrize("thread", [False, True], ids=["one thread", "two threads"])
def test_a_handler_that_repairs_and_tries_again(share, thread):
    """The caller maps the region itself, and waits in its handler."""
    region = share.region()
    client = share.mapped(region)
    other = share.mapped(region)
    if thread:
        client.ask("thread")
    for page in range(4):
        client.ask("repair", page * PAGE, PAGE)
        region.protect(page * PAGE, PAGE, "r--")
        client.store(page * PAGE + 3, 7)
        assert client.call("repairs") == 1
        assert os.pread(region.fd, 1, page * PAGE + 3) == b"\7"
        other.store(page * PAGE + 4, 8)
    assert [m.prot.text() for m in region] == ["rw-"]


def test_a_handler_that_repairs_what_is_not_to_be_read(share):
    region = share.region()
    client = share.mapped(region)
    client.store(PAGE, 5)
    client.ask("repair", PAGE, PAGE)
    region.protect(0, 2 * PAGE, "---")
    assert client.load(PAGE) == 5
    assert client.call("repairs") == 1
    client.ask("repair", 0, 0)
    assert client.fault_of("load", 0) == client.address(0)


def test_processes_that_fault_at_the_same_moment(share):
    region = share.region()
    clients = [share.begin() for _ in range(6)]
    for client in clients:
        client.ready()
        assert client.map(region.path) == 0
    region.protect(0, 2 * PAGE, "r--")
    where = [client.address(9) for client in clients]
    begun = time.monotonic()
    for _ in range(10):
        for client in clients:
            client.say("store", 9, 1)
        assert [client.answer() for client in clients] == [f"segv {at:x}" for at in where]
        if time.monotonic() > begun + 10:  # a busy machine
            break
    assert os.pread(region.fd, PAGE, 0) == bytes(PAGE)
