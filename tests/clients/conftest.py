"""Programs that touch, map and fork as they are told; all of them are gone after each test."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from pathlib import Path

import attrs
import pytest
import trio

from msharefs.clients import procmap
from msharefs.clients.identity import duplicate_descriptor
from msharefs.clients.userfault import Userfault
from tests.clients.puppet import Puppet

HERE = Path(__file__).parent
PATIENCE = 30
SIZE = 1 << 20


@attrs.define(eq=False)
class Toucher:
    """A process with 1 MiB of shared memory; see toucher.c for its commands."""

    process: subprocess.Popen[bytes]
    pid: int
    address: int
    whole: int
    limited: int
    file: int

    def userfaults(self) -> list[Userfault]:
        """As ``make`` would have made them: for user mode only, and for all."""
        made = []
        for number, limited in ((self.limited, True), (self.whole, False)):
            if number >= 0:
                fd = duplicate_descriptor(self.pid, number)
                made.append(Userfault.negotiate(fd, user_mode_only=limited))
        return made

    def tell(self, command: str) -> None:
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        return self.process.stdout.readline().decode().strip()

    async def answer(self) -> str:
        with trio.fail_after(PATIENCE):
            return await trio.to_thread.run_sync(self.hear, abandon_on_cancel=True)

    async def do(self, command: str) -> str:
        self.tell(command)
        return await self.answer()

    async def status(self) -> int:
        with trio.fail_after(PATIENCE):
            return await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)

    def memory(self) -> bytes:
        """What is in the shared memory, past all protections."""
        with open(f"/proc/{self.pid}/fd/{self.file}", "rb") as file:
            return file.read()


@pytest.fixture(scope="session")
def toucher_program(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("toucher") / "toucher"
    source = HERE / "toucher.c"
    subprocess.run(["gcc", "-O1", "-pthread", "-o", program, source], check=True)
    return program


@pytest.fixture
def start_toucher(toucher_program):
    """Start such a program, on memory of its own or on the file given; all end with the test."""
    if os.geteuid() != 0:
        pytest.skip("working another process's userfaultfd needs root (CAP_SYS_PTRACE)")
    started = []

    def start(file: str = "-") -> Toucher:
        process = subprocess.Popen(
            [toucher_program, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        numbers = list(map(int, process.stdout.readline().split()))
        toucher = Toucher(process, *numbers)
        if toucher.limited < 0:
            pytest.skip(f"userfaultfd(2): {os.strerror(errno.ENOSYS)} here")
        return toucher

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def puppets():
    """Start processes with these descriptors; afterwards they and their children have ended."""
    with contextlib.ExitStack() as stack:

        def start(*descriptors: int) -> Puppet:
            puppet = Puppet.start(*descriptors)
            stack.callback(puppet.close)
            return puppet

        yield start


@pytest.fixture
def shm():
    """A file of 64 pages on tmpfs, as good as a region for /proc: ``(descriptor, device, inode)``."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), 64 * 4096)
        status = os.fstat(file.fileno())
        yield file.fileno(), status.st_dev, status.st_ino


@pytest.fixture(params=["query", "text"])
def way(request, monkeypatch):
    """Both ways of reading /proc/PID/maps."""
    if request.param == "text":
        monkeypatch.setattr(procmap, "has_query", lambda: False)
        monkeypatch.setattr("msharefs.clients.space.has_query", lambda: False)
    elif not procmap.has_query():
        pytest.skip("PROCMAP_QUERY is missing (Linux 6.11)")
    return request.param
