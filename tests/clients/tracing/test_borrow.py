"""Real processes in real system calls are borrowed, and must not notice."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import trio

from msharefs.clients.arch import Number
from msharefs.clients.borrow import borrow
from msharefs.clients.gone import Gone
from msharefs.region.errors import ClientStuck, NotAdoptable

GETPID = 39


def getpid(thread):
    return (yield from thread.call(GETPID))


def look(thread):
    """The number of calls a body makes does not matter; the result is what comes back."""
    pid = yield from thread.call(GETPID)
    nowhere = yield from thread.call(Number.CLOSE, -1)
    return pid, nowhere, thread.disturbed


WAITS_FOR_EVER = {
    "read": (0, 1),
    "poll": (7, 1),
    "ppoll": (271, 1),
    "select": (270, 1),
    "futex": (202, 0),
    "accept": (43, 0),
    "waitpid": (61, 0),
    "msgrcv": (70, 1),
    "pause": (34, -1),
    "sigsuspend": (130, -1),
    "epoll_wait": (232, 1),
    "epoll_pwait": (281, 1),
    "epoll_pwait2": (441, 1),
    "semop": (220, 0),
    "sigwaitinfo": (128, 0),
    "io_getevents": (208, 1),
}


@pytest.mark.parametrize("mode", WAITS_FOR_EVER)
def test_a_call_that_waits_goes_on_waiting(mode, start, run):
    number, result = WAITS_FOR_EVER[mode]
    child = start(mode)
    child.blocked_in(number)
    before = child.snapshot()
    for _ in range(20):
        assert run(borrow(child.pid, look)) == (child.pid, -errno.EBADF, False)
        child.check_untouched()
        child.blocked_in(number)
    assert child.snapshot() == before
    child.go()
    said = dict(part.split("=") for part in child.line().split())
    assert int(said["r"]) == result
    # What returns -1 was ended by a signal with a handler, which these calls are there for.
    assert int(said["errno"]) == (errno.EINTR if result < 0 else 0)
    assert child.wait() == "exited 7"
    assert child.silent()


TIMED = {"nanosleep": 230, "poll": 7, "ppoll": 271, "select": 270, "futex": 202}


@pytest.mark.parametrize("mode", TIMED)
def test_a_time_out_is_kept_to_the_millisecond(mode, start, run):
    child = start(mode, 1000)
    begun = time.monotonic()
    times = 0
    while time.monotonic() < begun + 0.7:  # a restart with the full time would make it 1.7 s
        assert run(borrow(child.pid, getpid)) == child.pid
        times += 1
        select.select([], [], [], 0.03)
    said = dict(part.split("=") for part in child.line().split())
    assert times > 10
    assert 1000 <= int(said["ms"]) < 1500
    assert (said["r"], said["errno"]) == (
        ("-1", str(errno.ETIMEDOUT)) if mode == "futex" else ("0", "0")
    )
    assert child.wait() == "exited 7"


NEVER_RESTARTED = {
    "epoll_wait": 232,
    "epoll_pwait": 281,
    "epoll_pwait2": 441,
    "semop": 220,
    "sigwaitinfo": 128,
    "io_getevents": 208,
}


@pytest.mark.parametrize("mode", NEVER_RESTARTED)
def test_what_cannot_be_restarted_exactly_is_reported(mode, start, run):
    child = start(mode, 20_000)
    child.blocked_in(NEVER_RESTARTED[mode])
    assert run(borrow(child.pid, look)) == (child.pid, -errno.EBADF, True)
    assert child.line().startswith(f"r=-1 errno={errno.EINTR}")
    assert child.wait() == "exited 7"


def test_a_thread_in_such_a_call_is_left_alone_if_there_is_another(start, run):
    child = start("threads", 20_000)
    child.blocked_in(232)
    other = next(int(t) for t in os.listdir(f"/proc/{child.pid}/task") if int(t) != child.pid)
    child.blocked_in(0, other)

    def body(thread):
        yield from thread.call(GETPID)
        return thread.tid, thread.disturbed

    for _ in range(20):
        assert run(borrow(child.pid, body)) == (other, False)
        child.blocked_in(0, other)
    child.blocked_in(232)
    child.kill(signal.SIGKILL)
    assert child.wait() == "killed 9"


def test_a_busy_thread_has_all_its_registers(start, run):
    child = start("registers")
    for _ in range(300):
        assert run(borrow(child.pid, getpid)) == child.pid
    child.go()
    assert child.line() == "wrong=0 rounds=1"
    assert child.wait() == "exited 7"


def test_each_queued_signal_is_delivered_once_in_order_on_its_stack(start, run, program):
    """A storm of signals meets a storm of borrowing."""
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
    times = 0
    try:
        while True:
            assert run(borrow(child.pid, look))[:2] == (child.pid, -errno.EBADF)
            times += 1
    except Gone:
        pass  # it had all its signals and ended
    thread.join()
    assert child.line() == f"handled={count} altstack_wrong=0 value_wrong=0"
    assert child.wait() == "exited 7"
    assert times > 10


@pytest.mark.parametrize("between", [False, True], ids=["before the call", "between two calls"])
def test_a_signal_that_comes_while_it_is_held(between, start, run):
    child = start("restarted")
    child.blocked_in(0)

    def body(thread):
        if between:
            yield from thread.call(GETPID)
        child.kill(signal.SIGUSR1)
        child.kill(signal.SIGUSR2)
        return (yield from thread.call(GETPID))

    assert run(borrow(child.pid, body)) == child.pid
    child.blocked_in(0)
    child.check_untouched()
    child.go()
    assert child.line() == f"r=1 handled=2 sender={os.getpid()}"
    assert child.wait() == "exited 7"


@pytest.mark.parametrize("mode", ["pause", "epoll_wait", "sigsuspend"])
@pytest.mark.parametrize("calls", [0, 1])
def test_a_signal_that_comes_while_it_is_held_ends_the_call(mode, calls, start, run):
    """EINTR must still be had by those who were meant to have it."""
    child = start(mode)
    child.blocked_in(WAITS_FOR_EVER[mode][0])

    def body(thread):
        child.kill(signal.SIGUSR1 if mode != "epoll_wait" else signal.SIGTERM)
        for _ in range(calls):
            yield from thread.call(GETPID)

    if mode == "epoll_wait":  # no handler: it ends
        if calls:
            with pytest.raises(Gone):
                run(borrow(child.pid, body))
        else:
            run(borrow(child.pid, body))
        assert child.wait() == "killed 15"
        return
    run(borrow(child.pid, body))
    assert child.line().startswith(f"r=-1 errno={errno.EINTR}")
    assert child.wait() == "exited 7"


def test_a_pending_blocked_signal_stays_pending(start, run):
    child = start("sigwaitinfo")
    child.blocked_in(128)
    child.kill(signal.SIGSTOP)
    assert child.wait() == f"stopped {signal.SIGSTOP.value}"
    child.kill(signal.SIGUSR1)
    for _ in range(5):
        assert run(borrow(child.pid, getpid)) == child.pid
    assert int(child.status("ShdPnd"), 16) == 1 << signal.SIGUSR1 - 1
    child.kill(signal.SIGCONT)
    assert child.line().startswith("r=0 errno=0")
    # Ended as soon as it goes on, it may not be seen to go on.
    assert child.wait() == "exited 7" or child.wait() == "exited 7"


def test_sigtrap_stays_ignored_and_blocked(start, run):
    child = start("sigtrap")
    child.blocked_in(0)
    child.kill(signal.SIGTRAP)
    before = child.snapshot()
    for _ in range(5):
        assert run(borrow(child.pid, look)) == (child.pid, -errno.EBADF, False)
        child.blocked_in(0)
    assert child.snapshot() == before
    child.go()
    assert child.line() == "r=1 ignored=1 blocked=1"
    assert child.wait() == "exited 7"


def test_a_stopped_process_stays_stopped_and_its_parent_hears_nothing(start, run):
    child = start("read")
    child.blocked_in(0)
    child.kill(signal.SIGSTOP)
    assert child.wait() == f"stopped {signal.SIGSTOP.value}"
    for _ in range(20):
        assert run(borrow(child.pid, look)) == (child.pid, -errno.EBADF, False)
        child.until_state("T")
    assert child.silent()
    child.check_untouched()
    child.kill(signal.SIGCONT)
    assert child.wait() == "continued"
    assert run(borrow(child.pid, getpid)) == child.pid
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"
    assert child.silent()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP])
def test_a_process_that_is_stopped_while_it_is_held(number, start, run):
    child = start("read")
    child.blocked_in(0)

    def body(thread):
        yield from thread.call(GETPID)
        child.kill(number)
        return (yield from thread.call(GETPID))

    assert run(borrow(child.pid, body)) == child.pid
    assert child.wait() == f"stopped {number.value}"
    child.until_state("T")
    assert child.silent()
    child.kill(signal.SIGCONT)
    assert child.wait() == "continued"
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


def test_a_process_continued_while_it_is_held(start, run):
    child = start("read")
    child.blocked_in(0)
    child.kill(signal.SIGSTOP)
    assert child.wait() == f"stopped {signal.SIGSTOP.value}"

    def body(thread):
        yield from thread.call(GETPID)
        child.kill(signal.SIGCONT)
        return (yield from thread.call(GETPID))

    assert run(borrow(child.pid, body)) == child.pid
    assert child.wait() == "continued"
    child.blocked_in(0)
    child.check_untouched()
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_killed_at_each_step(calls, start, run):
    child = start("read")
    child.blocked_in(0)

    def body(thread):
        for _ in range(calls):
            yield from thread.call(GETPID)
        child.kill(signal.SIGKILL)
        yield from thread.call(GETPID)

    with pytest.raises(Gone):
        run(borrow(child.pid, body))
    assert child.wait() == "killed 9"
    with pytest.raises(Gone):
        run(borrow(child.pid, getpid))


def test_killed_after_the_last_step(start, run):
    child = start("read")
    child.blocked_in(0)

    def body(thread):
        result = yield from thread.call(GETPID)
        child.kill(signal.SIGKILL)
        return result

    assert run(borrow(child.pid, body)) == child.pid
    assert child.wait() == "killed 9"


def test_killed_at_any_moment(start, run):
    """Nobody knows when: a thread kills while another borrows."""
    for _ in range(20):
        child = start("registers")
        killer = threading.Thread(target=child.kill, args=[signal.SIGKILL])
        with pytest.raises(Gone):
            for number in range(10_000):
                if number == 3:
                    killer.start()
                run(borrow(child.pid, getpid))
        killer.join()
        assert child.wait() == "killed 9"


def test_a_body_that_fails_leaves_all_as_it_was(start, run):
    child = start("read")
    child.blocked_in(0)
    before = child.snapshot()

    def body(thread):
        yield from thread.push(b"abc")
        yield from thread.call(GETPID)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(borrow(child.pid, body))
    child.blocked_in(0)
    child.check_untouched()
    assert child.snapshot() == before
    child.go()
    assert child.line().startswith("r=1")


def test_memory_of_its_own(start, run):
    child = start("read")
    child.blocked_in(0)
    before = child.snapshot()

    def body(thread):
        path = yield from thread.push(b"/dev/null\0" + b"x" * 9000)
        assert thread.read(path, 10) == b"/dev/null\0"
        fd = yield from thread.call(Number.OPENAT, -100, path, os.O_RDWR)
        target = os.readlink(f"/proc/{thread.pid}/fd/{fd}")
        closed = yield from thread.call(Number.CLOSE, fd)
        return fd >= 0, target, closed

    assert run(borrow(child.pid, body)) == (True, "/dev/null", 0)
    child.blocked_in(0)
    assert child.snapshot() == before
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


def test_another_tracer_before(start, run):
    tracer = start("traced", ready="")
    child = int(tracer.line().partition("=")[2])
    with pytest.raises(NotAdoptable, match=f"traced by process {tracer.pid}"):
        run(borrow(child, getpid))
    tracer.go()
    assert tracer.line() == "r=1"
    assert tracer.wait() == "exited 7"


def test_another_tracer_after(start, run):
    child = start("read")
    child.blocked_in(0)
    assert run(borrow(child.pid, getpid)) == child.pid
    other = start("attach", child.pid, ready="")
    assert other.wait() == "exited 7"
    assert run(borrow(child.pid, getpid)) == child.pid
    child.go()
    assert child.line().startswith("r=1")


def test_a_seccomp_filter_is_not_injected_into(start, run):
    child = start("filter")
    child.blocked_in(0)
    with pytest.raises(NotAdoptable, match="seccomp"):
        run(borrow(child.pid, getpid))
    child.check_untouched()
    # One that was known before it had the filter, whose calls the filter does not see:
    assert run(borrow(child.pid, getpid, known=True)) == child.pid
    child.blocked_in(0)
    child.go()
    assert child.line() == "r=1"
    assert child.wait() == "exited 7"


def test_strict_seccomp_does_not_kill_for_our_calls(start, run):
    child = start("strict")
    until_strict = Path(f"/proc/{child.pid}/status")
    child.blocked_in(0)
    assert "\nSeccomp:\t1\n" in until_strict.read_text()
    assert run(borrow(child.pid, getpid)) == child.pid
    child.blocked_in(0)
    child.go()
    assert child.line() == "r=1"
    assert child.wait() == "exited 7"


def test_a_32_bit_process_is_refused(start, run, tmp_path):
    source = "#include <unistd.h>\nint main(void) { return (int)read(0, (char[1]){0}, 1) + 6; }\n"
    binary = tmp_path / "small"
    command = ["cc", "-m32", "-x", "c", "-", "-o", binary]
    done = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
    if done.returncode:
        pytest.skip("the compiler cannot make 32-bit programs (gcc-multilib is missing)")
    process = subprocess.Popen([binary], stdin=subprocess.PIPE, start_new_session=True)
    waits_in = Path(f"/proc/{process.pid}/syscall")
    try:
        while not waits_in.read_text().startswith("3 "):  # read, by its number there
            os.sched_yield()
        with pytest.raises(NotAdoptable, match="32-bit"):
            run(borrow(process.pid, getpid))
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(30) == 7
    finally:
        process.kill()
        process.wait()


def test_a_process_whose_first_thread_has_ended(start, run):
    child = start("leader_gone")
    child.until_state("Z")
    for _ in range(5):
        assert run(borrow(child.pid, getpid)) == child.pid
    child.go()
    assert child.line() == "r=1"
    assert child.wait() == "exited 7"


@pytest.mark.parametrize(
    ("mode", "end"), [("churn", "made=1"), ("forks", "made=1 wrong=0")], ids=["threads", "forks"]
)
def test_threads_and_processes_come_and_go(mode, end, start, run):
    child = start(mode)
    for _ in range(300):
        # In vfork it does not stop until its child has had the processor.
        assert run(borrow(child.pid, getpid, limit=20)) == child.pid
    child.go()
    assert child.line() == end
    assert child.wait() == "exited 7"


def test_exec_meanwhile(start, run):
    child = start("execs", 0)
    worked = gone = 0
    for _ in range(300):
        try:
            assert run(borrow(child.pid, getpid)) == child.pid
            worked += 1
        except Gone:
            gone += 1
    child.go()
    assert child.line() == "execs=1"
    assert child.wait() == "exited 7"
    assert worked


def test_it_is_looked_at_once_it_has_stopped(start, run):
    child = start("read")
    child.blocked_in(0)
    before = child.snapshot()

    def check():
        assert child.status("TracerPid") != "0"
        raise Gone("not the program that it was")

    def body(thread):
        yield from thread.call(GETPID)
        pytest.fail("the wrong program was borrowed from")

    with pytest.raises(Gone, match="not the program"):
        run(borrow(child.pid, body, check=check))
    assert run(borrow(child.pid, getpid, check=lambda: None)) == child.pid
    child.blocked_in(0)
    assert child.snapshot() == before
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


def test_a_parent_in_vfork_is_stuck_then_free(start, run):
    child = start("vfork")
    child.blocked_in(Number.VFORK)
    with pytest.raises(ClientStuck):
        run(borrow(child.pid, getpid, limit=0.1))
    with pytest.raises(ClientStuck):
        run(borrow(child.pid, getpid, limit=0.1))
    child.go()
    assert child.line() == "r=1"
    assert child.wait() == "exited 7"


def test_a_call_that_does_not_return_is_given_up_and_put_back(start, run):
    child = start("read")
    child.blocked_in(0)
    before = child.snapshot()

    def body(thread):
        yield from thread.call(Number.PAUSE)

    with pytest.raises(ClientStuck):
        run(borrow(child.pid, body, limit=0.1))
    assert run(borrow(child.pid, getpid)) == child.pid  # what was left was put back first
    child.blocked_in(0)
    child.check_untouched()
    assert child.snapshot() == before
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


def test_two_at_once_of_one_process_follow_each_other(start, tracer):
    child = start("read")
    child.blocked_in(0)

    async def both():
        return await tracer.run([borrow(child.pid, getpid) for _ in range(10)])

    assert trio.run(both) == [child.pid] * 10
    child.go()
    assert child.line().startswith("r=1")


def test_a_process_in_a_pid_namespace_below_ours(run, program):
    command = ["unshare", "--pid", "--fork", "--kill-child", program, "read"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        pid = int(children.split()[0])
        assert run(borrow(pid, getpid)) == 1  # who it is there
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stdout.readline().startswith(b"r=1 errno=0")
        assert process.wait(30) == 7
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_no_such_process(run):
    with pytest.raises(NotAdoptable):
        run(borrow(0, getpid))
    with pytest.raises(NotAdoptable):
        run(borrow(2, getpid))  # a kernel thread
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(Gone):
        run(borrow(process.pid, getpid))
