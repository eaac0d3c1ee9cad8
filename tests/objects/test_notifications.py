"""Watched ranges that show files: in memory as memory, on storage as far as the kernel lets us know."""

from __future__ import annotations

import errno
import os
import signal
import tempfile

import pytest

from msharefs.abi import Feature, NotifyEvent, NotifyMode
from msharefs.client import Region
from tests.clients.touchers import start_toucher, toucher_program  # noqa: F401 - fixtures
from tests.conftest import GATE
from tests.objects.conftest import on_loop
from tests.service.test_notifications import decide, do, refused, seen
from tests.watched import MIB, PAGE, events_of

READ, WRITE = NotifyEvent.READ, NotifyEvent.WRITE
SIGNAL, HOLD = NotifyMode.SIGNAL, NotifyMode.HOLD
SIZE = 64 * PAGE
AT = 16 * PAGE
"""Where in the region the file begins, and in the file, too: its first page is not shown there."""
FIRST = 4 * PAGE


@pytest.fixture
def mount(start_mount):
    return start_mount(f"gate={GATE or 'ptrace'},log_period=20")


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    with on_loop(tmp_path_factory.mktemp("disk"), "ext4", 16 << 20) as place:
        yield place


@pytest.fixture
def make(request):
    """A file of each kind, of 64 pages."""
    made = []

    def new(kind):
        if kind == "memfd":
            fd = os.memfd_create("object")
        elif kind == "tmpfs":
            fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
        else:
            fd, path = tempfile.mkstemp(dir=request.getfixturevalue("disk"))
            os.unlink(path)
        made.append(fd)
        os.ftruncate(fd, SIZE)
        return fd

    yield new
    for fd in made:
        os.close(fd)


@pytest.fixture(params=["memfd", "tmpfs"])
def in_memory(request, make):
    return make(request.param)


@pytest.fixture
def stored(make):
    return make("disk")


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
def start(start_toucher, mount, region):  # noqa: F811
    return lambda: start_toucher(mount.path / "r")


def lay(region, fd, prot="rw-"):
    region.map(AT, SIZE - FIRST, prot, fd=fd, object_offset=FIRST)


def scanned(events, count):
    """The next pages that a scan reported: page of the region and process, sorted."""
    pages = []
    while len(pages) < count:
        event = events.next()
        assert (event["event"], event["via"], event["tid"]) == ("fault", "scan", 0)
        first, last = event["offset"] // PAGE, (event["offset"] + event["length"]) // PAGE
        pages += [(page, event["pid"]) for page in range(first, last)]
    assert len(pages) == count
    return sorted(pages)


# -- files in memory


def test_in_memory_log_is_as_for_memory(region, events, start, in_memory):
    one = start()
    lay(region, in_memory)
    region.notify(0, MIB)
    do(one, f"w {AT + 5}")
    assert seen(events.next()) == ("fault", "store", AT + 5, one.pid)
    do(one, f"w {AT}")
    other = start()
    do(other, f"w {AT + PAGE}")
    assert seen(events.next()) == ("fault", "store", AT + PAGE, other.pid)
    os.pwrite(region.fd, b"x", AT + 2 * PAGE + 9)
    assert seen(events.next()) == ("fault", "write", AT + 2 * PAGE + 9, os.getpid())
    assert os.pread(in_memory, 6, FIRST) == b"*\0\0\0\0*"
    assert os.pread(in_memory, 1, FIRST + 2 * PAGE + 9) == b"x"
    events.none()


def test_in_memory_loads_signals_and_holds_are_as_for_memory(region, events, start, in_memory):
    one = start()
    lay(region, in_memory)
    os.pwrite(in_memory, b"\x07", FIRST + 3)
    region.notify(AT, PAGE, READ)
    assert do(one, f"r {AT + 3}") == "read 7"
    assert seen(events.next()) == ("fault", "load", AT + 3, one.pid)
    region.notify(AT, PAGE, WRITE, mode=SIGNAL, signo=signal.SIGALRM)
    do(one, f"w {AT + 1}")
    assert seen(events.next()) == ("fault", "store", AT + 1, one.pid)
    assert do(one, "n") == "alarms 1"
    region.notify(AT, PAGE, WRITE, mode=HOLD)
    one.tell(f"w {AT + 2}")
    held = events.next()
    assert seen(held) == ("hold", "store", AT + 2, one.pid)
    assert os.pread(in_memory, 1, FIRST + 2) == b"\0"
    decide(events, "allow", held["seq"])
    assert one.hear() == f"wrote {AT + 2}"
    assert os.pread(in_memory, 1, FIRST + 2) == b"*"


def test_in_memory_what_is_forbidden_is_reported(region, events, start, in_memory):
    one = start()
    lay(region, in_memory, "r--")
    region.notify(0, MIB)
    assert do(one, f"w {AT}") == f"signal 11 code 0 at {AT}"
    assert seen(events.next()) == ("deny", "store", AT, one.pid)
    assert os.pread(in_memory, 1, FIRST) == b"\0"


def test_a_file_in_memory_can_be_scanned_for_as_well(region, events, start, in_memory):
    one = start()
    lay(region, in_memory)
    region.notify(0, MIB, scan=True)
    do(one, "w 0")
    do(one, f"w {AT}")
    assert scanned(events, 2) == [(0, one.pid), (AT // PAGE, one.pid)]


def test_what_was_opened_for_reading_is_watched_for_stores_and_has_none(
    region, events, start, make
):
    fd = make("memfd")
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    lay(region, read_only, "r--")
    os.close(read_only)
    one = start()
    refused(errno.EOPNOTSUPP, region.notify, 0, MIB, READ | WRITE)
    region.notify(0, MIB)
    do(one, "w 3")
    assert seen(events.next()) == ("fault", "store", 3, one.pid)
    assert do(one, f"w {AT}") == f"signal 11 code 1 at {AT}"
    events.none()


# -- files on storage


def test_on_storage_log_is_scanned_for(region, events, start, stored):
    one, other = start(), start()
    lay(region, stored)
    region.notify(0, MIB)
    do(one, f"w {AT + 5}")
    assert do(other, f"k {AT + 3 * PAGE}") == "call 100"
    assert scanned(events, 2) == [(AT // PAGE, one.pid), (AT // PAGE + 3, other.pid)]
    do(other, f"w {AT}")
    os.pwrite(region.fd, b"x", AT + 5 * PAGE + 9)
    assert seen(events.next()) == ("fault", "write", AT + 5 * PAGE + 9, os.getpid())
    do(one, f"w {AT + 5 * PAGE}")
    do(one, "w 9")
    assert seen(events.next()) == ("fault", "store", 9, one.pid), "memory beside it is caught"
    region.notify(0, MIB)
    do(other, f"w {AT}")
    assert scanned(events, 1) == [(AT // PAGE, other.pid)]
    assert os.pread(stored, 6, FIRST) == b"*\0\0\0\0*"
    events.none()


def test_on_storage_who_comes_later_and_children_are_looked_at(region, events, start, stored):
    lay(region, stored)
    region.notify(AT, SIZE - FIRST)
    one = start()
    do(one, f"w {AT}")
    assert scanned(events, 1) == [(AT // PAGE, one.pid)]
    one.tell(f"h {AT + PAGE}")
    heard = [one.hear(), one.hear()]
    child = int(next(line for line in heard if line != "child wrote").split()[1])
    try:
        assert scanned(events, 1) == [(AT // PAGE + 1, child)]
    finally:
        os.kill(child, signal.SIGKILL)


def test_on_storage_a_store_is_stopped_by_the_kernel_s_own_signal(region, events, start, stored):
    one, other = start(), start()
    lay(region, stored)
    region.notify(AT, PAGE, mode=SIGNAL, signo=signal.SIGSEGV)
    assert do(one, f"r {AT}") == "read 0"
    assert do(one, f"w {AT + 7}") == f"signal 11 code 1 at {AT + 7}"
    assert do(other, f"k {AT + 9}") == "call -1 EFAULT"
    assert os.pread(stored, PAGE, FIRST) == bytes(PAGE)
    events.none()
    late = start()
    assert do(late, f"w {AT + PAGE}") == f"wrote {AT + PAGE}"
    region.notify(AT, PAGE, NotifyEvent.DISARM)
    assert do(late, f"w {AT + 8}") == f"wrote {AT + 8}"
    assert os.pread(stored, PAGE, FIRST) == bytes(8) + b"*" + bytes(PAGE - 9)


def test_on_storage_write_is_signalled_and_reported(region, events, stored):
    lay(region, stored)
    region.notify(AT, PAGE, mode=SIGNAL, signo=signal.SIGSEGV)
    got = []
    previous = signal.signal(signal.SIGSEGV, lambda number, _: got.append(number))
    try:
        assert os.pwrite(region.fd, b"xyz", AT + 1) == 3
    finally:
        signal.signal(signal.SIGSEGV, previous)
    assert got == [signal.SIGSEGV]
    event = events.next()
    assert (seen(event), event["mode"], event["signo"]) == (
        ("fault", "write", AT + 1, os.getpid()),
        "signal",
        signal.SIGSEGV,
    )
    assert os.pread(stored, 5, FIRST) == b"\0xyz\0"


def test_on_storage_what_cannot_be_known_is_refused(region, events, start, stored):
    lay(region, stored)
    one = start()
    wanted = {"mode": SIGNAL, "signo": signal.SIGALRM}
    for events_wanted, keywords in ((READ, {}), (READ | WRITE, {}), (WRITE, {"mode": HOLD})):
        refused(
            errno.EOPNOTSUPP,
            lambda e=events_wanted, k=keywords: region.notify(0, MIB, e, **k),
        )
    refused(errno.EOPNOTSUPP, lambda: region.notify(AT, PAGE, **wanted))
    do(one, f"w {AT}")
    region.notify(0, AT, **wanted)
    do(one, "w 0")
    assert seen(events.next()) == ("fault", "store", 0, one.pid)


def test_a_file_comes_into_a_hole_that_is_watched(region, events, start, stored):
    one = start()
    region.unmap(AT, MIB - AT)
    region.notify(AT, MIB - AT, mode=HOLD)
    refused(errno.EOPNOTSUPP, lay, region, stored)
    assert do(one, f"w {AT - 1}") == f"wrote {AT - 1}"
    region.notify(AT, MIB - AT)
    lay(region, stored)
    do(one, f"w {AT + PAGE}")
    assert scanned(events, 1) == [(AT // PAGE + 1, one.pid)]


@pytest.mark.parametrize("kind", ["memfd", "disk"])
def test_what_is_replaced_is_watched_no_more(region, events, start, make, kind):
    one, other = make(kind), make(kind)
    client = start()
    lay(region, one)
    region.notify(0, MIB)
    do(client, f"w {AT + PAGE}")
    lay(region, other)
    event = events.next()
    assert (event["event"], event["offset"] // PAGE) == ("fault", AT // PAGE + 1)
    do(client, f"w {AT + 2 * PAGE}")
    region.map(AT, SIZE - FIRST, "rw-")
    do(client, f"w {AT + 3 * PAGE}")
    do(client, "w 1")
    assert seen(events.next()) == ("fault", "store", 1, client.pid)
    assert os.pread(one, 1, FIRST + PAGE) == b"*"
    assert os.pread(other, 1, FIRST + 2 * PAGE) == b"*"
    assert os.pread(other, 1, FIRST + 3 * PAGE) == b"\0"


def test_protections_of_a_watched_file_go_and_come(region, events, start, stored):
    one, other = start(), start()
    lay(region, stored)
    region.notify(AT, SIZE - FIRST)
    region.protect(AT, PAGE, "r--")
    assert do(one, f"w {AT}") == f"signal 11 code 1 at {AT}"
    do(other, f"w {AT + PAGE}")
    assert scanned(events, 1) == [(AT // PAGE + 1, other.pid)]
    region.protect(AT, PAGE, "rw-")
    do(other, f"w {AT}")
    assert scanned(events, 1) == [(AT // PAGE, other.pid)]
