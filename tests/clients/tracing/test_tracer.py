"""The thread itself: many sessions at a time, failures, deadlines, its end, and its process's."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import trio

from msharefs.clients import arch
from msharefs.clients.arch import Number, Registers
from msharefs.clients.borrow import borrow
from msharefs.clients.gone import Gone
from msharefs.clients.ptrace import Tracee, stop_of
from msharefs.clients.tracer import Closed, TimedOut, Tracer, pause, prepare_process
from msharefs.region.errors import ClientStuck

GETPID = 39


def getpid(thread):
    return (yield from thread.call(GETPID))


def test_many_at_once_in_order_with_their_exceptions(start, tracer):
    children = [start("read") for _ in range(20)]
    children[7].kill(signal.SIGKILL)
    assert children[7].wait() == "killed 9"

    def body(thread):
        if thread.pid == children[3].pid:
            raise ValueError("not this one")
        return (yield from thread.call(GETPID))

    async def main():
        return await tracer.run([borrow(child.pid, body) for child in children])

    results = trio.run(main)
    for index, (child, result) in enumerate(zip(children, results, strict=True)):
        if index == 7:
            assert isinstance(result, Gone)
            continue
        if index == 3:
            assert isinstance(result, ValueError)
        else:
            assert result == child.pid
        child.check_untouched()
        child.go()
        assert child.line().startswith("r=1")
        assert child.wait() == "exited 7"


def test_nothing_to_do(tracer):
    assert trio.run(tracer.run, []) == []


def test_one_that_is_slow_holds_up_nobody(start, tracer):
    slow, fast = start("vfork"), start("read")
    slow.blocked_in(Number.VFORK)
    late = threading.Event()
    outcome = []

    def done(result):
        outcome.append(result)
        late.set()

    tracer.submit(borrow(slow.pid, getpid, limit=20), done)

    async def main():
        for _ in range(50):
            assert await tracer.run([borrow(fast.pid, getpid)]) == [fast.pid]

    trio.run(main)
    assert not late.is_set()
    slow.go()
    assert late.wait(20)
    # It could be stopped once its child had ended, or it had ended itself by then.
    assert outcome[0] == slow.pid or isinstance(outcome[0], Gone)
    assert slow.line() == "r=1"
    assert slow.wait() == "exited 7"
    fast.go()
    assert fast.wait() == "exited 7"


def test_an_outcome_that_cannot_be_delivered_is_logged(start, tracer, run, caplog):
    child = start("read")

    def done(_result):
        raise RuntimeError("a bug of the caller")

    with caplog.at_level(logging.ERROR):
        tracer.submit(borrow(child.pid, getpid), done)
        assert run(borrow(child.pid, getpid)) == child.pid
    assert "a bug of the caller" in caplog.text
    child.go()
    assert child.wait() == "exited 7"


def test_a_pause_lets_others_go_on(run):
    begun = time.monotonic()

    def session():
        yield from pause(0.05)
        return time.monotonic() - begun

    assert run(session()) >= 0.05


def test_a_session_may_go_on_after_its_deadline(start, run):
    child = start("read")
    child.blocked_in(0)

    def session():
        tracee = Tracee.seize(child.pid, time.monotonic() + 5)
        stop = yield tracee
        assert stop.interrupt
        tracee.go_on()
        times = 0
        for _ in range(3):
            tracee.deadline = time.monotonic() + 0.02
            try:
                yield tracee
            except TimedOut:
                times += 1
        tracee.interrupt()
        tracee.deadline = time.monotonic() + 5
        yield tracee
        tracee.detach()
        return times

    assert run(session()) == 3
    child.go()
    assert child.line().startswith("r=1")


def test_what_a_session_leaves_seized_is_let_go(start, run):
    child = start("read")
    child.blocked_in(0)

    def stopped():
        yield Tracee.seize(child.pid, time.monotonic() + 5)

    def running():
        tracee = Tracee.seize(child.pid, time.monotonic() + 5)
        yield tracee
        tracee.go_on()
        raise ValueError("gave up")

    def at_once():
        Tracee.seize(child.pid, time.monotonic() + 5)
        raise ValueError("gave up")
        yield

    run(stopped())
    for session in (running, at_once):
        with pytest.raises(ValueError, match="gave up"):
            run(session())
        assert run(borrow(child.pid, getpid)) == child.pid
    child.blocked_in(0)
    child.check_untouched()
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


def test_close_brings_all_to_an_end(start):
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    child, held = start("read"), start("vfork")
    child.blocked_in(0)
    held.blocked_in(Number.VFORK)
    outcomes = []
    try:
        prepare_process()
        tracer = Tracer()

        def hold():
            tracee = Tracee.seize(child.pid, time.monotonic() + 60)
            yield tracee
            tracee.to_system_call()
            try:
                while True:
                    yield tracee
                    tracee.to_system_call()
            except TimedOut:
                tracee.interrupt()
                tracee.deadline = time.monotonic() + 1
                yield tracee
                return "hurried"

        tracer.submit(hold(), outcomes.append)
        tracer.submit(borrow(held.pid, getpid, limit=60), outcomes.append)
        begun = time.monotonic()
        tracer.close()
        assert time.monotonic() - begun < 10
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert "hurried" in outcomes
    assert any(isinstance(outcome, ClientStuck | Closed) for outcome in outcomes)
    with pytest.raises(Closed):
        tracer.submit(borrow(child.pid, getpid), outcomes.append)
    tracer.close()
    for one in (child, held):
        one.check_untouched()
        one.go()
        assert one.line().startswith("r=1")
        assert one.wait() == "exited 7"


def test_without_sigchld_it_is_only_slower(start):
    """A thread that does not block SIGCHLD may swallow it."""
    child = start("read")
    child.blocked_in(0)
    with Tracer() as tracer:

        async def main():
            return [await tracer.run([borrow(child.pid, getpid, limit=20)]) for _ in range(3)]

        assert trio.run(main) == [[child.pid]] * 3
    child.go()
    assert child.line().startswith("r=1")


HOLDER = """
import sys, threading, time
from msharefs.clients import tracer
from msharefs.clients.borrow import borrow
from msharefs.clients.follow import Followed
tracer.prepare_process()
pid, step = int(sys.argv[1]), sys.argv[2]
def say():
    print("held", flush=True)
    threading.Event().wait()
def body(thread):
    if step == "borrowed after a call":
        yield from thread.call(39)
    elif step == "in a call of ours":
        threading.Thread(target=say).start()
        yield from thread.call(7, 0, 0, 1000)  # poll(2) of nothing
    elif step == "borrowed twice":
        yield from thread.call(39)
        yield from thread.call(39)
    say()
    yield
def follow():
    held = Followed.seize(pid, time.monotonic() + 60)
    yield from held.arrive()
    if step != "arrived":
        yield from held.entry()
        if step == "running":
            threading.Thread(target=say).start()
            yield from held.exit()
            return
    say()
ours = step.startswith(("borrowed", "in a call"))
session = borrow(pid, body, limit=60) if ours else follow()
tracer.Tracer().submit(session, print)
threading.Event().wait()
"""


STEPS = ["borrowed", "borrowed after a call", "borrowed twice", "arrived", "entry", "running"]


@pytest.mark.parametrize(
    ("mode", "step"),
    [
        *(("read", step) for step in STEPS),
        *(("epoll_wait", step) for step in ("borrowed", "borrowed after a call", "entry")),
        *(("nanosleep", step) for step in ("borrowed after a call", "running")),
    ],
)
def test_when_its_process_is_killed_the_kernel_lets_go(mode, step, start):
    child = start(mode, *(["2000"] if mode == "nanosleep" else []))
    child.blocked_in({"read": 0, "nanosleep": 230, "epoll_wait": 232}[mode])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(child.pid), step], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        assert child.status("TracerPid") not in {"", "0"}
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    if mode == "epoll_wait" and step == "entry":
        # The kernel wakes it, and finds it in a call that it never restarts.
        assert child.line().startswith(f"r=-1 errno={errno.EINTR}")
        assert child.wait() == "exited 7"
        return
    child.check_untouched()
    if mode != "nanosleep":
        child.go()
    said = dict(part.split("=") for part in child.line().split())
    assert (said["r"], said["errno"]) == ("0" if mode == "nanosleep" else "1", "0")
    if mode == "nanosleep":
        assert int(said["ms"]) >= 2000
    assert child.wait() == "exited 7"


def test_killed_within_a_call_of_ours_the_program_has_our_result(start):
    """The one harm that is left; what :mod:`msharefs.clients.borrow` says of it."""
    child = start("read")
    child.blocked_in(0)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(child.pid), "in a call of ours"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        child.blocked_in(7)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert child.line().startswith("r=0 errno=0")
    assert child.wait() == "exited 7"


def test_thousands_leave_nothing_behind(start, tracer):
    """What is held for a client is given up with it."""
    child = start("registers")

    async def main():
        for _ in range(1000):
            assert await tracer.run([borrow(child.pid, getpid)]) == [child.pid]
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(1000):
            assert await tracer.run([borrow(child.pid, getpid)]) == [child.pid]
        return files == len(os.listdir("/proc/self/fd"))

    assert trio.run(main)
    child.go()
    assert child.line() == "wrong=0 rounds=1"
    assert child.wait() == "exited 7"


def test_a_stop_says_why():
    assert stop_of(0) is None
    assert stop_of(9) is None
    assert stop_of(0x057F).signal == signal.SIGTRAP
    assert stop_of(0x857F).syscall
    assert stop_of(0x857F).signal == 0
    assert stop_of(0x80057F).interrupt
    assert not stop_of(0x80057F).group
    assert stop_of(0x80137F).group
    assert stop_of(0x04057F).exec
    assert stop_of(0x0A7F) is stop_of(0x0A7F)


def test_what_an_interrupted_call_needs():
    registers = Registers()
    registers.orig_rax = Number.EPOLL_WAIT
    registers.set_result(-4)
    registers.r10 = 0xFFFF_FFFF
    assert arch.settle(registers, lambda *_: b"") is arch.Effect.RESTARTED
    assert registers.result == -514
    registers.set_result(-4)
    registers.r10 = 5
    assert arch.settle(registers, lambda *_: b"") is arch.Effect.DISTURBED
    assert registers.result == -4
    registers.orig_rax = (1 << 64) - 1
    assert arch.settle(registers, lambda *_: b"") is arch.Effect.NONE
    registers.orig_rax, registers.rdx = Number.WRITE, 100
    registers.set_result(40)
    assert arch.settle(registers, lambda *_: b"") is arch.Effect.DISTURBED
    registers.set_result(100)
    assert arch.settle(registers, lambda *_: b"") is arch.Effect.NONE
    for restart in (-512, -513, -514, -516):
        registers.set_result(restart)
        assert arch.settle(registers, lambda *_: b"") is arch.Effect.RESTARTED
        assert registers.result == restart


def test_io_uring_waits_for_ever_only_without_a_time_out():
    memory = {0x1000: bytes(24), 0x2000: bytes(16) + b"\x01" + bytes(7)}

    def read(address, size):
        return memory.get(address, b"")[:size]

    def for_ever(*arguments):
        return arch.waits_for_ever(Number.IO_URING_ENTER, arguments, read)

    assert for_ever(3, 0, 1, 1, 0, 0)
    assert not for_ever(3, 1, 1, 1, 0, 0)
    assert for_ever(3, 0, 1, 9, 0x1000, 24)
    assert not for_ever(3, 0, 1, 9, 0x2000, 24)
    assert not for_ever(3, 0, 1, 9, 0x3000, 24)


def test_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert not arch.supported()
    with pytest.raises(OSError, match="x86-64 only, not riscv64"):
        arch.require()
