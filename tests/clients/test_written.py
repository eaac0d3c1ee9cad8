"""Stores that the kernel notes: in files on disks and in memory, by threads, calls and children."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess

import pytest
import trio

from msharefs.clients.borrow import borrow
from msharefs.clients.gone import Gone
from msharefs.clients.pagemap import NotNoted, scan, try_noting
from msharefs.clients.space import AddressSpace
from msharefs.clients.tracer import Tracer
from msharefs.clients.userfault import Outcome, UserfaultUnavailable
from msharefs.clients.written import Found, Written, make

PAGE = 4096
SIZE = 1 << 20
PATIENCE = 30


def filesystem(path):
    found = subprocess.run(
        ["stat", "--file-system", "--format=%T", path], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


@pytest.fixture(params=["disk", "shm"])
def file(request, tmp_path):
    """A file of 1 MiB."""
    if request.param == "disk":
        if filesystem(tmp_path) == "tmpfs":
            pytest.skip("no filesystem with storage under the directory for temporary files")
        path = tmp_path / "file"
    else:
        path = f"/dev/shm/written-{os.getpid()}"
    with open(path, "wb") as made:
        made.truncate(SIZE)
    yield path
    os.unlink(path)


@contextlib.asynccontextmanager
async def serving():
    """Something that serves what clients make; everything is closed in the end."""
    written, tracer = Written(), Tracer()
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(written.run)
            yield written, tracer
            nursery.cancel_scope.cancel()
    finally:
        written.close()
        await trio.to_thread.run_sync(tracer.close)


@contextlib.asynccontextmanager
async def noting(written, tracer, pid, *, own=True):
    """A client that may note stores."""
    space = AddressSpace(pid)
    noted = written.add(space)
    try:
        if own:
            (made,) = await tracer.run([borrow(pid, make)])
            if isinstance(made, UserfaultUnavailable):
                pytest.skip(f"stores cannot be noted here: {made}")
            written.serve(noted, made)
        yield noted
    finally:
        written.drop(noted)
        space.close()


def all_of(toucher):
    return [(toucher.address, toucher.address + SIZE)]


def pages(toucher, ranges):
    """The page numbers of ranges of addresses."""
    return [
        page
        for low, high in ranges
        for page in range((low - toucher.address) // PAGE, (high - toucher.address) // PAGE)
    ]


async def look(written, noted, toucher):
    (found,) = await written.look([(noted, lambda: all_of(toucher))])
    assert found is not None
    assert found.whole
    return pages(toucher, found.written)


async def test_stores_by_threads_and_by_calls_are_found_until_armed_anew(start_toucher, file):
    toucher = start_toucher(file)
    async with serving() as (written, tracer), noting(written, tracer, toucher.pid) as noted:
        await toucher.do("w 0")
        armed = await written.arm(noted, all_of(toucher))
        assert (armed.written, armed.lacking) == ([], [])
        assert await toucher.do(f"r {PAGE}") == "read 0"
        assert await toucher.do(f"p {PAGE}") == "call 100"
        assert await look(written, noted, toucher) == []
        await toucher.do(f"w {5 * PAGE + 17}")
        await toucher.do(f"t {9 * PAGE}")
        assert await toucher.do(f"k {11 * PAGE}") == "call 100"
        assert await toucher.do(f"k {13 * PAGE - 50}") == "call 100"
        assert await look(written, noted, toucher) == [5, 9, 11, 12, 13]
        assert await look(written, noted, toucher) == [5, 9, 11, 12, 13]
        armed = await written.arm(noted, all_of(toucher))
        assert pages(toucher, armed.written) == [5, 9, 11, 12, 13]
        assert await look(written, noted, toucher) == []
        await toucher.do(f"w {5 * PAGE}")
        assert await look(written, noted, toucher) == [5]


def test_the_trial_leaves_nothing_open():
    before = os.listdir("/proc/self/fd")
    try:
        try_noting()
    except OSError as error:
        pytest.skip(f"stores cannot be noted here: {error}")
    assert os.listdir("/proc/self/fd") == before


def test_what_notes_nothing_is_told_apart(monkeypatch):
    monkeypatch.setattr("msharefs.clients.pagemap._NEEDED", 0)
    with pytest.raises(OSError, match="not noted") as caught:
        try_noting()
    assert caught.value.errno == errno.EOPNOTSUPP


async def test_only_what_was_armed_is_noted(start_toucher, file):
    toucher = start_toucher(file)
    part = [(toucher.address + 4 * PAGE, toucher.address + 8 * PAGE)]
    async with serving() as (written, tracer), noting(written, tracer, toucher.pid) as noted:
        await written.arm(noted, part)
        for page in range(16):
            await toucher.do(f"w {page * PAGE}")
        (found,) = await written.look([(noted, lambda: part)])
        assert (pages(toucher, found.written), found.whole) == ([4, 5, 6, 7], True)
        (found,) = await written.look([(noted, lambda: [*part, *all_of(toucher)])])
        assert (pages(toucher, found.written), found.whole) == ([4, 5, 6, 7], False)
        assert pages(toucher, await written.release(noted, part)) == [4, 5, 6, 7]
        assert await written.look([(noted, lambda: part)]) == [Found([], False)]


async def test_more_ranges_than_one_call_tells_of(tmp_path, start_toucher):
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    toucher = start_toucher(path)
    async with serving() as (written, tracer), noting(written, tracer, toucher.pid) as noted:
        await written.arm(noted, all_of(toucher))
        for page in range(1, 256, 2):
            await toucher.do(f"w {page * PAGE}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("msharefs.clients.pagemap._AT_ONCE", 3)
            assert await look(written, noted, toucher) == list(range(1, 256, 2))
            armed = await written.arm(noted, all_of(toucher))
            assert pages(toucher, armed.written) == list(range(1, 256, 2))


async def test_what_became_of_the_page_changes_nothing(start_toucher, file):
    toucher = start_toucher(file)
    fd = os.open(file, os.O_RDWR)
    try:
        async with serving() as (written, tracer), noting(written, tracer, toucher.pid) as noted:
            await written.arm(noted, all_of(toucher))
            await toucher.do(f"w {3 * PAGE}")
            await toucher.do(f"w {200 * PAGE}")
            os.fsync(fd)
            await toucher.do("z")
            os.posix_fadvise(fd, 0, SIZE, os.POSIX_FADV_DONTNEED)
            assert await look(written, noted, toucher) == [3, 200]
            os.ftruncate(fd, SIZE // 2)
            os.ftruncate(fd, SIZE)
            os.pwrite(fd, b"by write()", 7 * PAGE)
            assert await toucher.do(f"r {210 * PAGE}") == "read 0"
            assert await look(written, noted, toucher) == [3, 200]
    finally:
        os.close(fd)


async def test_a_child_is_noted_from_its_first_store(start_toucher, file):
    toucher = start_toucher(file)
    async with serving() as (written, tracer), noting(written, tracer, toucher.pid) as noted:
        await written.arm(noted, all_of(toucher))
        await toucher.do("w 0")
        toucher.tell(f"h {6 * PAGE}")
        heard = {await toucher.answer(), await toucher.answer()}
        child = int(next(line for line in heard if line != "child wrote").split()[1])
        assert len(written) == 2
        try:
            async with noting(written, tracer, child, own=False) as young:
                assert await look(written, young, toucher) == [0, 6]
                assert await look(written, noted, toucher) == [0]
                armed = await written.arm(young, all_of(toucher))
                assert pages(toucher, armed.written) == [0, 6]
                assert armed.lacking == []
                assert await look(written, young, toucher) == []
                assert await written.release(young, all_of(toucher)) == []
                assert await written.look([(young, lambda: all_of(toucher))]) == [Found([], False)]
                assert len(young.userfaults) == 1
            assert await look(written, noted, toucher) == [0]
            assert len(written) == 1
        finally:
            pidfd = os.pidfd_open(child)
            os.kill(child, signal.SIGKILL)
        with trio.fail_after(PATIENCE):
            await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)
        assert await toucher.do("f 0") == "child wrote"
        assert (await toucher.answer()).endswith("status 0")
        await written.bury()
        assert len(written) == 1
        assert await look(written, noted, toucher) == [0]


async def test_who_has_made_none_is_told(start_toucher, file):
    toucher = start_toucher(file)
    async with (
        serving() as (written, tracer),
        noting(written, tracer, toucher.pid, own=False) as noted,
    ):
        armed = await written.arm(noted, all_of(toucher))
        assert armed.lacking == all_of(toucher)
        with pytest.raises(NotNoted):
            scan(noted.pagemap, *all_of(toucher)[0], rearm=False)


async def test_moved_memory_goes_on_being_noted(start_toucher, file):
    toucher = start_toucher(file)
    async with serving() as (written, tracer), noting(written, tracer, toucher.pid) as noted:
        await written.arm(noted, all_of(toucher))
        await toucher.do(f"w {2 * PAGE}")
        toucher.address = int((await toucher.do("m")).split()[2])
        await toucher.do(f"w {4 * PAGE}")
        assert await look(written, noted, toucher) == [2, 4]
        await toucher.do(f"u {3 * PAGE}")
        assert await look(written, noted, toucher) == [2, 4]


async def test_what_is_noted_otherwise_or_has_gone_is_told_apart(start_toucher):
    toucher = start_toucher()
    one, other = toucher.userfaults()
    other.close()
    async with serving() as (written, tracer), noting(written, tracer, toucher.pid) as noted:
        assert one.register(toucher.address, SIZE, 2) is Outcome.SERVED
        with pytest.raises(OSError, match="cannot be noted") as caught:
            await written.arm(noted, all_of(toucher))
        assert caught.value.errno == errno.EBUSY
        one.close()
        await toucher.do("c")
        await written.arm(noted, all_of(toucher))
        await toucher.do("w 0")
        toucher.process.kill()
        toucher.process.wait()
        assert await written.look([(noted, lambda: all_of(toucher))]) == [None]
        with pytest.raises(Gone):
            await written.arm(noted, all_of(toucher))
        with pytest.raises(Gone):
            written.add(noted.space)


async def test_what_noted_ends_stores_go_on(start_toucher, file):
    toucher = start_toucher(file)
    async with serving() as (written, tracer), noting(written, tracer, toucher.pid) as noted:
        await written.arm(noted, all_of(toucher))
    assert await toucher.do("w 0") == "wrote 0"
    assert sorted(os.listdir(f"/proc/{toucher.pid}/fd")) == ["0", "1", "2", str(toucher.file)]
