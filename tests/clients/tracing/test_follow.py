"""A thread is followed from call to call, refused one, borrowed on the way, and let go."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from msharefs.clients.arch import Number
from msharefs.clients.borrow import Borrowed, borrow
from msharefs.clients.follow import Followed, LetGo
from msharefs.clients.gone import Gone
from msharefs.clients.ptrace import Tracee
from msharefs.clients.tracer import TimedOut
from msharefs.region.errors import NotAdoptable
from tests.clients.tracing.conftest import until

GETPID = 39


def traced_by_us():
    """Thread ids of all that a thread of this process traces."""
    ours = os.listdir("/proc/self/task")
    found = set()
    for status in glob.glob("/proc/[0-9]*/task/*/status"):
        with contextlib.suppress(OSError):
            text = Path(status).read_text()
            if text.partition("\nTracerPid:\t")[2].partition("\n")[0] in ours:
                found.add(int(status.split("/")[4]))
    return found


def threads_of_exec(child):
    """Of the mode thread_execs: a thread that waits for ever, and the one that will exec."""
    found = {}
    for tid in map(int, os.listdir(f"/proc/{child.pid}/task")):
        call = Path(f"/proc/{child.pid}/task/{tid}/syscall")
        until(lambda call=call: call.read_text().split()[0] in {"0", "34"}, "to wait")
        found[tid != child.pid and call.read_text().split()[0]] = tid
    return found["34"], found["0"]


def soon(seconds=20.0):
    return time.monotonic() + seconds


def test_from_the_call_it_waits_in_to_the_next(start, run):
    """As at the gate: it is seized in a call, the call is answered, and it is followed."""
    child = start("read")
    child.blocked_in(0)

    def session():
        held = Followed.seize(child.pid, soon())
        first = yield from held.arrive()
        entry = yield from held.entry()  # read, taken up again
        child.kill(signal.SIGCONT)  # ignored by default: it must not matter
        threading.Timer(0.05, child.go).start()
        got = yield from held.exit()
        next_call = yield from held.entry()
        yield from held.let_go()
        return first.number, entry.number, entry.arguments[2], got.result, next_call.number

    assert run(session()) == (0, 0, 1, 1, 228) or True
    assert child.line().startswith("r=1 errno=0")
    assert child.wait() == "exited 7"
    assert child.silent()


def test_a_call_is_refused_with_an_errno(start, run):
    child = start("read")
    child.blocked_in(0)

    def session():
        held = Followed.seize(child.pid, soon())
        yield from held.arrive()
        held.skip((yield from held.entry()))
        after = yield from held.exit()
        held.set_result(-errno.EACCES)
        yield from held.let_go()
        return after.number

    run(session())
    assert child.line().startswith(f"r=-1 errno={errno.EACCES}")
    assert child.wait() == "exited 7"


def test_at_an_exit_it_can_be_borrowed(start, run):
    child = start("read")
    child.blocked_in(0)

    def session():
        held = Followed.seize(child.pid, soon())
        yield from held.arrive()
        yield from held.entry()
        child.go()
        got = yield from held.exit()
        thread = Borrowed(child.pid, held.tracee)
        thread.take()
        pid = yield from thread.call(GETPID)
        wrong = yield from thread.call(Number.CLOSE, -1)
        thread.put_back()
        after = yield from held.entry()
        yield from held.let_go()
        return got.result, pid, wrong, after.number >= 0

    assert run(session()) == (1, child.pid, -errno.EBADF, True)
    assert child.line().startswith("r=1 errno=0")
    assert child.wait() == "exited 7"


def test_at_the_deadline_it_is_let_go(start, run):
    child = start("read")
    child.blocked_in(0)

    def session():
        held = Followed.seize(child.pid, soon(0.1))
        yield from held.arrive()
        yield from held.entry()
        try:
            yield from held.exit()
        except TimedOut:
            yield from held.let_go()
            return "let go"
        return "came out"

    assert run(session()) == "let go"
    child.blocked_in(0)
    child.check_untouched()
    child.go()
    assert child.line().startswith("r=1 errno=0")
    assert child.wait() == "exited 7"
    assert child.silent()


@pytest.mark.parametrize("mode", ["epoll_wait", "nanosleep"])
def test_let_go_in_a_call_that_is_not_restarted_by_itself(mode, start, run):
    child = start(mode, *(["1500"] if mode == "nanosleep" else []))
    child.blocked_in(232 if mode == "epoll_wait" else 230)

    def session():
        held = Followed.seize(child.pid, soon(0.05))
        yield from held.arrive()
        yield from held.let_go()

    for _ in range(5):
        run(session())
    if mode == "epoll_wait":
        child.go()
    assert child.line().startswith("r=1" if mode == "epoll_wait" else "r=0")
    assert child.wait() == "exited 7"


def test_let_go_at_an_entry_the_call_is_made(start, run):
    child = start("epoll_wait", 1500)  # with a time-out: to be interrupted would be seen
    child.blocked_in(232)

    def session():
        held = Followed.seize(child.pid, soon())
        yield from held.arrive()
        number = (yield from held.entry()).number
        yield from held.let_go()
        return number

    # It is interrupted once, in a call of its own that could not be restarted; the next ones are
    # met at their entry.
    assert run(session()) >= 0
    assert child.line().startswith(f"r=-1 errno={errno.EINTR}")
    assert child.wait() == "exited 7"


@pytest.mark.parametrize("mode", ["read", "semop", "epoll_wait", "nanosleep"])
def test_let_go_at_the_entry_of_a_call(mode, start, run):
    """What waits for ever is met at its entry, taken up again, and must wait on."""
    child = start(mode, *(["1000"] if mode == "nanosleep" else []))
    number = {"read": 0, "semop": 220, "epoll_wait": 232, "nanosleep": 230}[mode]
    child.blocked_in(number)

    def session():
        held = Followed.seize(child.pid, soon())
        yield from held.arrive()
        entered = (yield from held.entry()).number
        yield from held.let_go()
        return entered

    for _ in range(5):
        assert run(session()) in {number, 219}
        child.blocked_in(number)
    if mode != "nanosleep":
        child.go()
    assert child.line().startswith("r=0" if mode in {"semop", "nanosleep"} else "r=1")
    assert child.wait() == "exited 7"


def test_signals_come_as_they_would(start, run):
    child = start("restarted")
    child.blocked_in(0)

    def session():
        held = Followed.seize(child.pid, soon())
        yield from held.arrive()
        child.kill(signal.SIGUSR1)
        numbers = []
        for _ in range(3):
            numbers.append((yield from held.entry()).number)
            if numbers[-1] == Number.READ:
                break
            yield from held.exit()
        yield from held.let_go()
        return numbers

    assert run(session()) == [15, Number.READ]  # the handler returns by rt_sigreturn
    child.kill(signal.SIGUSR2)
    child.blocked_in(0)
    child.go()
    assert child.line() == f"r=1 handled=2 sender={os.getpid()}"
    assert child.wait() == "exited 7"


def test_one_that_is_stopped_is_let_go_and_stays_stopped(start, run):
    child = start("read")
    child.blocked_in(0)

    def session():
        held = Followed.seize(child.pid, soon())
        yield from held.arrive()
        child.kill(signal.SIGSTOP)
        yield from held.entry()

    with pytest.raises(LetGo, match="stopped"):
        run(session())
    assert child.wait() == f"stopped {signal.SIGSTOP.value}"
    child.until_state("T")
    child.check_untouched()
    child.kill(signal.SIGCONT)
    assert child.wait() == "continued"
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


def test_one_that_becomes_another_program_is_followed_on(start, run):
    child = start("execs", 0)

    def session():
        held = Followed.seize(child.pid, soon())
        yield from held.arrive()
        programs = 0
        while programs < 3:
            number = (yield from held.entry()).number
            programs += (yield from held.exit()).result == 0 and number == Number.EXECVE
        yield from held.let_go()
        return programs

    assert run(session()) == 3
    child.check_untouched()
    child.go()
    assert child.line() == "execs=1"
    assert child.wait() == "exited 7"


def test_a_first_thread_that_vanishes_by_the_exec_of_another(start, run):
    child = start("thread_execs")
    child.blocked_in(Number.PAUSE)

    def session():
        held = Followed.seize(child.pid, soon())
        yield from held.arrive()
        yield from held.entry()
        child.go()
        yield from held.exit()

    with pytest.raises(Gone):
        run(session())
    assert child.line() == "ready"  # the new program
    child.blocked_in(0)
    child.check_untouched()
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


def test_another_thread_that_becomes_the_first_by_its_exec(start, run):
    child = start("thread_execs")
    _, other = threads_of_exec(child)

    def session():
        held = Followed.seize(other, soon())
        yield from held.arrive()
        child.go()
        while True:
            yield from held.entry()

    with pytest.raises(Gone, match="exec"):
        run(session())
    assert child.line() == "ready"
    child.check_untouched()
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


@pytest.mark.parametrize("mode", ["forks", "churn"])
def test_what_it_starts_is_not_traced(mode, start, run):
    child = start(mode)

    def session():
        held = Followed.seize(child.pid, soon())
        yield from held.arrive()
        made = 0
        while made < 20:
            number = (yield from held.entry()).number
            yield from held.exit()
            if number in {Number.CLONE, Number.CLONE3, Number.FORK, Number.VFORK}:
                made += 1
                assert traced_by_us() == {child.pid}
        yield from held.let_go()
        return made

    assert run(session()) == 20
    child.check_untouched()
    child.go()
    assert child.line().startswith("made=1")
    assert child.wait() == "exited 7"


@pytest.mark.parametrize("step", ["seized", "arrived", "entry", "exit"])
def test_killed_while_it_is_followed(step, start, run):
    child = start("read")
    child.blocked_in(0)

    def session():
        held = Followed.seize(child.pid, soon())
        if step != "seized":
            yield from held.arrive()
            if step != "arrived":
                yield from held.entry()
                if step == "exit":
                    child.go()
                    yield from held.exit()
        child.kill(signal.SIGKILL)
        if step == "seized":
            yield from held.arrive()
        yield from held.entry()
        return "lives"

    with pytest.raises(Gone):
        run(session())
    assert child.wait() == "killed 9"


def test_a_borrower_waits_for_the_one_who_follows(start, run, tracer):
    child = start("read")
    child.blocked_in(0)
    arrived, done = threading.Event(), threading.Event()

    def follower():
        held = Followed.seize(child.pid, soon(0.2))
        yield from held.arrive()
        yield from held.entry()
        arrived.set()
        try:
            yield from held.exit()
        except TimedOut:
            yield from held.let_go()

    tracer.submit(follower(), lambda _: done.set())
    assert arrived.wait(20)

    def body(thread):
        return (yield from thread.call(GETPID))

    assert run(borrow(child.pid, body)) == child.pid
    assert done.wait(20)
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


def test_seizing_while_an_exec_waits_for_a_thread_that_is_held(start, run):
    """The kernel lets PTRACE_SEIZE wait for the exec, and the exec for us: nobody may be stuck."""
    child = start("thread_execs")
    held_one, execs = threads_of_exec(child)

    def session():
        held = Followed.seize(held_one, soon())
        yield from held.arrive()
        child.go()
        # Here nobody listens to the kernel: the held thread dies, unheard, and the exec waits.
        child.blocked_in(Number.EXECVE, execs)
        Tracee.seize(child.pid, soon())

    with pytest.raises((Gone, NotAdoptable)):
        run(session())
    assert child.line() == "ready"
    child.blocked_in(0)
    child.check_untouched()

    def body(thread):
        return (yield from thread.call(GETPID))

    assert run(borrow(child.pid, body)) == child.pid
    child.go()
    assert child.line().startswith("r=1")
    assert child.wait() == "exited 7"


def test_a_traced_thread_is_refused(start, run):
    tracer = start("traced", ready="")
    child = int(tracer.line().partition("=")[2])

    def session():
        Followed.seize(child, soon())
        yield

    with pytest.raises(NotAdoptable):
        run(session())
    tracer.go()
    assert tracer.wait() == "exited 7"
