"""What is caught, set in many real processes at once; one that hangs keeps nobody."""

from __future__ import annotations

import errno
import os
import signal
import threading

import pytest
import trio

from msharefs.clients import native
from msharefs.clients.errands import Errands, Kind
from msharefs.clients.faults import Answer, Span
from msharefs.clients.lanes import Lane, Workers
from msharefs.clients.userfault import Mode, Outcome
from msharefs.region.demand import Caught
from tests.clients.test_faults import DENIED, PAGE, REGION, SIZE, STORES, Host, eventually, serving

PATIENCE = 30


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(native, "present", False)
    elif not native.present:
        pytest.skip(f"the compiled module is missing ({native.why})")


def spans(toucher, caught=STORES, start=0, size=SIZE):
    return [Span(toucher.address + start, size, REGION, start, caught)]


async def all_served(faults, touchers):
    clients = []
    for toucher in touchers:
        clients.append(faults.add(toucher, toucher.userfaults(), toucher.pid))
        assert await toucher.do("c") == "close 0"
    return clients


async def test_all_are_caught_and_let_go_again(way, start_toucher):
    touchers, host = [start_toucher() for _ in range(8)], Host()
    async with serving(host) as faults:
        clients = await all_served(faults, touchers)
        for _ in range(3):
            work = [(c, spans(t)) for c, t in zip(clients, touchers, strict=True)]
            assert await faults.bring_many(work) == [Outcome.SERVED] * 8
            host.seen.clear()
            for toucher in touchers:
                assert await toucher.do("w 4096") == "wrote 4096"
                assert await toucher.do("r 0") == "read 0"
            assert sorted(pid for _, _, pid in host.seen) == sorted(t.pid for t in touchers)
        work = [
            (c, spans(t, Caught.NOTHING, 0, 4 * PAGE))
            for c, t in zip(clients, touchers, strict=True)
        ]
        assert await faults.bring_many(work) == [Outcome.SERVED] * 8
        host.seen.clear()
        for toucher in touchers:
            assert await toucher.do("w 8192") == "wrote 8192"
            assert await toucher.do("w 65536") == "wrote 65536"
        assert {offset for offset, _, _ in host.seen} == {65536}
        await eventually(lambda: not any(c.lane.busy for c in clients))


async def test_from_one_descriptor_to_the_other(way, start_toucher):
    toucher, host = start_toucher(), Host(Answer.DENY)
    async with serving(host) as faults:
        clients = await all_served(faults, [toucher])
        for caught in (STORES, STORES | DENIED, STORES, STORES | DENIED):
            work = [(clients[0], spans(toucher, caught))]
            assert await faults.bring_many(work) == [Outcome.SERVED]
        assert await toucher.do("w 12345") == "signal 11 code 0 at 12345"


async def test_each_has_its_own_outcome(way, start_toucher):
    touchers, host = [start_toucher() for _ in range(4)], Host()
    async with serving(host) as faults:
        clients = await all_served(faults, touchers)
        ended, dropped = touchers[1], clients[2]
        ended.process.kill()
        ended.process.wait()
        faults.drop(dropped)
        work = [(c, spans(t)) for c, t in zip(clients, touchers, strict=True)]
        work[3] = (clients[3], [Span(0x10000, PAGE, REGION, 0, STORES)])
        assert await faults.bring_many(work) == [
            Outcome.SERVED,
            Outcome.GONE,
            Outcome.GONE,
            Outcome.REFUSED,
        ]
        assert host.over == ["ended"]


async def test_the_same_client_twice_is_done_in_order(way, start_toucher):
    toucher, host = start_toucher(), Host()
    async with serving(host) as faults:
        (client,) = await all_served(faults, [toucher])
        work = [(client, spans(toucher)), (client, spans(toucher, Caught.NOTHING))]
        assert await faults.bring_many(work) == [Outcome.SERVED] * 2
        assert await toucher.do("w 4096") == "wrote 4096"
        assert host.seen == []


async def test_nobody_at_all(way):
    async with serving(Host()) as faults:
        assert await faults.bring_many([]) == []


async def test_one_that_hangs_keeps_nobody_and_its_lane_waits_for_it(start_mount):
    """A file of a server that is stopped stands for a memory map that is held: the call waits."""
    if not native.present:
        pytest.skip(f"the compiled module is missing ({native.why})")
    mount, workers = start_mount("gate=none"), Workers()
    lanes = [Lane() for _ in range(6)]
    hanging = os.open(mount.path / "region", os.O_RDWR | os.O_CREAT)
    other = os.open("/dev/null", os.O_RDWR)
    heard: list[str] = []
    ran = threading.Event()
    try:
        os.kill(mount.process.pid, signal.SIGSTOP)
        assert all(workers.reserve(lane) for lane in lanes)
        assert not workers.reserve(lanes[0])
        calls = [[(hanging, Kind.REGISTER, 0, PAGE, int(Mode.WP))] for _ in range(3)]
        calls += [[], [(other, Kind.PROTECT, 0, PAGE, 0)], [(other, Kind.UNREGISTER, 0, PAGE, 0)]]
        errands = Errands(workers, lanes, calls)
        with trio.fail_after(PATIENCE):
            await errands.run(0.5)
        assert [errands.status(i)[0] for i in range(6)] == [
            *[native.PENDING] * 3,
            0,
            errno.ENOTTY,
            errno.ENOTTY,
        ]
        assert errands.status(4)[1] is Kind.PROTECT
        await eventually(lambda: [lane.busy for lane in lanes] == [True] * 3 + [False] * 3)
        workers.submit(lanes[0], lambda: (heard.append("late"), ran.set()))
        assert heard == []
        os.kill(mount.process.pid, signal.SIGCONT)
        assert await trio.to_thread.run_sync(ran.wait, PATIENCE)
        await eventually(lambda: not any(lane.busy for lane in lanes))
        assert all(errands.status(i)[0] > 0 for i in range(3))
    finally:
        os.kill(mount.process.pid, signal.SIGCONT)
        workers.close()
        os.close(hanging)
        os.close(other)


async def test_lanes_that_are_released_after_the_end_still_do_what_they_have():
    workers, lane, ran = Workers(), Lane(), threading.Event()
    assert workers.reserve(lane)
    workers.submit(lane, ran.set)
    workers.close()
    assert not ran.is_set()
    workers.release(lane)
    assert await trio.to_thread.run_sync(ran.wait, PATIENCE)
    await eventually(lambda: not [t for t in threading.enumerate() if t.name == "lane"])
