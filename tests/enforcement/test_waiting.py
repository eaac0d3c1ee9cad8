"""Programs that wait in a system call while the table changes under them go on waiting."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.enforcement.clients import PAGE, PATIENCE, Client, until, windows

FOR_EVER = {
    "read": (0, 1),
    "poll": (7, 1),
    "ppoll": (271, 1),
    "select": (270, 1),
    "epoll_wait": (232, 1),
    "epoll_pwait": (281, 1),
    "futex": (202, 0),
    "accept": (43, 0),
    "semop": (220, 0),
    "msgrcv": (70, 1),
    "sigwaitinfo": (128, 0),
    "waitpid": (61, 0),
    "io_getevents": (208, 1),
}
"""The number of the call, and what it returns when what it waits for has come."""
FOR_A_TIME = {
    "nanosleep": (230, 0),
    "poll": (7, 0),
    "ppoll": (271, 0),
    "select": (270, 0),
    "futex": (202, -1),
}
NEVER_RESTARTED = {"epoll_wait": 232, "epoll_pwait": 281, "semop": 220, "sigwaitinfo": 128}
"""With a time-out: for signal(7) says that the kernel does not restart them, after a stop either."""
MILLISECONDS = 1500


class Waiting:
    """A program of blocked.c that maps a region, then waits."""

    def __init__(self, share, program, region, mode, milliseconds=0):
        self.mode = mode
        arguments = [str(program), mode, *([str(milliseconds)] if milliseconds else [])]
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "MAP_FIRST": region.path},
        )
        self.client = Client(mode, process.stdout.fileno(), process.stdin.fileno(), process.pid)
        self.client.process, self.client.path = process, Path(region.path)
        share.clients.append(self.client)

    def waits_in(self, number):
        """Until it does. A call that the kernel has taken up again may be restart_syscall."""
        assert self.client.answer() == "ready"
        place = Path(f"/proc/{self.client.pid}/syscall")
        until(lambda: place.read_text().split()[0] in {str(number), "219"}, self.mode)

    def end(self):
        """What it says of its call: the result, the errno, how many milliseconds it took."""
        said = dict(part.split("=") for part in self.client.answer().split())
        return int(said["r"]), int(said["errno"]), int(said["ms"])


@pytest.fixture(scope="session")
def program(built):
    return built("blocked") / "a.out"


def change(region, times):
    for _ in range(times):
        for prot in ("r--", "rw-"):
            region.protect(0, PAGE, prot)


def test_who_waits_for_something_goes_on_waiting(share, program):
    region = share.region()
    waiting = [Waiting(share, program, region, mode) for mode in FOR_EVER]
    for one in waiting:
        one.waits_in(FOR_EVER[one.mode][0])
    change(region, 3)
    region.unmap(PAGE, PAGE)
    region.protect(2 * PAGE, PAGE, "---")
    for one in waiting:
        assert windows(one.client.pid, region.path)[-1].range == (3, 1, "rw-"), one.mode
        os.write(one.client.writable, b"\n")
    for one in waiting:
        result, code, _ = one.end()
        assert (one.mode, result, code) == (one.mode, FOR_EVER[one.mode][1], 0)


def test_who_waits_for_a_time_waits_that_long(share, program):
    region = share.region()
    waiting = [Waiting(share, program, region, mode, MILLISECONDS) for mode in FOR_A_TIME]
    for one in waiting:
        one.waits_in(FOR_A_TIME[one.mode][0])
    begun = time.monotonic()
    while time.monotonic() < begun + MILLISECONDS / 2000:
        change(region, 1)
    for one in waiting:
        result, code, took = one.end()
        late = errno.ETIMEDOUT if one.mode == "futex" else 0
        assert (one.mode, result, code) == (one.mode, FOR_A_TIME[one.mode][1], late)
        assert took >= MILLISECONDS


def test_what_is_never_restarted_and_has_a_time_out_fails_with_eintr(share, program):
    """The exception. A program that uses these has to reckon with EINTR anyhow: SIGSTOP does it."""
    region = share.region()
    waiting = [Waiting(share, program, region, mode, PATIENCE * 1000) for mode in NEVER_RESTARTED]
    for one in waiting:
        one.waits_in(NEVER_RESTARTED[one.mode])
    region.protect(0, PAGE, "---")
    for one in waiting:
        result, code, took = one.end()
        assert (one.mode, result, code) == (one.mode, -1, errno.EINTR)
        assert took < PATIENCE * 1000


def test_another_thread_is_taken_where_there_is_one(share, program):
    """The first thread waits in epoll_wait with a time-out, a second one in read."""
    region = share.region()
    one = Waiting(share, program, region, "threads", 2000)
    assert one.client.answer() == "ready"
    calls = Path(f"/proc/{one.client.pid}/task")
    waits = {"232", "0"}
    until(
        lambda: {(t / "syscall").read_text().split()[0] for t in calls.iterdir()} == waits,
        "both to wait",
    )
    change(region, 3)
    os.write(one.client.writable, b"\n")
    assert one.client.answer() == "r=0 errno=0 read=1"
