"""Who is found to map files of one mount, in real processes."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from pathlib import Path

import pytest

from msharefs.abi import Prot
from msharefs.clients import census as census_module
from msharefs.clients.census import Census, Found, mapped_ranges, process_ids
from msharefs.clients.space import AddressSpace
from tests.clients.puppet import PAGE, PRIVATE, SHARED, wait_until


@pytest.fixture
def take(shm):
    """A census of the device of ``shm``; no descriptor is left of it."""
    census = Census(shm[1])
    yield census
    census.close()


@pytest.fixture(params=["seek", "list"])
def listing(request, take):
    """Both ways of listing the processes from a number on."""
    assert take._can_seek, "Linux has kept this place for twenty years; if not, lists are slower"
    take._can_seek = request.param == "seek"


def pids(found: list[Found]) -> set[int]:
    assert all(one.files for one in found)
    assert len({one.pid for one in found}) == len(found), "each process once"
    return {one.pid for one in found}


def of(found: list[Found], inode: int) -> set[int]:
    return {one.pid for one in found if inode in one.files}


def mapping(puppet, fd, prot=3, flags=SHARED, pages=4):
    return puppet.run(f"mmap(0, {pages * PAGE}, {prot}, {flags}, {fd}, 0)")


def test_one_pass_tells_who_maps_which_file(puppets, shm, take, way):
    fd, _, inode = shm
    other = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(other, PAGE)
    first, second, nothing = puppets(fd), puppets(fd, other), puppets(fd)
    address = mapping(first, fd)
    mapping(second, fd, prot=1)
    mapping(second, other, pages=1)
    found = {one.pid: one.files for one in take.full()}
    assert nothing.pid not in found
    assert found[first.pid].keys() == {inode}
    (window,) = found[first.pid][inode]
    assert (window.start, window.end) == (address, address + 4 * PAGE)
    assert (window.pid, window.prot, window.shared) == (first.pid, Prot(3), True)
    assert found[second.pid].keys() == {inode, os.fstat(other).st_ino}
    assert found[second.pid][inode][0].prot == Prot.READ
    os.close(other)


def test_private_mappings_only_when_asked(puppets, shm, take, way):
    fd, device, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd, flags=PRIVATE)
    assert puppet.pid not in pids(take.full())
    (one,) = [one for one in take.full(private=True) if one.pid == puppet.pid]
    assert [window.shared for window in one.files[inode]] == [False]
    assert [window.pid for window in mapped_ranges(device, inode)] == [puppet.pid]
    assert mapped_ranges(device, inode, [os.getpid()]) == []


def test_ourselves_and_kernel_threads_are_not_found(shm, take):
    with mmap.mmap(shm[0], PAGE):
        assert of(take.full(), shm[2]) == set()


def test_whoever_is_forked_is_found_once(puppets, shm, take, listing, way):
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    assert of(take.fresh(), inode) == {puppet.pid}, "the first look is at everyone"
    assert of(take.fresh(), inode) == set()
    children = [puppet.fork() for _ in range(5)]
    grandchild = children[0].fork()
    children[1].kill()
    alive = {child.pid for child in [*children, grandchild]} - {children[1].pid}
    assert of(take.fresh(), inode) == alive
    assert of(take.fresh(), inode) == set()
    assert of(take.full(), inode) == alive | {puppet.pid}
    assert of(take.fresh(), inode) == set()


def test_threads_among_the_new_numbers_are_passed_over(puppets, shm, take, listing):
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    take.full()
    puppet.do(
        "import threading, signal\n"
        "for _ in range(20): threading.Thread(target=signal.pause, daemon=True).start()"
    )
    child = puppet.fork()
    looked: list[int] = []
    look = take._look
    take._look = lambda pid, path, private: looked.append(pid) or look(pid, path, private)
    assert of(take.fresh(), inode) == {child.pid}
    threads = {int(t.name) for t in Path(f"/proc/{puppet.pid}/task").iterdir()}
    assert len(threads) == 21
    assert not threads & set(looked)


def test_a_process_that_cannot_be_seen_yet_is_found_later(puppets, shm, take, listing):
    """Its number was given out before it could be seen: as when fork() is still under way."""
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    hidden: set[int] = set()
    listed = take._processes_from
    take._processes_from = lambda first: [pid for pid in listed(first) if pid not in hidden]
    take.full()
    late = puppet.fork()
    hidden.add(late.pid)
    early = puppet.fork()
    assert of(take.fresh(), inode) == {early.pid}
    hidden.clear()
    assert of(take.fresh(), inode) == {late.pid}
    assert of(take.fresh(), inode) == set()


def test_what_is_kept_of_those_looked_at_does_not_grow(puppets, shm, take, monkeypatch):
    monkeypatch.setattr(census_module, "SETTLED", 0)
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    take.full()
    for _ in range(50):
        child = puppet.fork()
        assert of(take.fresh(), inode) == {child.pid}
        child.kill()
    assert len(take._seen) <= 4
    assert of(take.fresh(), inode) == set()


def test_numbers_that_come_round(puppets, shm, take, listing):
    """The numbers of before stand above those given out now, as after a lap."""
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    take.full()
    child = puppet.fork()
    # As if the last look had been when higher numbers were given out.
    high = max(process_ids()) + 1000
    take._last = take._mark = take._floor = high
    take._seen.clear()
    grandchild = child.fork()
    found = of(take.fresh(), inode)
    assert {child.pid, grandchild.pid} <= found
    assert take._lap == census_module.LAP
    assert of(take.fresh(), inode) == set()
    last = child.fork()
    assert of(take.fresh(), inode) == {last.pid}


def test_a_whole_lap_between_two_looks_makes_it_look_at_everyone(puppets, shm, take, monkeypatch):
    fd, _, inode = shm
    puppet = puppets(fd)
    take.full()
    mapping(puppet, fd)
    assert of(take.fresh(), inode) == set(), "not a new process"
    monkeypatch.setattr(census_module, "_forks", lambda: take._forks + take._limit)
    take._looked -= take._limit / census_module.FORKS_A_SECOND
    assert of(take.fresh(), inode) == {puppet.pid}
    monkeypatch.setattr(census_module, "_forks", lambda: take._forks + 5)
    take._looked -= take._limit / census_module.FORKS_A_SECOND
    assert of(take.fresh(), inode) == set(), "few were made meanwhile"


def test_a_first_thread_that_has_ended_hides_nobody(puppets, shm, take, way):
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    puppet.do("import threading, signal; threading.Thread(target=signal.pause).start()")
    puppet.send("libc.syscall(60, 0)")  # exit(2): this thread alone
    wait_until(lambda: "Z" in Path(f"/proc/{puppet.pid}/task/{puppet.pid}/stat").read_text())
    assert of(take.full(), inode) == {puppet.pid}
    assert of(take.full(private=True), inode) == {puppet.pid}
    puppet.kill()
    assert of(take.full(), inode) == set()


def test_processes_that_end_while_they_are_looked_at(puppets, shm, take):
    """A storm of short lives, looked at all the time: nothing but the one that stays is certain."""
    fd, _, inode = shm
    puppet, stays = puppets(fd), puppets(fd)
    mapping(puppet, fd)
    mapping(stays, fd)
    puppet.send("while True:\n if not os.fork(): os._exit(0)")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        take.fresh()
        assert {puppet.pid, stays.pid} <= of(take.full(), inode)
    assert len(os.listdir("/proc/self/fd")) == before
    os.kill(puppet.pid, signal.SIGKILL)


def test_each_new_process_is_told_to_one_of_many_callers(puppets, shm, take):
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    take.full()
    told: list[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            told.extend(of(take.fresh(), inode))

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    children = [puppet.fork() for _ in range(30)]
    stop.set()
    for thread in threads:
        thread.join()
    told.extend(of(take.fresh(), inode))
    assert sorted(told) == sorted(child.pid for child in children)


def test_regions_of_a_mount(mount, puppets):
    """Passthrough mappings carry the region's device and inode, and the opener's rights."""
    regions = []
    for name in ("one", "two"):
        fd = os.open(mount.path / name, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 4 * PAGE)
        regions.append((fd, os.fstat(fd).st_ino))
    read_only = os.open(mount.path / "one", os.O_RDONLY)
    device = os.stat(mount.path).st_dev
    census = Census(device)
    assert census.full() == []
    writer, reader = puppets(*(fd for fd, _ in regions)), puppets(read_only)
    for fd, _ in regions:
        mapping(writer, fd)
    mapping(reader, read_only, prot=1)
    found = {one.pid: one.files for one in census.full()}
    census.close()
    assert {pid: set(files) for pid, files in found.items()} == {
        writer.pid: {regions[0][1], regions[1][1]},
        reader.pid: {regions[0][1]},
    }
    for puppet, rights in ((writer, 7), (reader, 5)):
        space = AddressSpace(puppet.pid)
        (window,) = space.windows(device, regions[0][1])
        assert space.may(window) == rights
        space.close()
    for puppet in (writer, reader):
        puppet.kill()
    for fd in (read_only, *(fd for fd, _ in regions)):
        os.close(fd)
