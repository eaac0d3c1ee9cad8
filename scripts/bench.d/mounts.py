"""Filesystems served by processes of ours, and C programs, for as long as a measurement takes."""

from __future__ import annotations

import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PATIENCE = 20.0  # seconds, for a server to mount or to end


class BenchError(Exception):
    """One line about what a measurement lacks."""


@attrs.frozen
class Mount:
    """A served mount and the process that serves it."""

    directory: Path
    process: subprocess.Popen[bytes]

    def run_on(self, cpus: set[int]) -> None:
        """Keep all threads of the server on these processors."""
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cpus)


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    info = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def check_possible() -> None:
    """Raises BenchError if nothing can be mounted here."""
    if os.geteuid() != 0:
        raise BenchError("mounting needs root")
    if not Path("/dev/fuse").exists():
        raise BenchError("/dev/fuse is missing")


def compiled(source: str, into: Path) -> Path:
    """The program of a C file beside this one."""
    program = into / source.removesuffix(".c")
    include = ROOT / "msharefs" / "include"
    command = ["cc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{include}", "-o", str(program), str(HERE / source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchError("a C compiler (cc) is missing") from None
    if done.returncode:
        raise BenchError(f"{source} does not compile:\n{done.stderr}")
    return program


def lines_of(command: Sequence[str | Path], expected: str) -> Iterator[list[str]]:
    """The words of each line that a program prints; BenchError unless it ends well."""
    # Line by line as they come would show progress sooner, but make the reader a part of what is
    # measured: the program writes into a file.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdout=output, stderr=errors, check=False)
        if done.returncode:
            errors.seek(0)
            raise BenchError(f"{expected}: {errors.read().strip() or f'exit {done.returncode}'}")
        output.seek(0)
        for line in output:
            yield line.split()


@contextmanager
def msharefs_mount(directory: Path, options: str = "") -> Iterator[Mount]:
    """A mount of this checkout's msharefs, with these ``-o`` options."""
    server = [sys.executable, "-m", "msharefs.cli.server", "none", str(directory), "-f"]
    if options:
        server += ["-o", options]
    with _served(server, directory) as mount:
        yield mount


@contextmanager
def plain_mount(directory: Path) -> Iterator[Mount]:
    """A mount of plainfs.py."""
    with _served([sys.executable, str(HERE / "plainfs.py"), str(directory)], directory) as mount:
        yield mount


@contextmanager
def _served(command: list[str], directory: Path) -> Iterator[Mount]:
    directory.mkdir()
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            if not _mounted_in_time(directory, process):
                log.seek(0)
                raise BenchError(f"{' '.join(command)} did not mount:\n{log.read().strip()}")
            yield Mount(directory, process)
        finally:
            _end(directory, process)


def _mounted_in_time(directory: Path, process: subprocess.Popen[bytes]) -> bool:
    """Wait for the mount, the end of the server, or the end of patience."""
    deadline = time.monotonic() + PATIENCE
    ended = os.pidfd_open(process.pid)
    try:
        with Path("/proc/self/mountinfo").open("rb") as table:
            poll = select.poll()
            poll.register(table, select.POLLPRI)  # mount(2) changed the table: proc_pid_mounts(5)
            poll.register(ended, select.POLLIN)
            while not _is_mounted(directory):
                left = deadline - time.monotonic()
                if left <= 0 or any(fd == ended for fd, _ in poll.poll(left * 1000)):
                    return False
    finally:
        os.close(ended)
    # Mounted is not yet serving: the kernel holds this until the server answers.
    directory.stat()
    return True


def _is_mounted(directory: Path) -> bool:
    table = Path("/proc/self/mountinfo").read_text()
    return any(line.split()[4] == str(directory) for line in table.splitlines())


def _end(directory: Path, process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if _is_mounted(directory):
        subprocess.run(["umount", "--lazy", str(directory)], check=False)
    directory.rmdir()
