"""Programs that map a region and know nothing of it, in several languages, and how they are told what
to do: one line each way.

    map PATH r|rw OFFSET LENGTH PROT    at ADDRESS, mapped, errno NUMBER or refused WHY
    load OFFSET                         value BYTE or segv ADDRESS
    store OFFSET BYTE                   stored 0 or segv ADDRESS
    in OFFSET PATH                      read(2) a byte of a file into the memory: count 1, errno N
    out OFFSET PATH                     write(2) a byte of the memory to a file
    unmap LENGTH                        result 0
    fork IN OUT                         pid NUMBER; the child is told through these two FIFOs

The C program can do more, see ``programs/client.c``. Numbers are decimal, addresses hexadecimal.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
PATIENCE = 60
PROGRAMS = Path(__file__).parent / "programs"
INCLUDE = Path(__file__).parents[2] / "msharefs" / "include"
BLOCKED = str(Path(__file__).parents[1] / "clients" / "tracing" / "blocked.c")
VIEWER = str(Path(__file__).parents[1] / "objects" / "property" / "viewer.c")
WARNINGS = ("-O1", "-Wall", "-Wextra", "-Werror")


def _c(source: str, *options: str) -> Callable[[Path], list[str]]:
    return lambda out: ["cc", *WARNINGS, f"-I{INCLUDE}", *options, "-o", str(out / "a.out"), source]


_RAW = ("-DRAW", "-nostdlib", "-static", "-ffreestanding", "-fno-stack-protector")
BUILDS: dict[str, tuple[tuple[str, ...], Callable[[Path], list[str]]]] = {
    "c": (("client.c",), _c("client.c", "-pthread")),
    "c-static": (("client.c",), _c("client.c", "-pthread", "-static")),
    "c-raw": (("client.c", "raw.h"), _c("client.c", *_RAW)),
    "blocked": ((BLOCKED,), _c(BLOCKED, "-pthread")),
    "viewer": ((VIEWER,), _c(VIEWER)),
    "storm": (("storm.c",), _c("storm.c", "-pthread")),
    "ignoring": (("ignoring.c",), _c("ignoring.c", "-pthread")),
    "go": (("client.go",), lambda out: ["go", "build", "-o", f"{out}/a.out", "client.go"]),
    "java": (("Client.java",), lambda out: ["javac", "-d", str(out), "Client.java"]),
}
LANGUAGES = ("c", "c-static", "c-raw", "python", "perl", "go", "java")
NEEDS = {
    "perl": ("perl", "perl"),
    "go": ("go", "golang-go"),
    "java": ("javac", "default-jdk-headless"),
}
FATAL = {"python", "java"}
"""Those that end by a SIGSEGV. The others go on after it."""
FORKS = {"c", "c-static", "c-raw", "python", "perl"}


def build(name: str, place: Path) -> Path:
    """The directory that holds the built program; what was built from the same source is kept."""
    sources, command = BUILDS[name]
    digest = hashlib.sha256(str(command(Path())).encode())
    for source in (*sources, str(INCLUDE / "msharefs.h")):
        digest.update((PROGRAMS / source).read_bytes())
    kept = Path(sys.prefix) / "clients" / f"{name}-{digest.hexdigest()[:16]}"
    if kept.exists():
        return kept
    new = Path(tempfile.mkdtemp(dir=place))
    environment = {**os.environ, "GOCACHE": str(place / "go")}
    subprocess.run(command(new), cwd=PROGRAMS, check=True, env=environment)
    if sys.prefix == sys.base_prefix:
        return new
    try:
        shutil.copytree(new, staged := kept.with_name(f"{kept.name}.{os.getpid()}"))
        staged.rename(kept)
    except OSError:  # read-only, or somebody else was faster
        return new
    return kept


def command_of(language: str, built: Callable[[str], Path], errors: Path) -> list[str]:
    """How a program is started; ``errors`` is where a JVM tells of its end."""
    if language in NEEDS and shutil.which(NEEDS[language][0]) is None:
        pytest.skip("{} is missing ({})".format(*NEEDS[language]))
    if language == "python":
        return [sys.executable, "-S", str(PROGRAMS / "client.py")]
    if language == "perl":
        if subprocess.run(
            ["perl", "-MSys::Mmap", "-e1"], check=False, capture_output=True
        ).returncode:
            pytest.skip("Perl's Sys::Mmap is missing (libsys-mmap-perl)")
        return ["perl", str(PROGRAMS / "client.pl")]
    if language == "java":
        options = ["-Xshare:auto", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx64m"]
        options += [f"-XX:ErrorFile={errors}", "-XX:-CreateCoredumpOnCrash"]
        return ["java", *options, "-cp", str(built("java")), "Client"]
    return [str(built(language) / "a.out")]


def until(reached: Callable[[], Any], what: str) -> Any:
    """Wait for what nobody tells of."""
    deadline = time.monotonic() + PATIENCE
    while not (found := reached()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.001)
    return found


def tracers(pid: int) -> set[str]:
    """Who traces threads of a process."""
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.add((task / "status").read_text().partition("TracerPid:\t")[2].split("\n")[0])
    return found - {"0", ""}


@attrs.frozen
class Window:
    """A mapping of a file as /proc/PID/maps has it; ``offset`` is in the file."""

    start: int
    end: int
    prot: str
    offset: int

    @property
    def range(self) -> tuple[int, int, str]:
        """First page of the file, pages, protection."""
        return self.offset // PAGE, (self.end - self.start) // PAGE, self.prot


def windows(pid: int, path: os.PathLike[str] | str) -> list[Window]:
    """Where a process maps a file, by address; protections that are the same are joined."""
    status = os.stat(path)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    found: list[Window] = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, prot, offset, where, inode = line.split()[:5]
        if where != device or int(inode) != status.st_ino:
            continue
        start, end = (int(part, 16) for part in addresses.split("-"))
        new = Window(start, end, prot[:3], int(offset, 16))
        last = found[-1] if found else None
        if (
            last is not None
            and (last.end, last.prot) == (new.start, new.prot)
            and last.offset + last.end - last.start == new.offset
        ):
            found[-1] = attrs.evolve(last, end=new.end)
        else:
            found.append(new)
    return found


class Died(Exception):
    """The program ended instead of answering."""


class Client:
    """A running program."""

    def __init__(self, language: str, readable: int, writable: int, pid: int = 0) -> None:
        self.language = language
        self.readable, self.writable = readable, writable
        self.pid = pid
        self.process: subprocess.Popen[bytes] | None = None
        self.errors = Path()
        self.path = Path()
        self._rest = b""

    @classmethod
    def start(
        cls, command: list[str], language: str, errors: Path, pass_fds: tuple[int, ...] = ()
    ) -> Client:
        """Returns before the program is ready; :meth:`ready` waits for that."""
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=pass_fds
        )
        client = cls(language, process.stdout.fileno(), process.stdin.fileno(), process.pid)
        client.process, client.errors = process, errors
        return client

    def ready(self) -> Client:
        assert self.answer() == f"ready {self.pid}"
        return self

    def say(self, *words: object) -> None:
        os.write(self.writable, " ".join(map(str, words)).encode() + b"\n")

    def answer(self) -> str:
        """Raises Died."""
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if not select.select([self.readable], [], [], max(left, 0))[0]:
                raise AssertionError(f"process {self.pid} does not answer:\n{self.describe()}")
            data = os.read(self.readable, 4096)
            if not data:
                raise Died
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def describe(self) -> str:
        """What it is doing, for a test that fails."""
        lines = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                status = (task / "status").read_text()
                state = [x for x in status.splitlines() if x.startswith(("State", "TracerPid"))]
                lines.append(f"{task.name} {state} {(task / 'syscall').read_text()}")
        return "\n".join(lines)

    def ask(self, *words: object) -> str:
        self.say(*words)
        return self.answer()

    def call(self, *words: object) -> int:
        """A call that may fail: its result, or minus the errno."""
        word, number = self.ask(*words).split()
        assert word in {"errno", "result"}, word
        return -int(number) if word == "errno" else int(number)

    def map(
        self, path: object, pages: int = 4, offset: int = 0, mode: str = "rw", prot: int = 3
    ) -> int:
        """Open and mmap(MAP_SHARED): 0, or minus the errno."""
        self.path = Path(str(path))
        word, *rest = self.ask("map", path, mode, offset * PAGE, pages * PAGE, prot).split(" ", 1)
        if word in {"at", "mapped"}:
            return 0
        if word == "refused":  # Java has no errno to show
            codes = [code for code in errno.errorcode if os.strerror(code) in rest[0]]
            return -codes[0]
        assert word == "errno"
        return -int(rest[0])

    def windows(self) -> list[Window]:
        return windows(self.pid, self.path)

    def ranges(self) -> list[tuple[int, int, str]]:
        return [window.range for window in self.windows()]

    def address(self, offset: int = 0) -> int:
        """Where it has that byte of the region."""
        for window in self.windows():
            if window.offset <= offset < window.offset + window.end - window.start:
                return window.start + offset - window.offset
        raise AssertionError(f"{offset:#x} is not mapped")

    def load(self, offset: int) -> int:
        word, value = self.ask("load", offset).split()
        assert word == "value", (word, value)
        return int(value)

    def store(self, offset: int, value: int) -> None:
        assert self.ask("store", offset, value) == "stored 0"

    def read_into(self, offset: int, file: Path) -> int:
        """A read(2) of one byte: the count, or minus the errno."""
        word, number = self.ask("in", offset, file).split()
        return -int(number) if word == "errno" else int(number)

    def write_from(self, offset: int, file: Path) -> int:
        word, number = self.ask("out", offset, file).split()
        return -int(number) if word == "errno" else int(number)

    def fault_of(self, *words: object) -> int:
        """si_addr of the SIGSEGV by which this access fails. Those of FATAL have ended then."""
        self.say(*words)
        if self.language == "java":
            self.ended(1)
            text = self.errors.read_text()
            if found := re.search(r"si_signo: 11 .*si_addr: 0x([0-9a-f]+)", text):
                return int(found[1], 16)
            # One that the server sent: for the kernel these two lie where si_addr does.
            found = re.search(r"si_signo: 11 .*si_pid: (-?\d+).*, si_uid: (\d+)", text)
            assert found, text[:4000]
            return int(found[1]) & 0xFFFFFFFF | int(found[2]) << 32
        word, address = self.answer().split()
        assert word == "segv", (word, address)
        if self.language in FATAL:
            self.ended(-signal.SIGSEGV)
        return int(address, 16)

    def ended(self, code: int) -> None:
        """It ends, with that exit code; minus the number of a signal."""
        assert self.process is not None
        with contextlib.suppress(Died):
            while True:
                self.answer()
        assert self.process.wait(PATIENCE) == code

    @property
    def alive(self) -> bool:
        return self.process is None or self.process.poll() is None

    def fork(self, place: Path) -> Client:
        """A child of it, told through FIFOs made in ``place``."""
        pipes = [str(place / f"fork{self.pid}.{time.monotonic_ns()}.{end}") for end in "io"]
        for pipe in pipes:
            os.mkfifo(pipe)
        word, pid = self.ask("fork", *pipes).split()
        assert word == "pid"
        # Opened both ways, so that neither end waits for the other.
        writable = os.open(pipes[0], os.O_RDWR | os.O_CLOEXEC)
        readable = os.open(pipes[1], os.O_RDWR | os.O_CLOEXEC)
        child = Client(self.language, readable, writable, int(pid))
        child.path = self.path
        return child

    def close(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.readable)
        os.close(self.writable)
