"""Mappings of a region with files that the gate does not see: nobody has to open or change anything."""

from __future__ import annotations

import os

import pytest

from tests.conftest import GATE
from tests.deaths.conftest import PAGE, SIGSEGV, SIZE, clients, place, programs, until  # noqa: F401
from tests.objects.mapped.test_hindered import A, B, at, elsewhere, map_now, opened_long_ago  # noqa: F401


@pytest.fixture
def shown(at, make):  # noqa: F811
    """A place with a file in the first two pages of its region; opened by us and nobody else."""
    at.region.map(0, 2 * PAGE, "rw-", fd=make())
    return at


def sees_the_file(one):
    """Sooner or later; it gets no zeroes for what it loads after that."""
    until(lambda: one.load(0) == A, "to be shown the file")
    assert (one.load(PAGE), one.load(2 * PAGE)) == (B, "0")
    return True


def test_a_second_mapping_by_the_same_descriptor(shown, clients):  # noqa: F811
    one = clients().map(shown.path)
    assert one.load(0) == A
    for _ in range(3):
        assert map_now(one, one.fd) == "ok"
        assert sees_the_file(one)
    assert shown.state(one.pid) == "replica"
    assert one.store(PAGE, 9) == "ok"
    assert os.pread(shown.region.fd, 1, PAGE) == b"\t"
    one.end()


def test_mapped_again_at_once_where_it_was(shown, clients):  # noqa: F811
    """Nobody saw it in between."""
    one = clients().map(shown.path)
    for _ in range(20):
        assert one.do(f"unmap 0 {SIZE}") == "ok"
        assert map_now(one, one.fd) == "ok"
        assert sees_the_file(one)
    one.end()


def test_the_first_mapping_long_after_open(shown, clients):  # noqa: F811
    one = clients()
    where = opened_long_ago(shown, one)
    assert map_now(one, where) == "ok"
    assert sees_the_file(one)
    one.end()


def test_by_a_descriptor_that_was_inherited(shown, clients):  # noqa: F811
    one = clients(pass_fds=(shown.region.fd,))
    assert map_now(one, shown.region.fd) == "ok"
    assert sees_the_file(one)
    assert map_now(one, shown.region.fd) == "ok"
    assert sees_the_file(one)
    one.end()


def test_a_file_that_comes_and_goes(at, clients, make):  # noqa: F811
    """Looking begins and ends with files, and with descriptors, and begins again."""
    fd, one = make(), clients()
    where = opened_long_ago(at, one)
    for _ in range(2):
        at.region.map(0, 2 * PAGE, "rw-", fd=fd)
        assert map_now(one, where) == "ok"
        assert sees_the_file(one)
        at.region.map(0, 2 * PAGE, "rw-")
        assert one.load(0) == "0"
    one.end()


def test_what_each_may_do_is_put_right_as_well(shown, clients):  # noqa: F811
    """A mapping that was made unseen has more rights than the table gives, elsewhere too."""
    shown.region.protect(0, PAGE, "r--")
    shown.region.protect(3 * PAGE, PAGE, "---")
    one = clients().map(shown.path)
    assert map_now(one, one.fd) == "ok"
    assert sees_the_file(one)
    assert one.store(0) == f"{SIGSEGV} 0"
    until(lambda: one.load(3 * PAGE) == f"{SIGSEGV} {3 * PAGE}", "to be made a replica")
    one.end()


@pytest.mark.skipif(GATE == "lsm", reason="the lsm gate does not let it in")
def test_who_cannot_be_shown_it_is_told_of(shown, clients, tmp_path):  # noqa: F811
    one = clients()
    where = opened_long_ago(shown, one)
    assert one.do(f"chroot {elsewhere(tmp_path)}") == "ok"
    assert map_now(one, where) == "ok"
    until(lambda: one.load(0) == f"{SIGSEGV} 0", "to be shut out")
    event = shown.event("unenforced")
    assert event["pid"] == one.pid
    assert "does not see the mount" in event["reason"]
    state, _ = shown.standing(one.pid)
    assert state == "unenforced"
    shown.region.unmap(0, SIZE)
    one.end()
