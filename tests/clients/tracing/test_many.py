"""Many real processes at once, by the compiled module: none must notice, whatever it is like."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import struct
import threading
import time
from pathlib import Path

import pytest

from msharefs.abi import Prot
from msharefs.clients import native
from msharefs.clients.borrow import vdso_instruction
from msharefs.clients.gone import Gone
from msharefs.clients.many import protect_many
from msharefs.clients.replica import Protect
from msharefs.clients.space import AddressSpace
from msharefs.region.errors import ClientStuck, NotAdoptable
from tests.clients.tracing.conftest import descriptors, until
from tests.clients.tracing.test_borrow import NEVER_RESTARTED, TIMED, WAITS_FOR_EVER

PAUSE, GETPID, CLOSE, MPROTECT, POLL = 34, 39, 3, 10, 7
NO_DEVICE = (1 << 64) - 1
DONE = 0
PAGE = 4096
JOB = "=iiQIIIiiIIIqq"
CALL = "=8QIIIBBBB"
NOTHING_MORE = (0,) * 11


def need_native():
    if not native.present:
        pytest.skip(f"the compiled module is missing ({native.why})")


def threads():
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def many(start):
    """Have processes make calls: ``(status, disturbed)`` of each. Leaves no thread behind."""
    need_native()
    if os.geteuid() != 0:
        pytest.skip("tracing other users' processes needs root")
    open_before, threads_before = descriptors(), threads()

    def many(pids, *calls, limit=5.0, in_threads=2, maps=-1, told=-1):
        calls = calls or [(GETPID, 0, 0, 0)]
        packed = bytearray(b"".join(struct.pack(CALL, *call, *NOTHING_MORE) for call in calls))
        jobs = bytearray()
        for pid in pids:
            where = vdso_instruction(pid), 0, len(calls), 0, maps, -1, 0
            jobs += struct.pack(JOB, pid, 0, *where, 0, 0, 0, 0)
        native.borrow_many(jobs, packed, b"", in_threads, int(limit * 1e9), NO_DEVICE, told)
        return [
            (status, disturbed)
            for _, status, _, _, _, disturbed, *_ in struct.iter_unpack(JOB, jobs)
        ]

    yield many
    until(lambda: threads() <= threads_before, "for its threads to end")
    assert descriptors() == open_before


CLOSE_NOTHING = (CLOSE, NO_DEVICE, 0, 0)


@pytest.mark.parametrize("mode", WAITS_FOR_EVER)
def test_a_call_that_waits_goes_on_waiting(mode, start, many):
    number, result = WAITS_FOR_EVER[mode]
    child = start(mode)
    child.blocked_in(number)
    if len(os.listdir(f"/proc/{child.pid}/task")) > 1:
        pytest.fail("this mode is to be one thread")
    before = child.snapshot()
    for _ in range(20):
        assert many([child.pid]) == [(DONE, 0)]
        child.check_untouched()
        child.blocked_in(number)
    assert child.snapshot() == before
    child.go()
    said = dict(part.split("=") for part in child.line().split())
    assert int(said["r"]) == result
    assert int(said["errno"]) == (errno.EINTR if result < 0 else 0)
    assert child.wait() == "exited 7"
    assert child.silent()


@pytest.mark.parametrize("mode", TIMED)
def test_a_time_out_is_kept_to_the_millisecond(mode, start, many):
    child = start(mode, 1000)
    begun = time.monotonic()
    times = 0
    while time.monotonic() < begun + 0.7:  # a restart with the full time would make it 1.7 s
        assert many([child.pid]) == [(DONE, 0)]
        times += 1
        select.select([], [], [], 0.03)
    said = dict(part.split("=") for part in child.line().split())
    assert times > 5
    assert 1000 <= int(said["ms"]) < 1500
    assert child.wait() == "exited 7"


@pytest.mark.parametrize("mode", NEVER_RESTARTED)
def test_what_cannot_be_restarted_exactly_is_reported(mode, start, many):
    child = start(mode, 20_000)
    child.blocked_in(NEVER_RESTARTED[mode])
    assert many([child.pid]) == [(DONE, 1)]
    assert child.line().startswith(f"r=-1 errno={errno.EINTR}")
    assert child.wait() == "exited 7"


def test_a_busy_thread_has_all_its_registers(start, many):
    child = start("registers")
    for _ in range(300):
        assert many([child.pid]) == [(DONE, 0)]
    child.go()
    assert child.line() == "wrong=0 rounds=1"
    assert child.wait() == "exited 7"


def test_each_queued_signal_is_delivered_once_in_order_on_its_stack(start, many):
    count = 20_000
    child = start("signals", count)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

    def storm():
        for value in range(count):
            while libc.sigqueue(child.pid, signal.SIGRTMIN + 1, value):
                os.sched_yield()

    thread = threading.Thread(target=storm)
    thread.start()
    met = set()
    while native.GONE not in met:
        ((status, _),) = many([child.pid], in_threads=1)
        met.add(status)
    thread.join()
    assert met <= {DONE, native.SLOW, native.GONE}
    assert child.line() == f"handled={count} altstack_wrong=0 value_wrong=0"
    assert child.wait() == "exited 7"


def test_sigtrap_stays_ignored_and_blocked(start, many):
    child = start("sigtrap")
    child.blocked_in(0)
    child.kill(signal.SIGTRAP)
    before = child.snapshot()
    for _ in range(5):
        assert many([child.pid]) == [(DONE, 0)]
        child.blocked_in(0)
    assert child.snapshot() == before
    child.go()
    assert child.line() == "r=1 ignored=1 blocked=1"
    assert child.wait() == "exited 7"


def test_a_pending_blocked_signal_stays_pending(start, many):
    child = start("sigtrap")
    child.blocked_in(0)
    child.kill(signal.SIGTRAP)
    pending = child.status("ShdPnd")
    assert many([child.pid]) == [(DONE, 0)]
    assert child.status("ShdPnd") == pending


def test_a_stopped_process_is_left_alone_and_its_parent_hears_nothing(start, many):
    child = start("read")
    child.blocked_in(0)
    child.kill(signal.SIGSTOP)
    assert child.wait() == f"stopped {signal.SIGSTOP.value}"
    for _ in range(20):
        assert many([child.pid]) == [(native.SLOW, 0)]
        child.until_state("T")
    assert child.silent()
    child.check_untouched()
    child.kill(signal.SIGCONT)
    assert child.wait() == "continued"
    assert many([child.pid]) == [(DONE, 0)]
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"
    assert child.silent()


@pytest.mark.parametrize("mode", ["filter", "threads"])
def test_who_is_unusual_is_left_to_the_careful_way(mode, start, many):
    child = start(mode, *([20_000] if mode == "threads" else []))
    if mode == "filter":
        child.blocked_in(0)
    assert many([child.pid]) == [(native.SLOW, 0)]
    child.check_untouched()


def test_another_tracer(start, many):
    tracer = start("traced", ready="")
    child = int(tracer.line().partition("=")[2])
    assert many([child]) == [(native.SLOW, 0)]
    tracer.go()
    assert tracer.line() == "r=1"
    assert tracer.wait() == "exited 7"


def test_a_call_that_fails_is_the_last(start, many):
    child = start("read")
    child.blocked_in(0)
    spoil = (MPROTECT, 0x1000, PAGE, 0)
    assert many([child.pid], (GETPID, 0, 0, 0), CLOSE_NOTHING, spoil) == [(errno.EBADF, 0)]
    assert many([child.pid], spoil) == [(errno.ENOMEM, 0)]
    child.blocked_in(0)
    child.check_untouched()


def test_killed_at_any_moment(start, many):
    for _ in range(20):
        child = start("registers")
        killer = threading.Thread(target=child.kill, args=[signal.SIGKILL])
        status, number = DONE, 0
        while status != native.GONE:
            if number == 3:
                killer.start()
            ((status, _),) = many([child.pid], in_threads=1)
            assert status in {DONE, native.GONE, native.SLOW}
            assert number < 10_000
            number += 1
        killer.join()
        assert child.wait() == "killed 9"


def test_one_that_does_not_stop_keeps_nobody(start, many):
    stuck, fine = start("vfork"), [start("read") for _ in range(3)]
    until(lambda: len(Path(f"/proc/{stuck.pid}/syscall").read_text().split()) > 1, "to wait")
    for child in fine:
        child.blocked_in(0)
    begun = time.monotonic()
    found = many([stuck.pid, *(child.pid for child in fine)], limit=0.3)
    assert found == [(native.STUCK, 0)] + [(DONE, 0)] * 3
    assert time.monotonic() < begun + 5
    # The thread that traced it ends after it has reported, and the kernel lets go then.
    until(lambda: stuck.status("TracerPid") == "0", "to be let go")
    stuck.check_untouched()


def test_one_stuck_in_our_call_gets_its_registers_back_late(start, many):
    """pause(2) stands for a call that waits for a lock; what it is given then is its own."""
    child, fine = start("restarted"), start("read")
    child.blocked_in(0)
    before = threads()
    assert many([child.pid, fine.pid], (PAUSE, 0, 0, 0), limit=0.2) == [(native.STUCK, 0)] * 2
    assert threads() > before
    child.blocked_in(PAUSE)
    for one in (child, fine):
        assert many([one.pid]) == [(native.SLOW, 0)]  # traced by the one left behind
    child.kill(signal.SIGUSR1)
    fine.kill(signal.SIGCONT)
    until(lambda: threads() == before, "for those left behind to end")
    child.blocked_in(0)
    child.check_untouched()
    child.go()
    assert child.line() == f"r=1 handled=1 sender={os.getpid()}"
    assert child.wait() == "exited 7"


def test_an_exec_is_noticed(start, many):
    child = start("read")
    child.blocked_in(0)
    mine = os.open("/proc/self/maps", os.O_RDONLY)
    ended = os.fork()
    if not ended:
        signal.pause()
    theirs = os.open(f"/proc/{ended}/maps", os.O_RDONLY)
    os.kill(ended, signal.SIGKILL)
    os.waitpid(ended, 0)
    try:
        assert many([child.pid], maps=mine) == [(DONE, 0)]
        assert many([child.pid], maps=theirs) == [(native.GONE, 0)]
    finally:
        os.close(mine)
        os.close(theirs)
    child.blocked_in(0)
    child.check_untouched()


@pytest.mark.parametrize("in_threads", [1, 2, 3])
def test_more_than_fit_in_hand(in_threads, start, many):
    children = [start("read") for _ in range(60)]
    for child in children:
        child.blocked_in(0)
    for _ in range(10):
        assert many([c.pid for c in children], in_threads=in_threads) == [(DONE, 0)] * 60
    for child in children:
        child.check_untouched()
        child.go()
        assert child.line().startswith("r=1")
        assert child.wait() == "exited 7"


class BpfMap:
    """Threads by id, as the lsm gate's program has them: bpf(2)."""

    CALL, CREATE, LOOK_UP, NEXT = 321, 0, 1, 4

    def __init__(self):
        self.fd = self._bpf(self.CREATE, struct.pack("=IIII", 1, 4, 4, 64))

    def _bpf(self, command, attributes):
        attributes = ctypes.create_string_buffer(attributes, 128)
        result = LIBC.syscall(ctypes.c_long(self.CALL), command, attributes, 128)
        return -ctypes.get_errno() if result < 0 else result

    def _of(self, command, key):
        key, value = ctypes.c_uint32(key), ctypes.c_uint32()
        places = ctypes.addressof(key), ctypes.addressof(value), 0
        return self._bpf(command, struct.pack("=IxxxxQQQ", self.fd, *places))

    def has(self, tid):
        return self._of(self.LOOK_UP, tid) == 0

    def empty(self):
        return self._of(self.NEXT, 0) == -errno.ENOENT


LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def threads_told():
    made = BpfMap()
    if made.fd < 0:
        pytest.skip(f"no BPF maps: {os.strerror(-made.fd)}")
    yield made
    os.close(made.fd)


def test_a_gate_is_told_of_threads_while_they_are_in_hand(start, many, threads_told):
    children = [start("read") for _ in range(5)]
    results = []
    borrower = threading.Thread(
        target=lambda: results.extend(
            many([c.pid for c in children], (POLL, 0, 0, 1000), told=threads_told.fd)
        )
    )
    borrower.start()
    seen = set()

    def all_seen():
        seen.update(c.pid for c in children if threads_told.has(c.pid))
        return len(seen) == len(children)

    until(all_seen, "for all of them to be told of")
    borrower.join()
    assert results == [(DONE, 0)] * 5
    assert threads_told.empty()


def test_who_is_killed_in_hand_is_told_of_no_longer(start, many, threads_told):
    child = start("read")
    results = []
    borrower = threading.Thread(
        target=lambda: results.extend(many([child.pid], (POLL, 0, 0, 60_000), told=threads_told.fd))
    )
    borrower.start()
    until(lambda: threads_told.has(child.pid), "for it to be told of")
    os.kill(child.pid, signal.SIGKILL)
    borrower.join()
    assert [status for status, _ in results] == [native.GONE]
    assert threads_told.empty()


def test_a_thread_that_a_gate_cannot_be_told_of_is_left_alone(start, many):
    with open(os.devnull, "rb") as no_map:
        assert many([start("read").pid], told=no_map.fileno()) == [(native.SLOW, 0)]


def test_what_makes_no_sense_is_refused():
    need_native()
    with pytest.raises(ValueError):
        native.borrow_many(bytearray(31), bytearray(), b"", 1, 1, 0, -1)
    with pytest.raises(ValueError):
        native.borrow_many(
            bytearray(struct.pack(JOB, 1, 0, 0, 0, 1, 0, -1, -1, 0, 0, 0, 0, 0)),
            b"",
            b"",
            1,
            1,
            0,
            -1,
        )
    with pytest.raises(ValueError):
        native.borrow_many(bytearray(), bytearray(), b"", 0, 1, 0, -1)


# -- with what it leaves to the careful way


def first_mapping(pid):
    line = Path(f"/proc/{pid}/maps").read_text().splitlines()[0]
    return int(line.partition("-")[0], 16), line.split()[1]


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch):
    if request.param == "native":
        need_native()
    else:
        monkeypatch.setattr(native, "present", False)


async def test_everybody_obeys_and_who_cannot_is_named(way, start, tracer):
    usual, threaded = start("read"), start("threads", 20_000)
    filtered, ended, stopped = start("filter"), start("read"), start("read")
    ended.kill(signal.SIGKILL)
    assert ended.wait() == "killed 9"
    stopped.kill(signal.SIGSTOP)
    assert stopped.wait() == f"stopped {signal.SIGSTOP.value}"
    children = [usual, threaded, filtered, ended, stopped]
    pids = [child.pid for child in children]
    at, prot = first_mapping(usual.pid)
    assert prot == "r--p"
    places = [at, *(first_mapping(c.pid)[0] for c in (threaded, filtered)), at, 0]
    places[4] = first_mapping(stopped.pid)[0]
    steps = [[Protect(place, PAGE, Prot.READ | Prot.EXEC)] for place in places]
    found = await protect_many(
        tracer, [*pids, 0, usual.pid], [*steps, [], [Protect(0, PAGE, Prot.NONE)]], 5.0
    )
    assert [type(one) for one in found] == [
        type(None),
        type(None),
        NotAdoptable,
        Gone,
        type(None),
        NotAdoptable,
        OSError,
    ]
    assert found[6].errno == errno.ENOMEM
    for child in (usual, threaded, stopped):
        assert first_mapping(child.pid)[1] == "r-xp"
        child.check_untouched()
    assert first_mapping(filtered.pid)[1] == "r--p"


async def test_another_program_is_gone(way, start, tracer, puppets):
    child, other = start("read"), puppets()
    spaces = [AddressSpace(child.pid), AddressSpace(other.pid)]
    try:
        other.turn_into_puppet()
        at, _ = first_mapping(child.pid)
        step = [Protect(at, PAGE, Prot.READ | Prot.EXEC)]
        found = await protect_many(tracer, [child.pid, other.pid], [step, step], 5.0, spaces=spaces)
        assert found[0] is None
        assert isinstance(found[1], Gone)
        assert other.run("1") == 1
    finally:
        for one in spaces:
            one.close()


async def test_who_hangs_is_stuck(way, start, tracer):
    stuck, fine = start("vfork"), start("read")
    until(lambda: len(Path(f"/proc/{stuck.pid}/syscall").read_text().split()) > 1, "to wait")
    step = [Protect(first_mapping(fine.pid)[0], PAGE, Prot.READ | Prot.EXEC)]
    found = await protect_many(tracer, [stuck.pid, fine.pid], [step, step], 0.3)
    assert isinstance(found[0], ClientStuck)
    assert found[1] is None
