"""Faults of real processes, served: let go, denied, held; forks, moves and ends followed."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from msharefs.clients.arming import in_lane
from msharefs.clients.faults import Answer, Faults, Span
from msharefs.clients.space import AddressSpace
from msharefs.clients.userfault import Outcome
from msharefs.region.demand import Caught

PAGE = 4096
REGION = 16
PATIENCE = 30
SIZE = 1 << 20
STORES, ACCESSES, DENIED = Caught.STORES, Caught.ACCESSES, Caught.DENIED


@attrs.define(eq=False)
class Host:
    """Remembers what it is told, and answers with what the test says."""

    answer: Answer = Answer.GO
    seen: list = attrs.field(factory=list)
    children: list = attrs.field(factory=list)
    moves: int = 0
    left: list = attrs.field(factory=list)
    freed: list = attrs.field(factory=list)
    over: list = attrs.field(factory=list)
    news: trio.Event = attrs.field(factory=trio.Event)

    def judge(self, access):
        self.seen.append((access.offset, access.store, access.actor.pid))
        self._tell()
        return self.answer

    def forked(self, _parent, child):
        self.children.append(child)
        self._tell()

    def moved(self, _served):
        self.moves += 1
        self._tell()

    def abandoned(self, _served, page):
        self.left.append(page)
        self._tell()

    def given_up(self, _served, page):
        self.freed.append(page)
        self._tell()

    def ended(self, _served, why):
        self.over.append(why)
        self._tell()

    def _tell(self):
        self.news.set()
        self.news = trio.Event()

    async def until(self, condition):
        with trio.fail_after(PATIENCE):
            while not condition():
                await self.news.wait()


async def eventually(condition):
    """For what the kernel tells of in no other way."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


@asynccontextmanager
async def serving(host):
    before = len(os.listdir("/proc/self/fd"))
    faults = Faults(host)
    async with trio.open_nursery() as nursery:
        await nursery.start(faults.run)
        yield faults
        nursery.cancel_scope.cancel()
    assert len(faults) == 0
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)  # the lanes close them


async def served(faults, toucher, caught, start=0, size=SIZE):
    client = faults.add(toucher, toucher.userfaults(), toucher.pid)
    assert await toucher.do("c") == "close 0", "as a borrowed thread would have done"
    span = Span(toucher.address + start, size, REGION, start, caught)
    assert await faults.bring(client, [span]) is Outcome.SERVED
    return client


async def test_each_page_is_caught_once_until_it_is_armed_again(start_toucher):
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        for _ in range(2):
            assert await toucher.do(f"w {PAGE + 7}") == f"wrote {PAGE + 7}"
            assert await toucher.do(f"w {PAGE + 9}") == f"wrote {PAGE + 9}"
            assert await toucher.do("r 0") == "read 0"
            assert host.seen == [(PAGE + 7, True, toucher.pid)]
            host.seen.clear()
            await faults.bring(client, client.spans)
        assert client.faults == 2


async def test_threads_that_store_at_once_are_all_let_go(start_toucher):
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        await served(faults, toucher, STORES)
        assert await toucher.do("t 8192") == "threads done"
        assert {offset for offset, _, _ in host.seen} == {8192}
        assert toucher.memory()[8192] == 42


async def test_a_store_inside_a_system_call_is_caught_and_let_go(start_toucher):
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        await served(faults, toucher, STORES)
        assert await toucher.do("k 4096") == "call 100"
        assert host.seen == [(4096, True, toucher.pid)]


async def test_denied_means_sigsegv_at_the_exact_address_and_no_store(start_toucher):
    toucher, host = start_toucher(), Host(Answer.DENY)
    async with serving(host) as faults:
        await served(faults, toucher, STORES | DENIED)
        assert await toucher.do("r 12345") == "read 0"
        assert await toucher.do("w 12345") == "signal 11 code 0 at 12345"
        assert await toucher.status() == 3
        assert host.seen == [(12345, True, toucher.pid)]


async def test_a_denied_store_inside_a_system_call_is_efault(start_toucher):
    toucher, host = start_toucher(), Host(Answer.DENY)
    async with serving(host) as faults:
        await served(faults, toucher, STORES | DENIED)
        assert await toucher.do("k 4096") == "call -1 EFAULT"
        assert await toucher.do("p 4096") == "call 100"
        assert host.seen == []


async def test_a_handler_may_jump_out_or_repair_and_retry(start_toucher):
    toucher, host = start_toucher(), Host(Answer.DENY)
    async with serving(host) as faults:
        await served(faults, toucher, STORES | DENIED)
        assert await toucher.do("l 4096") == "jumped"
        assert await toucher.do("l 4096") == "jumped"
        assert len(host.seen) == 2
        assert toucher.memory()[4096] == 0
        host.answer = Answer.GO
        assert await toucher.do("l 4096") == "wrote 4096"


async def test_blocking_sigsegv_saves_nobody(start_toucher):
    toucher, host = start_toucher(), Host(Answer.DENY)
    async with serving(host) as faults:
        await served(faults, toucher, STORES | DENIED)
        toucher.tell("s 4096")
        assert await toucher.status() == -signal.SIGKILL


async def test_loads_are_caught_where_pages_are_not_mapped(start_toucher):
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        assert await toucher.do("w 4096") == "wrote 4096"
        await served(faults, toucher, STORES | ACCESSES)
        assert await toucher.do("z") == "zap 0"
        assert await toucher.do("r 4097") == "read 0"
        assert await toucher.do("r 4096") == "read 42"
        assert await toucher.do("r 8192") == "read 0", "where the object has no page yet"
        assert await toucher.do("w 4098") == "wrote 4098"
        assert await toucher.do("w 8192") == "wrote 8192"
        assert await toucher.do("w 16384") == "wrote 16384"
        assert [seen[:2] for seen in host.seen] == [
            (4097, False),
            (8192, False),
            (4098, True),
            (8192, True),
            (16384, True),
        ]


async def test_a_range_given_up_is_caught_no_more_and_frees_who_waits(start_toucher):
    toucher, host = start_toucher(), Host(Answer.WAIT)
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        toucher.tell("w 4096")
        await host.until(lambda: host.seen)
        assert await faults.bring(client, [Span(toucher.address, SIZE, REGION, 0)])
        assert await toucher.answer() == "wrote 4096"
        assert client.spans == []
        assert host.freed == [toucher.address + 4096]


@pytest.mark.parametrize("answer", [Answer.GO, Answer.DENY, Answer.WAIT])
async def test_who_waits_is_answered(start_toucher, answer):
    toucher, host = start_toucher(), Host(Answer.WAIT)
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        toucher.tell("l 4100")
        await host.until(lambda: client.waiting)
        host.answer = Answer.GO
        faults.settle(client, toucher.address + 4096, answer)
        told = await toucher.answer()
        assert told == ("jumped" if answer is Answer.DENY else "wrote 4100")
        assert len(host.seen) == (2 if answer is Answer.WAIT else 1)
        assert not client.waiting


async def test_a_waiting_thread_takes_signals_and_is_known_when_it_asks_again(start_toucher):
    toucher, host = start_toucher(), Host(Answer.WAIT)
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        toucher.tell("a 4096")
        await host.until(lambda: client.waiting)
        status = Path(f"/proc/{toucher.pid}/status")
        switches = _switches(status)
        await eventually(lambda: _switches(status) >= switches + 5)
        assert len(host.seen) == 1
        faults.settle(client, toucher.address + 4096, Answer.GO)
        assert await toucher.answer() == "wrote 4096 after ticks"


async def test_a_system_call_that_waits_and_is_denied_after_all_is_killed(start_toucher):
    toucher, host = start_toucher(), Host(Answer.WAIT)
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        toucher.tell("k 4096")
        await host.until(lambda: client.waiting)
        await eventually(lambda: _waits(toucher.pid))
        faults.settle(client, toucher.address + 4096, Answer.DENY)
        assert await toucher.status() == -signal.SIGKILL


def _waits(pid):
    return Path(f"/proc/{pid}/wchan").read_text() == "handle_userfault"


async def test_a_signal_to_a_waiting_system_call_starves_nobody(start_toucher):
    toucher, other, host = start_toucher(), start_toucher(), Host(Answer.WAIT)
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        await served(faults, other, STORES)
        toucher.tell("b 4096")
        await host.until(lambda: client.waiting)
        # From the first tick on the kernel asks again and again; it is listened to now and then.
        await eventually(lambda: faults._resting)
        host.answer = Answer.GO
        for page in range(20):
            assert await other.do(f"w {page * PAGE}") == f"wrote {page * PAGE}"
        assert len(host.seen) == 21
        faults.settle(client, toucher.address + 4096, Answer.GO)
        assert await toucher.answer() == "wrote 4096 after ticks"


def _switches(status):
    lines = status.read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("voluntary_ctxt_switches"))


@pytest.mark.parametrize("caught", [STORES, STORES | DENIED])
async def test_a_child_is_served_from_its_first_instruction(start_toucher, caught):
    toucher, host = start_toucher(), Host(Answer.DENY if caught & DENIED else Answer.GO)
    async with serving(host) as faults:
        await served(faults, toucher, caught)
        first = await toucher.do("f 4100")
        if caught & DENIED:
            assert first == "signal 11 code 0 at 4100"
        else:
            assert first == "child wrote"
        assert (await toucher.answer()).startswith("child ")
        (child,) = host.children
        (seen,) = host.seen
        assert seen == (4100, True, child.pid)
        assert child.pid not in {None, toucher.pid}
        assert not await faults.alive(child)
        assert host.over == ["ended"]


async def test_a_child_of_a_client_with_both_descriptors_has_both(start_toucher):
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES, 0, SIZE // 2)
        rest = Span(toucher.address + SIZE // 2, SIZE // 2, REGION, SIZE // 2, STORES | DENIED)
        assert await faults.bring(client, [rest]) is Outcome.SERVED
        told = sorted([await toucher.do("h 0"), await toucher.answer()])
        assert told[1] == "child wrote"
        pid = int(told[0].split()[1])
        try:
            (child,) = host.children
            assert len(child.halves) == 2
            assert [s.offset for s in child.spans] == [0, SIZE // 2]
            assert child.pid == pid
        finally:
            os.kill(pid, signal.SIGKILL)


def mapped(pid):
    return Path(f"/proc/{pid}/maps").read_text()


def zombie(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")


async def forked(toucher, host, count):
    """So many children of it that do nothing, and what serves them, in any order."""
    before = len(host.children)
    pids = [int((await toucher.do("g")).split()[1]) for _ in range(count)]
    await host.until(lambda: len(host.children) == before + count)
    return pids, host.children[before:]


async def test_children_are_told_apart_without_a_word_from_them(start_toucher, monkeypatch):
    monkeypatch.setattr("msharefs.clients.faults.BURIAL_PAUSE", 3600)
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults, AsyncExitStack() as spaces:

        def space(pid):
            found = AddressSpace(pid)
            spaces.callback(found.close)
            return found

        await served(faults, toucher, STORES)
        pids, children = await forked(toucher, host, 6)
        try:
            of = {pid: space(pid) for pid in pids}
            maps = {pid: mapped(pid) for pid in pids}
            others = [space(toucher.pid), space(os.getppid())]
            claims = await faults.claim([*others, *of.values()])
            assert set(claims.found) == set(of.values())
            assert set(claims.found.values()) == set(children)
            assert (claims.unknown, claims.ended) == ([], [])
            for pid, its in of.items():
                assert claims.found[its].pid == pid
                assert mapped(pid) == maps[pid], "nothing is left of it"
            # What each one stores tells who it really is.
            for pid in pids[::-1]:
                os.kill(pid, signal.SIGUSR1)
                await host.until(lambda: len(host.seen) == 1)
                ((offset, store, seen),) = host.seen
                assert (offset, store, seen) == (0, True, pid)
                assert claims.found[of[pid]].faults == 1
                host.seen.clear()
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)


async def test_children_that_have_ended_are_buried_and_taken_for_nobody(start_toucher, monkeypatch):
    toucher, host = start_toucher(), Host()
    monkeypatch.setattr("msharefs.clients.faults.BURIAL_PAUSE", 3600)
    async with serving(host) as faults:
        await served(faults, toucher, STORES)
        (first, second, third), children = await forked(toucher, host, 3)
        os.kill(first, signal.SIGKILL)
        os.kill(third, signal.SIGKILL)
        await eventually(lambda: zombie(first) and zombie(third))
        space = AddressSpace(second)
        try:
            claims = await faults.claim([space])
            (child,) = claims.found.values()
            assert await faults.alive(child)
            faults.adopt(child, second)
            left = [one for one in children if one is not child]
            assert faults.unmet() == [one for one in left if one.halves]
            for one in faults.unmet():
                assert not await faults.alive(one)
            assert faults.unmet() == []
            assert len(host.over) == 2
            assert (await faults.claim([space])).found == {}, "it is known already"
        finally:
            space.close()
            os.kill(second, signal.SIGKILL)


async def test_descriptors_that_were_paired_wrongly_are_told_apart(start_toucher):
    """As they may be where two threads of a process that has both fork at one moment."""
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES, 0, SIZE // 2)
        rest = Span(toucher.address + SIZE // 2, SIZE // 2, REGION, SIZE // 2, STORES | DENIED)
        assert await faults.bring(client, [rest]) is Outcome.SERVED
        pids, (one, other) = await forked(toucher, host, 2)
        for child, half in ((one, other.halves[1]), (other, one.halves[1])):
            half.served = child
        one.halves[1], other.halves[1] = other.halves[1], one.halves[1]
        spaces = [AddressSpace(pid) for pid in pids]
        try:
            claims = await faults.claim(spaces)
            assert set(claims.found.values()) == {one, other}
            for child in (one, other):
                faults.adopt(child, child.pid)
                assert len(child.halves) == 1
            loose = faults.unmet()
            assert len(loose) == 2
            faults.drop(claims.found[spaces[0]])
            for child in (*loose, claims.found[spaces[1]]):
                assert await faults.alive(child), "what was never its own is not closed with it"
        finally:
            for space in spaces:
                space.close()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)


async def test_who_is_forked_while_it_is_being_armed_is_in_doubt(start_toucher):
    """A child inherits for certain only what was in force when its parent's fork was told of."""
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES, 0, SIZE // 2)
        later = Span(toucher.address + SIZE // 2, SIZE // 2, REGION, SIZE // 2, STORES)
        sure = Span(toucher.address, SIZE // 2, REGION, 0, STORES)
        pids, children = await forked(toucher, host, 1)
        assert children[0].catches(sure)
        assert not children[0].catches(later)
        release = threading.Event()
        faults._workers.submit(client.lane, release.wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(faults.bring, client, [later])
            await trio.testing.wait_all_tasks_blocked()
            more, children = await forked(toucher, host, 1)
            release.set()
        pids += more
        try:
            (child,) = children
            assert child.spans == client.spans
            assert child.catches(sure)
            assert client.catches(later)
            assert not child.catches(later)
            assert await faults.bring(child, [later]) is Outcome.SERVED
            assert child.catches(later)
            assert not child.doubt
            more, children = await forked(toucher, host, 1)
            pids += more
            assert children[0].catches(later), "by now it is in force"
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)


async def test_moved_and_unmapped_memory_is_followed(start_toucher):
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        moved = await toucher.do("m")
        address = int(moved.split()[-1])
        assert [(s.address, s.offset) for s in client.spans] == [(address, 0)]
        assert await toucher.do("w 5000") == "wrote 5000"
        assert host.seen == [(5000, True, toucher.pid)]
        assert await toucher.do("u 8192") == "munmap 0"
        assert [(s.offset, s.size) for s in client.spans] == [(0, 8192), (12288, SIZE - 12288)]
        assert host.moves >= 2
        assert await toucher.do("w 12288") == "wrote 12288"


async def test_unmapping_leaves_nobody_waiting(start_toucher):
    toucher, host = start_toucher(), Host(Answer.WAIT)
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        toucher.tell("t 4096")
        await host.until(lambda: client.waiting)
        toucher.process.kill()
        await toucher.status()
        assert not await faults.alive(client)
        assert host.left == [toucher.address + 4096]
        assert host.over == ["ended"]
        assert not client.waiting


async def test_exec_ends_a_client(start_toucher):
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        assert await faults.alive(client)
        toucher.tell("x")
        comm = Path(f"/proc/{toucher.pid}/comm")
        await eventually(lambda: comm.read_text() == "cat\n")
        assert await toucher.do("hello") == "hello"
        assert not await faults.alive(client)
        assert await faults.bring(client, client.spans) is Outcome.GONE


async def test_the_end_of_serving_lets_everybody_go(start_toucher):
    toucher, host = start_toucher(), Host(Answer.WAIT)
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES)
        toucher.tell("w 4096")
        await host.until(lambda: client.waiting)
    assert await toucher.answer() == "wrote 4096"
    assert host.left == [toucher.address + 4096]


async def test_a_range_passes_from_one_descriptor_to_the_other(start_toucher):
    toucher, host = start_toucher(), Host(Answer.DENY)
    async with serving(host) as faults:
        client = await served(faults, toucher, STORES | DENIED)
        assert await toucher.do("k 4096") == "call -1 EFAULT"
        host.answer = Answer.GO
        await faults.bring(client, [Span(toucher.address, SIZE, REGION, 0, STORES)])
        assert await toucher.do("k 4096") == "call 100"
        assert host.seen == [(4096, True, toucher.pid)]
        host.answer = Answer.DENY
        await faults.bring(client, [Span(toucher.address, SIZE, REGION, 0, STORES | DENIED)])
        assert await toucher.do("k 4096") == "call -1 EFAULT"
        assert await toucher.do("l 4096") == "jumped"


async def test_a_mistake_of_the_host_hangs_nobody(start_toucher, caplog):
    class Broken(Host):
        def judge(self, _access):
            raise RuntimeError("a mistake")

    toucher = start_toucher()
    async with serving(Broken()) as faults:
        await served(faults, toucher, STORES)
        assert await toucher.do("w 4096") == "wrote 4096"
    assert "a mistake" in caplog.text


async def test_one_client_that_hangs_does_not_hold_up_another(start_toucher):
    stuck, other, host = start_toucher(), start_toucher(), Host()
    async with serving(host) as faults:
        client = await served(faults, stuck, STORES)
        released = threading.Event()

        def hang():
            assert released.wait(PATIENCE)
            return Outcome.SERVED

        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_lane, faults._workers, client, hang)
            await eventually(lambda: client.lane.busy)
            await served(faults, other, STORES)
            assert await other.do("w 4096") == "wrote 4096"
            stuck.tell("w 4096")
            await host.until(lambda: len(host.seen) == 2)
            released.set()
        assert await stuck.answer() == "wrote 4096"
