"""Signals that a program ignores do not end its calls, though who is traced has them delivered."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.enforcement.clients import PAGE, Client, tracers, until

TRIES = 20
"""Times that a program is started anew because it was let go of before the signal came."""
NONBLOCK = os.O_NONBLOCK
CALLS = 400
IGNORED = [signal.SIGURG, signal.SIGWINCH, signal.SIGCONT, signal.SIGCHLD, signal.SIGUSR2]
"""By default; but for the last, which is set to SIG_IGN."""


class Ignoring:
    """A program of ignoring.c."""

    def __init__(self, share, region, mode, what, number):
        self.events = share.served.path / ".control" / Path(region.path).name / "events"
        argument = self.events if what is None else what
        process = subprocess.Popen(
            [str(share.built("ignoring") / "a.out"), region.path, mode, str(argument), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.client = Client(mode, process.stdout.fileno(), process.stdin.fileno(), process.pid)
        self.client.process = process
        share.clients.append(self.client)
        assert self.client.answer() == "ready"
        self.pid = process.pid

    def reader(self):
        """The thread that waits in read(2) of the events, once it does."""

        def find():
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                with contextlib.suppress(OSError, ValueError):
                    number, fd = (task / "syscall").read_text().split()[:2]
                    link = os.readlink(f"/proc/{self.pid}/fd/{int(fd, 16)}")
                    flags = Path(f"/proc/{self.pid}/fdinfo/{int(fd, 16)}").read_text().split()[3]
                    if (number, link) == ("0", str(self.events)) and not int(flags, 8) & NONBLOCK:
                        return int(task.name)
            return 0

        return until(find, "it to read")

    def end(self):
        """How many calls succeeded, and how many failed with EINTR."""
        said = dict(part.split("=") for part in self.client.answer().split())
        return int(said["done"]), int(said["interrupted"])


def field(tid, name):
    text = Path(f"/proc/{tid}/status").read_text()
    return text.partition(f"\n{name}:\t")[2].partition("\n")[0]


def pending(tid, number):
    return any(int(field(tid, name), 16) >> number - 1 & 1 for name in ("SigPnd", "ShdPnd"))


def followed_reader(share, region, mode, number, gate):
    """A program that waits in a read, and had the signal while it was traced, if the gate does."""
    for _ in range(TRIES):
        one = Ignoring(share, region, mode, None, number)
        tid = one.reader()
        before = tracers(one.pid)
        os.kill(one.pid, number)
        if gate != "ptrace" or (before and tracers(one.pid)):
            return one, tid
        one.client.process.kill()
        one.client.process.wait()
    raise AssertionError("it was let go of each time")


@pytest.mark.parametrize("number", IGNORED)
def test_a_read_of_who_is_followed_goes_on(share_with, gate, number):
    share = share_with("vma")
    region = share.region()
    one, tid = followed_reader(share, region, "read", number, gate)
    until(lambda: not pending(tid, number), "the signal to be delivered")
    one.reader()
    region.protect(0, PAGE, "r--")
    assert one.end() == (1, 0)


def test_a_signal_that_it_handles_ends_it_at_once(share_with, gate):
    share = share_with("vma")
    one, _ = followed_reader(share, share.region(), "handled", signal.SIGURG, gate)
    assert one.end() == (0, 1)


@pytest.mark.parametrize("then", ["event", "signal"])
def test_one_that_another_thread_blocks_ends_nothing_and_hides_nothing(share_with, then):
    """The kernel tells of the first signal only; what comes after an ignored one is seen too."""
    share = share_with("vma")
    region = share.region()
    one = Ignoring(share, region, "another", None, signal.SIGURG)
    assert one.client.answer() == "blocked"
    tid = one.reader()
    assert tid != one.pid
    os.kill(one.pid, signal.SIGURG)
    until(lambda: field(tid, "State").startswith("D"), "the kernel to have told of it")
    os.listdir(share.served.path)  # which is answered after that
    if then == "event":
        region.protect(0, PAGE, "r--")
        assert one.end() == (1, 0)
    else:
        os.kill(one.pid, signal.SIGUSR1)
        assert one.end() == (0, 1)


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGWINCH, signal.SIGUSR2])
def test_changes_of_who_is_followed_while_signals_come(share_with, number):
    share = share_with("vma")
    region = share.region()
    for _ in range(4):
        share.mapped(region)
    one = Ignoring(share, region, "ioctls", CALLS, number)
    assert one.end() == (CALLS, 0)
