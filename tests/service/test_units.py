"""Parts of the service that stand alone: names, the event log, options, the errno boundary."""

from __future__ import annotations

import errno
import itertools
import json

import pyfuse3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.abi import PROT_ALL
from msharefs.clients.procmap import MappedRange
from msharefs.memory.store import Store
from msharefs.region.demand import Caught, Demand
from msharefs.region.events import Event, EventKind
from msharefs.service.batch import spans_of
from msharefs.service.errors import (
    ERRNO_OF,
    BadRename,
    NameTaken,
    NameTooLong,
    NoSuchName,
    NotEmpty,
    Reserved,
    errno_of,
    guarded,
)
from msharefs.service.eventlog import EventLog, Reader
from msharefs.service.filesystem import Filesystem
from msharefs.service.layout import newly, no_longer
from msharefs.service.nodes import RENAME_EXCHANGE, RENAME_NOREPLACE, Namespace
from msharefs.service.options import MountOptions, OptionError


@pytest.fixture
def names():
    store, dropped = Store.open(), []

    def drop(file):
        file.backing.close()
        dropped.append(file.region.name)

    made = Namespace(root_mode=0o1777, uid=0, gid=0, new_backing=store.new_backing, dropped=drop)
    made.dropped_names = dropped
    yield made
    made.clear()
    store.close()


def make(names, name=b"r"):
    return names.create_region(names.root, name, 0o600, 1, 2)


def test_a_region_goes_with_its_last_user(names):
    file = make(names)
    file.lookups, file.opens = 2, 1
    names.unlink(names.root, b"r")
    names.drop_if_dead(file)
    names.forget(file.ino, 2)
    assert names.dropped_names == []
    file.opens -= 1
    names.drop_if_dead(file)
    assert names.dropped_names == ["r"]
    with pytest.raises(NoSuchName):
        names.node(file.ino)


def test_renaming_follows_renameat2(names):
    one, other = make(names, b"one"), make(names, b"other")
    with pytest.raises(NameTaken):
        names.rename(names.root, b"one", names.root, b"other", RENAME_NOREPLACE)
    names.rename(names.root, b"one", names.root, b"other", RENAME_EXCHANGE)
    assert (one.region.name, other.region.name) == ("other", "one")
    moved, replaced = names.rename(names.root, b"one", names.root, b"other")
    assert (moved, replaced) == (other, one)
    assert names.root.entries == {b"other": other}
    with pytest.raises(BadRename):
        names.rename(names.root, b"other", names.root, b"x", 8)


def test_directories_carry_their_regions_along(names):
    d = names.make_directory(names.root, b"d", 0o755, 0, 0)
    e = names.make_directory(d, b"e", 0o755, 0, 0)
    file = names.create_region(e, b"r", 0o600, 0, 0)
    names.rename(names.root, b"d", names.root, b"f")
    assert file.region.name == "f/e/r"
    assert names.root.nlink == 3
    with pytest.raises(NotEmpty):
        names.remove_directory(d, b"e")
    with pytest.raises(BadRename):
        names.rename(names.root, b"f", e, b"loop")


def test_names_that_nobody_gets(names):
    for name in (b"mshare_info", b".control", b".objects", b"events"):
        with pytest.raises(Reserved):
            make(names, name)
    with pytest.raises(NameTooLong):
        make(names, b"x" * 256)
    make(names, b"x" * 255)
    with pytest.raises(NameTaken):
        make(names, b"x" * 255)


def event(number):
    return Event(EventKind.MAP, "r", offset=number)


def test_each_reader_has_its_own_place_and_hears_of_what_it_missed():
    log = EventLog(64)
    ring = log.new_region_ring()
    early = Reader(ring)
    for number in range(6):
        log.add(event(number), ring)
    late = Reader(ring)
    lines = [json.loads(line) for line in early.take(1 << 20).splitlines()]
    assert (lines[0]["event"], lines[0]["lost"]) == ("overflow", 2)
    assert [line["offset"] for line in lines[1:]] == [2, 3, 4, 5]
    assert len(late.take(1 << 20).splitlines()) == 4
    assert not early.ready
    assert [json.loads(line)["seq"] for line in Reader(log.ring).take(1 << 20).splitlines()] == [
        1, 2, 3, 4, 5, 6
    ]  # fmt: skip


def test_short_reads_lose_no_byte():
    log = EventLog()
    ring = log.new_region_ring()
    whole, bytewise = Reader(ring), Reader(ring)
    for number in range(3):
        log.add(event(number), ring)
    text = whole.take(1 << 20)
    assert b"".join(iter(lambda: bytewise.take(1), b"")) == text
    assert Reader(ring).take(len(text) - 1).count(b"\n") == 2, "whole lines where they fit"


async def test_a_closed_ring_is_the_end_of_the_file():
    log = EventLog()
    ring = log.new_region_ring()
    reader = Reader(ring)
    called = []
    reader.call_when_ready(lambda: called.append(1))
    ring.close()
    assert called == [1]
    answers = []
    reader.later(10).start(answers.append)
    assert answers == [b""]


def test_options_are_read_as_mount_gives_them():
    options = MountOptions.parse("rw,nosuid,size=64M,huge=always,mode=755,uid=5,noexec,x-a=b")
    assert (options.limit, options.huge, options.root_mode, options.uid) == (
        64 << 20, "always", 0o755, 5
    )  # fmt: skip
    assert options.noexec
    options = MountOptions.parse("gate=none,enforce=strict,protect=vma")
    assert (options.gate, str(options.enforce), str(options.protect)) == ("none", "strict", "vma")
    for text, why in (
        ("", "huge=advise"),
        ("huge=never", "huge=advise"),
        ("huge=advise,gate=none", "huge=always"),
        ("huge=always,gate=none", ""),
        ("huge=advise,automap", ""),
        ("huge=within_size,strict=v3", ""),
    ):
        found = MountOptions.parse(text).semantics.no_huge
        assert why in found
        assert bool(why) == bool(found)
    assert MountOptions.parse("").log_period_ms == 100
    assert MountOptions.parse("log_period=7").log_period_ms == 7
    wrongs = ("size=", "size=1", "size=x", "huge=maybe", "mode=9", "bogus", "uid=root")
    for wrong in (*wrongs, "gate=x", "enforce=x", "protect=x", "log_period=0", "io=native"):
        with pytest.raises(OptionError, match=wrong.partition("=")[0]):
            MountOptions.parse(wrong)


def test_every_handler_stands_behind_the_boundary():
    own = [name for name in vars(Filesystem) if name in vars(pyfuse3.Operations)]
    handlers = [name for name in own if not name.startswith("_") and name != "init"]
    handlers = [name for name in handlers if callable(getattr(Filesystem, name))]
    assert len(handlers) > 15
    assert all(hasattr(getattr(Filesystem, name), "__wrapped__") for name in handlers)


async def test_a_bug_is_eio_for_one_caller_and_a_traceback_in_the_log(caplog):
    @guarded
    class Buggy(pyfuse3.Operations):
        async def getattr(self, inode, ctx):  # noqa: ARG002 - pyfuse3's signature
            raise ZeroDivisionError

    with pytest.raises(pyfuse3.FUSEError) as caught:
        await Buggy().getattr(1, None)
    assert caught.value.errno == errno.EIO
    assert "ZeroDivisionError" in caplog.text
    assert "Traceback" in caplog.text


def test_errors_of_the_kernel_pass_only_where_a_caller_can_use_them():
    assert errno_of(OSError(errno.ENOSPC, "full"), "write") == errno.ENOSPC
    assert errno_of(OSError(errno.EBADF, "ours"), "write") == errno.EIO
    assert all(0 < code < 4096 for code in ERRNO_OF.values())


def test_a_read_that_waits_is_answered_by_the_event_itself():
    log = EventLog(16)
    ring = log.new_region_ring()
    reader = Reader(ring)
    first, second, given_up = [], [], []
    reader.later(1000).start(first.append)
    reader.later(1000).start(second.append)
    waiting = reader.later(1000)
    waiting.start(given_up.append)
    waiting.cancel()
    assert not first
    log.add(Event(EventKind.WRITE, "r"), ring)
    log.add(Event(EventKind.UNLINK, "r"), ring)
    kinds = sorted(json.loads(data)["event"] for (data,) in (first, second))
    assert kinds == ["unlink", "write"], "each line to one of them"
    assert not given_up


# -- what a region demands, in a process


def by_page(demands):
    return {page: d.caught for d in demands for page in range(d.start, d.end)}


@st.composite
def ascending(draw):
    """Demands as a table has them: in order, with gaps, none of which overlaps another."""
    bounds = sorted(draw(st.sets(st.integers(0, 30), max_size=12)))
    kinds = st.sampled_from([Caught.NOTHING, Caught.STORES, Caught.STORES | Caught.ACCESSES])
    return [
        Demand(start, end, PROT_ALL, draw(kinds))
        for start, end in itertools.pairwise(bounds)
        if draw(st.booleans())
    ]


@given(
    ascending(),
    st.lists(st.tuples(st.integers(100, 200), st.integers(0, 30), st.integers(1, 10)), max_size=6),
)
def test_where_demands_lie_in_a_process_is_what_each_page_says(demands, places):
    windows = [MappedRange(1, at, at + size, PROT_ALL, True, off) for at, off, size in places]
    found = spans_of(windows, demands, 7)
    caught = by_page(demands)
    assert sorted(
        (span.address + i, span.offset + i, span.caught, span.region)
        for span in found
        for i in range(span.size)
    ) == sorted(
        (at + i, off + i, caught[off + i], 7)
        for at, off, size in places
        for i in range(size)
        if off + i in caught
    )
    assert all(span.size > 0 for span in found)


@given(ascending(), ascending())
def test_what_is_newly_caught_and_what_no_longer_is_what_each_page_says(before, after):
    old, new = by_page(before), by_page(after)
    both = old.keys() & new.keys()
    assert by_page(newly(before, after)) == {p: new[p] for p in both if new[p] & ~old[p]}
    assert by_page(no_longer(before, after)) == {p: new[p] for p in both if old[p] & ~new[p]}
