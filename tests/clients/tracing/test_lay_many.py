"""Files laid over ranges of real processes by the compiled module, which leaves nothing else there."""

from __future__ import annotations

import errno
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.lowlevel

from msharefs.abi import Prot
from msharefs.clients import native
from msharefs.clients.borrow import borrow
from msharefs.clients.gone import Gone
from msharefs.clients.lay import Laid, laying
from msharefs.clients.lay_many import expected, lay_many
from msharefs.clients.replica import Map
from msharefs.clients.space import AddressSpace
from msharefs.region.errors import NotAdoptable, ObjectFailed
from tests.clients.tracing.conftest import until

PAGE = 4096
READ_WRITE = Prot.READ | Prot.WRITE
LIMIT = 20.0
NOBODY = (0, 0)


@pytest.fixture(autouse=True)
def _needed():
    if not native.present:
        pytest.skip(f"the compiled module is missing ({native.why})")
    if os.geteuid() != 0:
        pytest.skip("tracing other users' processes needs root")


@pytest.fixture
def region(tmp_path, monkeypatch) -> Path:
    """What the programs map: four pages of zeroes."""
    path = tmp_path / "region"
    path.write_bytes(bytes(4 * PAGE))
    monkeypatch.setenv("MAP_FIRST", str(path))
    return path


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two to be laid, of two pages each."""
    made = [tmp_path / "one", tmp_path / "two"]
    for number, path in enumerate(made):
        path.write_bytes(bytes([10 * number + 1]) * PAGE + bytes([10 * number + 2]) * PAGE)
    return made


def address_of(pid: int, path: Path) -> int:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(str(path)):
            return int(line.partition("-")[0], 16)
    raise AssertionError(f"{pid} does not map {path}")


def state(pid: int, at: int) -> tuple[object, ...]:
    """Descriptors and mappings, but for the four pages at ``at``."""
    maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    addresses = [[int(part, 16) for part in line[0].split("-")] for line in maps]
    return (
        sorted(os.listdir(f"/proc/{pid}/fd")),
        [pair for pair in addresses if not at <= pair[0] < at + 4 * PAGE],
    )


def bytes_at(pid: int, at: int) -> list[int]:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return [os.pread(memory.fileno(), 1, at + page * PAGE)[0] for page in range(4)]


def laid(path: Path, at: int, *pages: tuple[int, int], prot=READ_WRITE, flags=os.O_RDWR) -> Laid:
    """Pages ``(where, of the file)``; the inode is what a door is asked for."""
    steps = [Map(at + to * PAGE, PAGE, prot, (1, 0), page * PAGE) for to, page in pages]
    return Laid(path.stat().st_ino if path.exists() else 1, bytes(path), flags, 0, steps)


@contextmanager
def spaces_of(*children):
    found = [AddressSpace(child.pid) for child in children]
    try:
        yield found
    finally:
        for space in found:
            space.close()


async def lay(children, plans):
    with spaces_of(*children) as spaces:
        pids = [child.pid for child in children]
        return await lay_many(pids, plans, LIMIT, spaces=spaces, known=[False] * len(pids))


async def test_many_files_in_many_programs(start, region, files):
    one, two = files
    children = [start("read") for _ in range(5)]
    places = [address_of(child.pid, region) for child in children]
    before = [state(child.pid, at) for child, at in zip(children, places, strict=True)]
    plans = [[laid(one, at, (0, 1), (3, 0)), laid(two, at, (1, 1))] for at in places]
    assert await lay(children, plans) == ([None] * 5, {})
    for child, at, was in zip(children, places, before, strict=True):
        child.check_untouched()
        assert bytes_at(child.pid, at) == [2, 12, 0, 1]
        assert state(child.pid, at) == was
        assert expected(child.pid) == NOBODY


@pytest.mark.parametrize(
    ("wrong", "kind", "code"),
    [
        ({"path": b"/nowhere/at/all"}, NotAdoptable, None),
        ({"flags": os.O_RDONLY}, ObjectFailed, errno.EACCES),
        ({"path": b"/dev/null"}, ObjectFailed, errno.ENODEV),
    ],
    ids=str,
)
async def test_what_fails_leaves_nothing_behind(start, region, files, wrong, kind, code):
    child, fine = start("read"), start("read")
    at, there = (address_of(c.pid, region) for c in (child, fine))
    before = state(child.pid, at)
    bad = attrs.evolve(laid(files[0], at, (0, 0), (2, 1)), **wrong)
    plan = [laid(files[1], at, (1, 0)), bad, laid(files[1], at, (3, 1))]
    (found, none), left = await lay([child, fine], [plan, [laid(files[0], there, (0, 0))]])
    assert (type(found), none, left) == (kind, None, {})
    assert str(child.pid) in str(found)
    if code is not None:
        assert found.code == code
    assert bytes_at(child.pid, at) == [0, 11, 0, 0], "up to the one that failed"
    assert bytes_at(fine.pid, there) == [1, 0, 0, 0]
    assert state(child.pid, at) == before
    child.check_untouched()


async def test_who_has_no_descriptor_or_has_gone(start, region, files):
    child, ended = start("read"), start("read")
    at = address_of(child.pid, region)
    before = state(child.pid, at)
    used = len(os.listdir(f"/proc/{child.pid}/fd"))
    limit = resource_limit(child.pid, used)
    with spaces_of(child, ended) as spaces:
        ended.kill(signal.SIGKILL)
        assert ended.wait() == "killed 9"
        pids, plans = [child.pid, ended.pid], [[laid(files[0], at, (0, 0))]] * 2
        try:
            found, left = await lay_many(pids, plans, LIMIT, spaces=spaces, known=[False] * 2)
        finally:
            resource_limit(child.pid, limit)
    assert [type(one) for one in found] == [OSError, Gone]
    assert (found[0].errno, left) == (errno.EMFILE, {})
    assert state(child.pid, at) == before


def resource_limit(pid: int, files: int) -> int:
    """Set how many descriptors it may have; what it was."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (files, hard))
    return soft


@pytest.fixture
def waiting(tmp_path):
    """A file whose open() does not return: a FIFO that nobody writes to yet."""
    path = tmp_path / "waiting"
    os.mkfifo(path)
    return path


async def test_it_is_let_in_while_it_makes_the_call_and_no_longer(start, region, waiting):
    child = start("read")
    at = address_of(child.pid, region)
    before = state(child.pid, at)
    plan = [laid(waiting, at, (0, 0), prot=Prot.READ, flags=os.O_RDONLY)]
    outcomes = []
    async with trio.open_nursery() as nursery:

        async def run():
            outcomes.append(await lay([child], [plan]))

        nursery.start_soon(run)
        with trio.fail_after(LIMIT):
            while expected(child.pid) == NOBODY:
                await trio.lowlevel.checkpoint()
        assert expected(child.pid) == (waiting.stat().st_ino, os.O_RDONLY)
        assert expected(child.pid + 1) == NOBODY
        opened = await trio.to_thread.run_sync(os.open, waiting, os.O_WRONLY)
    os.close(opened)
    assert expected(child.pid) == NOBODY
    ((found,), left) = outcomes[0]
    assert (type(found), found.code, left) == (ObjectFailed, errno.ENODEV, {})
    assert state(child.pid, at) == before


async def test_a_signal_in_between_leaves_it_to_the_careful_way(
    start, region, files, waiting, tracer
):
    """With what the thread had in hand by then, which is given back."""
    child = start("read")
    at = address_of(child.pid, region)
    before = state(child.pid, at)
    plan = [
        laid(files[0], at, (1, 0)),
        laid(waiting, at, (0, 0), prot=Prot.READ, flags=os.O_RDONLY),
    ]
    outcomes = []
    async with trio.open_nursery() as nursery:

        async def run():
            outcomes.append(await lay([child], [plan]))

        nursery.start_soon(run)
        with trio.fail_after(LIMIT):
            while expected(child.pid)[0] != waiting.stat().st_ino:
                await trio.lowlevel.checkpoint()
        until(lambda: " 0x" in Path(f"/proc/{child.pid}/syscall").read_text(), "to wait")
        os.kill(child.pid, signal.SIGWINCH)  # of which the program never hears
    assert expected(child.pid) == NOBODY
    ((found,), left) = outcomes[0]
    assert (found, list(left)) == (None, [0])
    address, size, fd = left[0]
    assert (address > 0, size, fd) == (True, PAGE, -1)
    assert state(child.pid, at) != before, "the memory for the paths is still there"

    class Door:
        def expect(self, tid, inode, flags):
            pass

        def expect_no_more(self, tid):
            pass

    again = laying([laid(files[0], at, (1, 0), (2, 1))], Door(), left[0])
    assert await tracer.run([borrow(child.pid, again, limit=LIMIT)]) == [None]
    assert bytes_at(child.pid, at) == [0, 1, 2, 0]
    assert state(child.pid, at) == before
    child.check_untouched()
