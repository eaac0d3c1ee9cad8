"""The roster against processes that come, fork, exec, share their memory, and end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import attrs
import pytest
import trio

from msharefs.abi import Prot
from msharefs.clients.census import Census
from msharefs.clients.gone import Gone
from msharefs.clients.procmap import MappedRange
from msharefs.clients.roster import Attachment, Roster, State
from tests.clients.puppet import PAGE, PATIENCE, PRIVATE, SHARED, wait_until

CLONE = (
    "libc.clone(ctypes.cast(libc.pause, ctypes.c_void_p),"
    " ctypes.c_void_p(mmap(0, 65536, 3, 0x22, -1, 0) + 65536), 0x100 | 17, None)"
)
"""Another process with the same memory: CLONE_VM and nothing else."""


def of_nobody(files):
    """As clients that have mapped the same share them."""
    return {inode: [attrs.evolve(m, pid=0) for m in found] for inode, found in files.items()}


def of_others() -> list[str]:
    """What we have open of other processes, but for the puppets' own pidfds."""
    entries = [e for e in Path("/proc/self/fd").iterdir() if e.is_symlink()]
    return sorted(t for t in map(os.readlink, entries) if t.endswith("/maps") or "epoll" in t)


@pytest.fixture
def roster(shm):
    before = of_others()
    census = Census(shm[1])
    # Others on this machine may have files on the same tmpfs.
    roster = Roster(census, is_region=lambda inode: inode == shm[2])
    yield roster
    roster.close()
    census.close()
    assert len(roster) == 0
    assert not roster._by_pid
    assert not roster._by_region
    assert not roster._ordered
    assert roster.added == roster.forgotten
    assert of_others() == before


@pytest.fixture
async def ended(roster, nursery):
    """Hands out the clients that end, as ``watch`` tells of them."""
    told, hear = trio.open_memory_channel(1000)
    nursery.start_soon(roster.watch, told.send_nowait)

    async def next_one():
        with trio.fail_after(PATIENCE):
            return await hear.receive()

    next_one.waiting = hear.statistics
    return next_one


def mapping(puppet, fd, prot=3, pages=4, flags=SHARED):
    return puppet.run(f"mmap(0, {pages * PAGE}, {prot}, {flags}, {fd}, 0)")


def pids(clients) -> list[int]:
    return [client.pid for client in clients]


async def test_by_region_and_by_process(puppets, shm, roster):
    one, two = puppets(), puppets()
    first = roster.add(one.pid, [10, 20])
    second = roster.add(two.pid, [20])
    assert roster.add(one.pid, [30]) is first
    assert len(roster) == 2
    assert roster.of_pid(one.pid) is first
    assert roster.of_pid(os.getpid()) is None
    assert roster.of_region(10) == [first]
    assert roster.of_region(20) == [first, second]
    assert roster.of_region(99) == []
    assert set(first.regions) == {10, 20, 30}
    assert (first.comm, first.pid) == (one.run("open('/proc/self/comm').read()").strip(), one.pid)
    attached = first.regions[10]
    assert (attached.state, bool(attached.why)) == (State.UNENFORCED, True)
    roster.detach(first, 20)
    assert roster.of_region(20) == [second]
    roster.detach(second, 20)
    assert list(roster) == [first]
    roster.forget(second)
    with pytest.raises(Gone):
        second.space.check()
    with pytest.raises(Gone):
        roster.add(2, [10])  # a kernel thread


class Held:
    closed = 0

    def close(self) -> None:
        self.closed += 1


async def test_an_end_is_noticed_and_everything_closed(puppets, roster, ended):
    one, two = puppets(), puppets()
    first, second = roster.add(one.pid, [10]), roster.add(two.pid, [10])
    held = Held()
    first.on_close.append(held.close)
    one.kill()
    assert await ended() is first
    assert held.closed == 1
    assert roster.of_region(10) == [second]
    assert roster.of_pid(one.pid) is None
    two.close()
    assert await ended() is second
    assert len(roster) == 0


async def test_exec_makes_another_client_under_the_same_number(puppets, shm, roster, ended):
    fd, device, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    client = roster.add(puppet.pid, [inode])
    puppet.execute("sleep", "1000")
    with pytest.raises(Gone):
        client.space.windows(device, inode)
    after = roster.add(puppet.pid, [inode])
    assert after is not client
    assert list(roster) == [after]
    puppet.kill()
    assert await ended() is after


async def test_a_survey_adds_who_was_not_seen_and_drops_who_unmapped(puppets, shm, roster):
    fd, _, inode = shm
    puppet, other = puppets(fd), puppets(fd)
    address = mapping(puppet, fd)
    assert pids(await roster.survey()) == [puppet.pid]
    assert pids(await roster.survey()) == []
    child = puppet.fork()
    mapping(other, fd)
    assert pids(await roster.survey()) == [child.pid], "new processes only"
    assert pids(await roster.survey(full=True)) == [other.pid]
    assert pids(roster.of_region(inode)) == [puppet.pid, child.pid, other.pid]
    puppet.run(f"munmap({address}, {4 * PAGE})")
    mapping(puppet, fd, flags=PRIVATE)
    assert await roster.survey(full=True) == []
    assert roster.of_pid(puppet.pid) is not None, "what is left is private, and still is a mapping"
    puppet.execute("sleep", "1000")
    child.run(f"munmap({address}, {4 * PAGE})")
    assert await roster.survey(full=True) == []
    assert pids(roster) == [other.pid]
    assert roster.of_pid(puppet.pid) is None


async def test_a_full_survey_sees_what_clients_have_mapped_since(puppets, shm, roster, way):
    fd, device, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd, prot=1)
    await roster.survey()
    client = roster.of_pid(puppet.pid)
    assert [window.prot for window in client.files[inode]] == [Prot.READ]
    mapping(puppet, fd)
    await roster.survey(full=True)
    assert of_nobody(client.files) == of_nobody(client.space.files(device))
    assert len(client.files[inode]) == 2
    roster.detach(client, inode)
    assert len(roster) == 0
    assert pids(await roster.survey(full=True)) == [puppet.pid]


async def test_another_program_that_maps_a_region_as_well(puppets, shm, roster):
    """Between two looks a client becomes another program, which maps the region too."""
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    await roster.survey()
    client = roster.of_pid(puppet.pid)
    held = Held()
    client.on_close.append(held.close)
    puppet.turn_into_puppet()
    mapping(puppet, fd, prot=1)
    (after,) = await roster.survey(full=True)
    assert after is not client
    assert after.pid == puppet.pid
    assert roster.of_region(inode) == [after]
    assert held.closed == 1


async def test_who_is_met_by_a_gate_meanwhile_is_left_alone(puppets, shm, roster, monkeypatch):
    """A client that has unmapped the region when it is looked at, and maps it anew right then."""
    fd, _, inode = shm
    puppet = puppets(fd)
    address = mapping(puppet, fd)
    await roster.survey()
    client = roster.of_pid(puppet.pid)
    puppet.run(f"munmap({address}, {4 * PAGE})")
    look = roster._look

    def look_and_map(*arguments):
        seen = look(*arguments)
        trio.from_thread.run_sync(roster.add, puppet.pid, [inode])
        return seen

    monkeypatch.setattr(roster, "_look", look_and_map)
    await roster.survey(full=True)
    assert roster.of_region(inode) == [client]


async def test_only_regions_count(puppets, shm):
    fd, device, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    census = Census(device)
    roster = Roster(census, is_region=lambda number: number != inode)
    assert puppet.pid not in pids(await roster.survey(full=True))
    assert roster.of_pid(puppet.pid) is None
    roster.close()
    census.close()


async def test_each_survey_waits_for_the_one_that_found_them(puppets, shm, roster):
    """A new process is told to one caller only, yet all of them have it on the roster."""
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    await roster.survey()
    children = [puppet.fork().pid for _ in range(20)]
    new: list[int] = []

    async def survey() -> None:
        new.extend(pids(await roster.survey()))
        assert set(children) <= set(pids(roster.of_region(inode)))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(survey)
    assert sorted(new) == sorted(children)


async def test_processes_that_share_their_memory_are_one_client(puppets, shm, roster, ended):
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    copies = [puppet.fork() for _ in range(5)]
    sharer = puppet.run(CLONE)
    assert set(pids(await roster.survey())) == {puppet.pid, *(copy.pid for copy in copies)}
    client = roster.of_pid(puppet.pid)
    assert roster.of_pid(sharer) is client
    assert client.sharers == [sharer]
    assert roster.add(sharer, [inode]) is client
    assert client.sharers == [sharer]
    os.kill(sharer, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{sharer}/maps").exists() or not still_maps(sharer))
    puppet.kill()
    assert await ended() is client


def still_maps(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/maps").read_text())
    except OSError:
        return False


async def test_the_memory_lives_on_in_another_process(puppets, shm, roster, ended):
    """Its first process has ended: the client is the other one then, with all that is held."""
    fd, device, inode = shm
    puppet, other = puppets(fd), puppets(fd)
    mapping(puppet, fd)
    mapping(other, fd)
    sharer = puppet.run(CLONE)
    await roster.survey()
    client = roster.of_pid(puppet.pid)
    held = Held()
    client.on_close.append(held.close)
    puppet.kill()
    other.kill()
    assert (await ended()).pid == other.pid
    assert client.pid == sharer
    assert roster.of_pid(sharer) is client
    assert roster.of_pid(puppet.pid) is None
    assert roster.of_region(inode) == [client]
    assert [window.pid for window in client.space.windows(device, inode)] == [sharer]
    assert not held.closed
    os.kill(sharer, signal.SIGKILL)
    assert await ended() is client
    assert held.closed == 1


async def test_a_sharer_that_has_become_another_program_inherits_nothing(
    puppets, shm, roster, ended
):
    fd, _, _ = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    readable, writable = os.pipe()
    heir = puppets(readable)
    await roster.survey()
    client = roster.of_pid(puppet.pid)
    client.sharers.append(heir.pid)  # as it had been seen before its exec
    puppet.kill()
    assert await ended() is client
    assert len(roster) == 0
    os.close(readable)
    os.close(writable)


async def test_where_processes_cannot_be_compared_each_is_its_own(
    puppets, shm, roster, monkeypatch
):
    monkeypatch.setattr("msharefs.clients.space.SYS_KCMP", 100_000)
    fd, _, _ = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    sharer = puppet.run(CLONE)
    assert sorted(pids(await roster.survey())) == sorted([puppet.pid, sharer])
    os.kill(sharer, signal.SIGKILL)


async def test_hundreds_come_and_go_and_leave_nothing(puppets, shm, roster, ended):
    """The same number of descriptors and objects after the hundredth as after the last."""
    fd, _, inode = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    await roster.survey()
    levels = []
    for _ in range(6):
        puppet.do(
            "children = []\n"
            "go, stop = os.pipe()\n"
            "for _ in range(60):\n"
            "    pid = os.fork()\n"
            "    if not pid:\n"
            "        os.close(stop); os.read(go, 1); os._exit(0)\n"
            "    children.append(pid)\n"
        )
        children = set(puppet.run("children"))
        assert set(pids(await roster.survey())) == children
        assert len(roster.of_region(inode)) == 61
        puppet.do("os.close(stop); os.close(go)")
        assert {(await ended()).pid for _ in children} == children
        levels.append(kept(roster))
    assert set(levels) == {levels[0]}
    assert len(roster) == 1
    assert roster.forgotten == 360


def kept(roster) -> tuple[int, ...]:
    """Descriptors of this process, and entries of the roster."""
    lists = (roster, roster._by_pid, roster._by_region, roster._by_pidfd, roster._ordered)
    return len(list(Path("/proc/self/fd").iterdir())), *map(len, lists)


async def test_those_who_end_while_they_are_added(puppets, shm, roster, ended):
    """A storm of short lives: in the end only those who live are on the roster."""
    fd, _, _ = shm
    puppet = puppets(fd)
    mapping(puppet, fd)
    puppet.send("for _ in range(2000):\n if not os.fork(): os._exit(0)")
    for _ in range(60):
        await roster.survey()
        assert roster.of_pid(puppet.pid) or not roster.added
    assert puppet.receive() == (True, None)
    with trio.fail_after(PATIENCE):
        while len(roster) > 1:
            await ended()
    assert pids(roster) == [puppet.pid]


# -- what was declared


def window(first, last, prot=Prot.NONE):
    return MappedRange(1, first * PAGE, last * PAGE, prot, True, 0, 1)


def declare(attached, *ranges):
    for first, last, prot in ranges:
        attached.declare(first * PAGE, last * PAGE, Prot(prot))


def test_the_rights_of_a_client_are_those_it_was_mapped_with():
    attached = Attachment(1)
    declare(attached, (10, 20, 3), (30, 40, 1))
    assert attached.rights([window(10, 20)], unknown) == 3
    declare(attached, (30, 40, 1))
    assert attached.rights([window(10, 15), window(16, 20), window(30, 40)], unknown) == 1
    assert attached.rights([window(10, 15)], unknown) == 3, (
        "what is no longer mapped counts no more"
    )
    assert attached.declared == [(10 * PAGE, 15 * PAGE, Prot(3))]


def unknown(window):
    raise AssertionError(window)


def test_where_nothing_was_declared_somebody_else_says():
    attached = Attachment(1)
    declare(attached, (10, 20, 7))
    asked = []

    def otherwise(window):
        asked.append(window)
        return Prot(5)

    assert attached.rights([window(10, 20), window(50, 60)], otherwise) == 5
    assert asked == [window(50, 60)]
    assert attached.rights([window(10, 25)], otherwise) == 5
    assert attached.rights([window(8, 20)], otherwise) == 5
    assert attached.rights([], otherwise) == 7


def test_a_new_mapping_over_an_old_one_is_what_counts():
    attached = Attachment(1)
    declare(attached, (10, 30, 3), (15, 20, 1))
    assert attached.declared == [
        (10 * PAGE, 15 * PAGE, Prot(3)),
        (15 * PAGE, 20 * PAGE, Prot(1)),
        (20 * PAGE, 30 * PAGE, Prot(3)),
    ]
    assert attached.rights([window(10, 15), window(20, 30)], unknown) == 3
    declare(attached, (10, 30, 5))
    assert attached.rights([window(10, 30)], unknown) == 5


def test_parts_go_by_what_each_was_made_for():
    def window(start, end, prot=3, offset=0):
        return MappedRange(1, start, end, Prot(prot), True, offset, 16)

    attached = Attachment(16)
    attached.declare(10, 20, Prot(1))
    attached.declare(30, 40, Prot(3))
    asked = []

    def otherwise(mapped):
        asked.append((mapped.start, mapped.end))
        return mapped.prot

    parts = attached.parts([window(5, 25, 7, 100), window(30, 35), window(50, 60, 1)], otherwise)
    assert {int(prot): [(w.start, w.end, w.offset) for w in ws] for prot, ws in parts.items()} == {
        1: [(10, 20, 105), (50, 60, 0)],
        3: [(30, 35, 0)],
        7: [(5, 10, 100), (20, 25, 115)],
    }
    assert asked == [(5, 25), (5, 25), (50, 60)]
    # What was asked for is known from now on, however the mappings have been changed since.
    narrowed = [window(5, 25, 0), window(50, 60, 0)]
    parts = attached.parts(narrowed, otherwise)
    assert {int(prot) for prot in parts} == {1, 7}
    assert len(asked) == 3
