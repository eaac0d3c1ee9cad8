"""Clients killed at each step. The server goes on, the others obey, nothing is left of the dead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

import pytest

from msharefs.abi import NotifyMode, OnTimeout
from tests.deaths.conftest import PAGE, PATIENCE, SIGSEGV, SIZE, until
from tests.deaths.test_hindrances import freezer

__all__ = ["freezer"]

KILLED = 100
"""Clients for each kind of storm: enough for several deaths at each step that takes time."""

CAME = 10_000
WARM = 500
GROWTH = 4 << 20
"""Bytes by which the server may have more memory after 10,000 clients than after 500.

It is flat but for steps of about a megabyte (seen once in 12,000 clients; a thread more, with its
arena). A kilobyte kept of each client would be 10 MB.
"""


@pytest.fixture
def storm(programs):
    def run(at, count, *mode):
        command = [programs("storm"), at.path, str(SIZE), str(count), *mode]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
        counts = {name: int(n) for name, n in (line.split() for line in done.stdout.splitlines())}
        assert counts.pop("wrong") == 0, done.stderr
        return counts

    return run


@pytest.fixture
def changer(programs):
    """All but the first and the last page of a place change protection all the time."""

    @contextlib.contextmanager
    def change(at, *mode):
        with subprocess.Popen(
            [programs("changer"), at.path, str(SIZE), *mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout.readline() == "ready\n"
                yield
                process.stdin.close()
                changes, error = map(int, process.stdout.readline().split())
                assert process.wait(PATIENCE) == 0
                assert error == 0, os.strerror(error)
                assert changes > 0
            finally:
                process.kill()

    return change


@pytest.fixture
def calm(place, clients):
    """A place with a client that lives; at the end it obeys, and it alone is left."""
    made = []

    def make(options=""):
        at = place(options)
        one = clients().map(at.path)
        at.obeys(one)
        at.region.notify(0, PAGE)  # what it is served by stays open from then on
        at.region.notify(0, PAGE, 0)
        made.append((at, one, at.served.descriptors()))
        return at, one

    yield make
    for at, one, descriptors in made:
        at.obeys(one)
        control = at.served.path / ".control/r/clients"
        until(lambda c=control, p=one.pid: pids(c) == {p}, "the dead to be forgotten")
        # An events file or a pidfd more would stay; what the loop holds for a moment does not.
        # Who became another program is let go of when it is looked at next: by a change, say.
        at.served.until(
            lambda a=at, o=one, d=descriptors: (a.obeys(o), a.served.descriptors() <= d)[1],
            f"no more than {descriptors} descriptors",
        )


def pids(control):
    return {int(line.split()[0]) for line in control.read_text().splitlines()}


@pytest.mark.parametrize("mode", ["kill", "fork", "exec"])
@pytest.mark.parametrize("changing", ["calm", "changing", "watched"])
def test_killed_at_a_random_moment(calm, storm, changer, mode, changing):
    """At the gate before, in and after mmap(), while adopted, borrowed, forking, in exec or a fault."""
    at, _ = calm("protect=fault" if changing == "watched" else "protect=vma")
    if changing == "calm":
        counts = storm(at, KILLED, mode, "1")
    else:
        with changer(at, *["watch"] * (changing == "watched")):
            counts = storm(at, KILLED, mode, "2")
        at.region.protect(PAGE, SIZE - 2 * PAGE, "rw-")
    last = {"kill": "touching", "fork": "forking", "exec": "executing"}[mode]
    assert sum(counts.values()) == KILLED
    assert min(counts["opening"], counts["mapping"], counts[last]) > 0, counts


def test_killed_in_a_held_fault(calm, clients):
    at, _ = calm()
    at.region.notify(3 * PAGE, PAGE, mode=NotifyMode.HOLD, on_timeout=OnTimeout.DENY)
    for _ in range(10):
        one = clients().map(at.path)
        one.tell(f"store {3 * PAGE} 1")
        hold = at.event("hold")
        assert hold["pid"] == one.pid
        one.kill()
        assert one.gone() == -signal.SIGKILL
        release = at.event("release")
        assert (release["hold"], release["reason"]) == (hold["seq"], "gone")
    assert os.pread(at.region.fd, 1, 3 * PAGE) == b"\0", "no store happened"
    at.region.notify(3 * PAGE, PAGE, 0)


def test_killed_inside_its_own_change_that_waits_for_another(calm, clients, freezer):
    at, one = calm()
    slow, caller = clients().map(at.path), clients()
    freezer(slow.pid, True)
    caller.open(at.path)
    caller.tell(f"protect {caller.fd} {PAGE} {PAGE} 1")
    until(lambda: one.store(PAGE) == f"{SIGSEGV} {PAGE}", "the change to be on its way")
    caller.kill()
    assert caller.gone() == -signal.SIGKILL
    until(lambda: at.region.query(PAGE).prot.text() == "r--", "the change to be finished")
    assert one.store(PAGE) == f"{SIGSEGV} {PAGE}"
    freezer(slow.pid, False)
    at.region.protect(PAGE, PAGE, "rw-")
    at.obeys(slow)
    slow.end()


def test_the_first_thread_gone_before_and_after(calm, clients):
    at, _ = calm()
    one = clients().map(at.path)
    assert one.do("leader") == "ok"
    at.obeys(one)
    other = clients()
    assert other.do("leader") == "ok"
    at.obeys(other.map(at.path))
    one.kill()
    assert one.gone() == -signal.SIGKILL
    other.end()


def test_killed_while_it_is_watched_and_the_rest_go_on(calm, clients):
    """Killed with many threads and served by faults; another one is served all the same."""
    at, one = calm()
    for mode in (NotifyMode.LOG, NotifyMode.SIGNAL):
        signo = signal.SIGURG if mode is NotifyMode.SIGNAL else 0
        many = clients().map(at.path)
        assert many.do("threads 20") == "ok"
        at.region.notify(3 * PAGE, PAGE, mode=mode, signo=signo)
        many.kill()
        assert many.gone() == -signal.SIGKILL
        at.events()
        assert one.store(3 * PAGE + 1) == "ok"
        assert at.event("fault")["pid"] == one.pid
    at.region.notify(3 * PAGE, PAGE, 0)


@pytest.mark.parametrize("watched", [False, True])
def test_ten_thousand_come_and_go_and_leave_nothing(place, storm, watched):
    """As many with watched ranges would take a minute; a descriptor each would show all the same."""
    at = place("events=256")  # so that what is remembered of them is full from the beginning
    if watched:
        at.region.notify(0, PAGE)
    came = CAME // 5 if watched else CAME
    assert storm(at, WARM, "come")["touching"] == WARM
    at.served.until(lambda: not at.standing_clients(), "all to be forgotten")
    descriptors, memory = at.served.descriptors(), at.served.memory()
    assert storm(at, came, "come")["touching"] == came
    at.served.until(lambda: not at.standing_clients(), "all to be forgotten")
    at.served.until_descriptors(descriptors)
    assert at.served.memory() - memory < GROWTH
