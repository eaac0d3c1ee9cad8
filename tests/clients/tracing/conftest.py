"""Processes to be borrowed from, each with a parent that reports what wait(2) says, and a tracer.

The parent is a process of its own: if it were this one, the kernel would show it the stops that
are meant for its tracer.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from msharefs.clients import tracer as tracing
from msharefs.clients.tracer import Tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 30
RESTART_SYSCALL = "219"
RESTARTED_BY_NUMBER = {7, 35, 202, 230}  # poll, nanosleep, futex: restart_syscall(2)
HERE = Path(__file__).parent


def until(what: Callable[[], object], doing: str) -> None:
    """Wait for something of which nobody tells; yields the processor between looks."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, f"waited in vain: {doing}"
        os.sched_yield()


@attrs.define(eq=False)
class Child:
    """A process, its parent, and the pipes to both."""

    process: subprocess.Popen[bytes]
    report: int
    pid: int
    ended: bool = False

    def _line(self, fd: int) -> str:
        text = b""
        while not text.endswith(b"\n"):
            readable, _, _ = select.select([fd], [], [], PATIENCE)
            assert readable, f"no line came; so far {text!r}; {self.status('State')}"
            byte = os.read(fd, 1)
            assert byte, f"ended after {text!r}"
            text += byte
        return text.decode().rstrip("\n")

    def line(self) -> str:
        """What the program says next."""
        return self._line(self.process.stdout.fileno())

    def wait(self) -> str:
        """What the parent hears next."""
        line = self._line(self.report)
        self.ended = line.startswith(("exited", "killed"))
        return line

    def silent(self) -> bool:
        """Whether the parent has heard nothing more (the end of what it says is nothing)."""
        return not select.select([self.report], [], [], 0)[0] or not os.read(self.report, 1)

    def go(self) -> None:
        """Give the program the line that it waits for."""
        os.write(self.process.stdin.fileno(), b"\n")

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def status(self, field: str) -> str:
        try:
            text = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return "gone"
        return text.partition(f"\n{field}:\t")[2].partition("\n")[0]

    def blocked_in(self, number: int, tid: int | None = None) -> None:
        """Wait until its thread waits in this system call, taken up again by the kernel or not."""
        file = Path(f"/proc/{self.pid}/task/{tid or self.pid}/syscall")
        numbers = {str(number), RESTART_SYSCALL} if number in RESTARTED_BY_NUMBER else {str(number)}
        until(lambda: file.read_text().split()[0] in numbers, f"to be in call {number}")

    def until_state(self, letter: str) -> None:
        """Wait until its first thread is in a state of proc(5): it may be on its way there."""
        until(lambda: self.status("State").startswith(letter), f"to be in state {letter}")

    def check_untouched(self) -> None:
        """Nobody traces it any more, none of its threads is stopped for that."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                text = (task / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            assert "\nTracerPid:\t0\n" in text
            assert "\nState:\tt" not in text

    def snapshot(self) -> tuple[object, ...]:
        """What must not change: descriptors, threads, mappings, signals, the call it waits in."""
        place = Path(f"/proc/{self.pid}")
        fields = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Threads", "State")
        return (
            sorted(path.name for path in (place / "fd").iterdir()),
            (place / "maps").read_text(),
            (place / "syscall").read_text().split()[1:],
            [self.status(field) for field in fields],
        )

    def end(self) -> None:
        for pid in (self.pid, self.process.pid):
            if not self.ended or pid != self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        self.process.stdin.close()
        self.process.stdout.close()
        os.close(self.report)


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    """The program with the many modes; see blocked.c."""
    binary = tmp_path_factory.mktemp("clients") / "blocked"
    command = ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([*command, "-o", binary, HERE / "blocked.c"], check=True)
    return binary


@pytest.fixture
def start(program) -> Iterator[Callable[..., Child]]:
    """Start the program in a mode. It must end by itself, or the test says otherwise."""
    children: list[Child] = []

    def start(*mode: object, binary: Path = program, ready: str = "ready") -> Child:
        report, write_end = os.pipe()
        process = subprocess.Popen(
            [program, "parent", *map(str, mode)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[write_end],
            env={**os.environ, "REPORT_FD": str(write_end)},
            process_group=0,  # in an orphaned one, as a runner's may be, SIGTSTP stops nobody
        )
        os.close(write_end)
        child = Child(process, report, 0)
        children.append(child)
        child.pid = int(child.wait())
        if ready:
            assert child.line() == ready
        return child

    yield start
    for child in children:
        child.end()


def descriptors() -> list[str]:
    """What this process has open, but for the pipes to the programs and trio's loop."""
    gc.collect()
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if not name.startswith(("pipe:", "socket:", "anon_inode")))


@pytest.fixture
def tracer(start) -> Iterator[Tracer]:
    """A tracer; at the end it must be idle, gone, and have left nothing open."""
    if os.geteuid() != 0:
        pytest.skip("tracing other users' processes needs root")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    before = descriptors()
    tracing.prepare_process()
    tracer = Tracer("tracer of a test")
    try:
        yield tracer
        assert not tracer._active
        assert not tracer._waiting
        assert not tracer._jobs
    finally:
        tracer.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert not [thread for thread in threading.enumerate() if "tracer" in thread.name]
    assert descriptors() == before


@pytest.fixture
def run(tracer):
    """Run one session from a test that is not asynchronous: its result, or its exception raised."""

    def run(session):
        done = threading.Event()
        outcome = []

        def finished(value):
            outcome.append(value)
            done.set()

        tracer.submit(session, finished)
        assert done.wait(PATIENCE), "the session did not end"
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    return run
