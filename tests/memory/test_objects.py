"""File objects by themselves: which are one, how long they are held open, and by whose rights."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import threading

import pytest
import trio
import trio.lowlevel

from msharefs.abi import Prot
from msharefs.memory.examine import examine
from msharefs.memory.objects import THREADS, Objects
from msharefs.region.errors import ObjectFailed

PAGE = 4096
RW = Prot.READ | Prot.WRITE
FS_IOC_SETFLAGS = 0x40086602
FS_IMMUTABLE_FL = 0x10


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "object"
    made.write_bytes(b"o" * PAGE)
    return made


@pytest.fixture(autouse=True)
def _close():
    """What a test has left open, as the end of the server would close it."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    for name in set(os.listdir("/proc/self/fd")) - before:
        with contextlib.suppress(OSError):  # the listing's own
            os.close(int(name))


def look(path, flags=os.O_RDWR, prot=Prot.READ):
    """As a caller's descriptor is examined; the caller closes its own at once."""
    return examine(os.open(path, flags), prot, 0, frozenset)


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


async def closed(fd):
    """Closing is a thread's work."""
    with trio.fail_after(30):
        while is_open(fd):
            await trio.lowlevel.checkpoint()


async def test_one_object_for_each_file_and_set_of_rights(path, tmp_path):
    objects = Objects()
    one = objects.take(look(path))
    duplicate = look(path)
    assert objects.take(duplicate) is one
    await closed(duplicate.fd)
    reader = objects.take(look(path, os.O_RDONLY))
    assert reader is not one
    assert (one.max_prot & RW, reader.max_prot & RW) == (RW, Prot.READ)
    assert fcntl.fcntl(reader.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    os.link(path, tmp_path / "link")
    assert objects.take(look(tmp_path / "link")) is one
    (tmp_path / "other").write_bytes(b"")
    other = objects.take(look(tmp_path / "other"))
    assert other is not one
    assert len(objects) == 3
    for shown in (one, one, one, reader, other):
        assert objects.of(shown.ident) is shown
        objects.release(shown.ident)
    assert len(objects) == 0
    assert objects.take(look(path)).ident not in {one.ident, reader.ident, other.ident}


async def test_a_file_that_took_the_others_name_and_number_is_another(tmp_path):
    """While one is held its inode is in use, whatever has become of its name."""
    objects, path = Objects(), tmp_path / "name"
    path.write_bytes(b"1")
    one = objects.take(look(path))
    path.unlink()
    path.write_bytes(b"2")
    other = objects.take(look(path))
    assert other is not one
    assert (one.read(0, 1), other.read(0, 1)) == (b"1", b"2")


async def test_it_is_open_as_long_as_somebody_holds_it(path):
    objects = Objects()
    one = objects.take(look(path))
    fd = one.fd
    objects.hold(one.ident)
    objects.release(one.ident)
    assert is_open(fd)
    objects.release(one.ident)
    await closed(fd)
    with pytest.raises(KeyError):
        objects.of(one.ident)


async def test_a_thread_keeps_it_open_whoever_lets_go_and_whoever_waits(path):
    objects, go, ended = Objects(), threading.Event(), []
    one = objects.take(look(path))
    fd = one.fd
    with trio.move_on_after(0.01) as scope:
        await one.in_thread(go.wait, ended=lambda: ended.append(True))
    assert scope.cancelled_caught
    objects.release(one.ident)
    assert is_open(fd)
    assert ended == []
    go.set()
    await closed(fd)
    with trio.fail_after(30):
        while not ended:
            await trio.lowlevel.checkpoint()
    assert ended == [True]


async def test_who_is_asked_to_go_on_does(path):
    one = Objects().take(look(path))
    go, asked = threading.Event(), []

    def go_on():
        asked.append(True)
        if len(asked) == 2:
            go.set()
        return True

    with trio.move_on_after(0.01) as scope:
        assert await one.in_thread(go.wait, go_on) is True
    assert len(asked) >= 2
    assert not scope.cancelled_caught


async def test_more_than_may_wait_at_once_wait_their_turn(path):
    objects = Objects()
    one = objects.take(look(path))
    go, running, ended = threading.Event(), [], []

    def work():
        running.append(True)
        go.wait()

    async with trio.open_nursery() as nursery:
        for _ in range(THREADS):
            nursery.start_soon(one.in_thread, work)
        with trio.fail_after(30):
            while len(running) < THREADS:
                await trio.lowlevel.checkpoint()
        with trio.move_on_after(0.01):
            await one.in_thread(work, ended=lambda: ended.append(True))
        assert ended == [True]  # it never began
        assert len(running) == THREADS
        go.set()
    assert await one.in_thread(lambda: "free") == "free"


async def test_what_work_raises_is_raised(path):
    objects = Objects()
    one = objects.take(look(path, os.O_RDONLY))
    with pytest.raises(ObjectFailed) as caught:
        await one.in_thread(lambda: one.write(0, b"x"))
    assert caught.value.code == errno.EBADF
    assert str(caught.value) == f"write of {path}: Bad file descriptor"
    fd = one.fd
    objects.release(one.ident)
    await closed(fd)


async def test_writes_end_where_the_file_does(path):
    one = Objects().take(look(path))
    assert one.write(PAGE - 2, b"abc") == 2
    assert one.write(PAGE, b"abc") == 0
    assert one.read(PAGE - 2, 10) == b"ab"
    assert one.size == PAGE


async def test_what_is_at_hand_is_read_at_once(path):
    one = Objects().take(look(path))
    assert one.read(0, PAGE) == b"o" * PAGE  # and is in the page cache now
    assert one.read_now(0, PAGE) in {b"o" * PAGE, None}
    assert one.read_now(PAGE - 1, 2) is None  # not all of it
    memory = os.memfd_create("memory")
    os.write(memory, b"m" * 10)
    other = Objects().take(examine(memory, RW, 0, frozenset))
    assert other.shmem
    assert other.read_now(0, 10) == b"m" * 10


async def test_a_file_that_may_not_be_opened_anew(path):
    """The caller's own description serves then, without appending to it."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, ctypes.c_long(FS_IMMUTABLE_FL))
    except OSError as error:
        os.close(fd)
        pytest.skip(f"files cannot be made immutable here: {error}")
    try:
        found = examine(os.dup(fd), RW, 0, frozenset)
    finally:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, ctypes.c_long(0))
        os.close(fd)
    assert not found.own
    one = Objects().take(found)
    assert fcntl.fcntl(one.fd, fcntl.F_GETFL) & os.O_APPEND
    assert one.write(10, b"here") == 4
    data = path.read_bytes()
    assert (len(data), data[10:14]) == (PAGE, b"here")


def test_what_is_discarded_is_closed(path):
    async def main():
        found = look(path)
        found.discard()
        await closed(found.fd)

    trio.run(main)


@pytest.mark.parametrize("prot", [RW, Prot.READ])
def test_nothing_stays_open_after_a_refusal(path, prot):
    fd = os.open(path, os.O_WRONLY)
    with pytest.raises(Exception, match="not readable"):
        examine(fd, prot, 0, frozenset)
    assert not is_open(fd)


def test_no_identity_is_another_ones(path, tmp_path):
    seen = {look(path).identity}
    for number in range(10):
        (tmp_path / f"{number}").write_bytes(b"")
        seen.add(look(tmp_path / f"{number}").identity)
    assert len(seen) == 11
