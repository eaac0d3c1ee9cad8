"""Fork servers: children and grandchildren obey as their parents do, from their first moment on."""

from __future__ import annotations

import os

import pytest

from tests.enforcement.clients import FATAL, PAGE


@pytest.mark.parametrize("language", ["c", "c-raw", "python", "perl"])
def test_children_and_grandchildren_obey(share, language):
    region = share.region()
    server = share.mapped(region, language)
    region.protect(0, PAGE, "r--")
    child = share.fork(server)
    assert child.load(0) == 0
    grandchild = share.fork(child)
    family = [server, child, grandchild]
    region.protect(PAGE, PAGE, "---")
    region.unmap(2 * PAGE, PAGE)
    for one in family:
        assert one.ranges()[-2:] == [(1, 2, "---"), (3, 1, "rw-")]
        if share.tells:
            assert one.ranges()[0] == (0, 1, "r--")
        one.store(3 * PAGE, 1)
    assert set(share.states(region)) == {one.pid for one in family}
    region.protect(0, PAGE, "rw-")
    region.map(2 * PAGE, PAGE, "rw-")
    region.protect(PAGE, PAGE, "rw-")
    for one in family:
        assert one.ranges() == [(0, 4, "rw-")]
        one.store(0, 1)
    region.protect(0, 2 * PAGE, "r--")
    late = share.fork(server)  # after the change: what it inherits is the rule
    for one in (late, grandchild, child, server):
        where = one.address(5)
        if language in FATAL and one is not server:
            one.say("store", 5, 9)
            assert one.answer() == f"segv {where:x}"
        else:
            assert one.fault_of("store", 5, 9) == where
    assert os.pread(region.fd, 1, 5) == b"\0"


def test_children_of_one_that_has_ended_obey(share):
    region = share.region()
    server = share.mapped(region)
    children = [share.fork(server) for _ in range(3)]
    region.protect(0, PAGE, "r--")
    server.close()
    share.clients.remove(server)
    region.protect(PAGE, PAGE, "---")
    region.protect(0, PAGE, "rw-")
    for child in children:
        assert child.ranges() == [(0, 1, "rw-"), (1, 1, "---"), (2, 2, "rw-")]
        child.store(0, 1)
        assert child.fault_of("load", PAGE) == child.address(PAGE)
    assert set(share.states(region)) == {child.pid for child in children}
