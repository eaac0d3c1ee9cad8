"""Programs that touch memory as they are told, and their userfaultfds."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import attrs
import pytest
import trio

from msharefs.clients.identity import duplicate_descriptor
from msharefs.clients.userfault import Userfault

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
    source = Path(__file__).parent / "toucher.c"
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
            [toucher_program, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        numbers = list(map(int, process.stdout.readline().split()))
        toucher = Toucher(process, *numbers)
        if file == "-" and toucher.limited < 0:
            pytest.skip("userfaultfd(2) is missing or not permitted")
        return toucher

    yield start
    for process in started:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):  # what was not read is of no interest any more
            process.stdin.close()
        process.stdout.close()
