"""Real mounts for the tests, each served by a process of its own and checked when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from msharefs.service.mounts import MountError, unmount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 60
GATE = os.environ.get("MSHAREFS_TEST_GATE", "")


@attrs.define(eq=False)
class Served:
    """A mount and its server."""

    path: Path
    process: subprocess.Popen[bytes]
    log: Path
    expect_exit: int = 0

    def descriptors(self) -> int:
        """How many descriptors the server holds."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def until(self, reached: Callable[[], bool], what: str) -> None:
        """Wait for what a request of ours is not answered by; each look is a request itself.

        FORGET, for one, comes when the kernel lets go of an inode, and later requests after it.
        """
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
            os.listdir(self.path)

    def until_descriptors(self, number: int) -> None:
        """Until the server holds ``number`` descriptors or fewer."""
        self.until(lambda: self.descriptors() <= number, f"no more than {number} descriptors")

    def memory(self) -> int:
        """Bytes of memory that the server has to itself (RssAnon of proc_pid_status(5))."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def stats(self, region: str) -> dict[str, int]:
        text = (self.path / ".control" / region / "stats").read_text()
        return {key: int(value) for key, value in map(str.split, text.splitlines())}

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        assert self.process.wait(PATIENCE) == self.expect_exit, self.log.read_text()


def is_mounted(path: Path) -> bool:
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ")[4] == str(path) for line in table)


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[Callable[..., Served]]:
    """Start servers with ``-o`` options; each must end well and leave nothing.

    With MSHAREFS_TEST_GATE in the environment every mount that does not say otherwise has that
    ``gate=``: the same tests, another gate.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if not Path("/dev/fuse").exists():
        pytest.skip("/dev/fuse is missing")
    started: list[Served] = []

    def start(options: str = "", place: Path | None = None) -> Served:
        if GATE and "gate=" not in options:
            options += f"{',' if options else ''}gate={GATE}"
        place = place or directory / f"mnt{len(started)}"
        place.mkdir()
        log = directory / f"log{len(started)}"
        readable, writable = os.pipe()
        command = [sys.executable, "-m", "msharefs.cli.server", f"--ready-fd={writable}"]
        command += ["-o", f"log={log}" + (f",{options}" if options else "")]
        log.touch()
        with log.open("ab") as output, os.fdopen(readable, "rb") as ready:
            process = subprocess.Popen(
                [*command, "test", str(place)], pass_fds=[writable], stderr=output, stdout=output
            )
            os.close(writable)
            served = Served(place, process, log)
            started.append(served)
            assert ready.read() == b"ready\n", log.read_text()
        return served

    try:
        yield start
        for served in started:
            served.stop()
            assert not is_mounted(served.path)
            assert "Traceback" not in served.log.read_text(), served.log.read_text()
    finally:
        for served in started:
            if served.process.poll() is None:
                served.process.kill()
                served.process.wait()
            if is_mounted(served.path):
                try:
                    unmount(served.path, detach=True)
                except MountError as error:
                    sys.stderr.write(f"{error}\n")


@pytest.fixture
def start_mount(tmp_path) -> Iterator[Callable[..., Served]]:
    """The same, below the test's own directory."""
    with serving(tmp_path) as start:
        yield start


@pytest.fixture
def mount(start_mount) -> Served:
    """One mount with the default options."""
    return start_mount()
