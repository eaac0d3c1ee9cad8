"""Clients that do what a test tells them, clients by the thousand, and what must be true after it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

import attrs
import pytest

from msharefs.client import Region, parse_clients
from tests.conftest import GATE

HERE = Path(__file__).parent
INCLUDE = HERE.parents[1] / "msharefs" / "include"
PATIENCE = 60
PAGE = 4096
SIZE = 16 * PAGE
SIGSEGV = f"signal {int(signal.SIGSEGV)}"


def until(what, doing):
    """Wait for something of which nobody tells; yields the processor between looks."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, f"waited in vain: {doing}"
        os.sched_yield()


def status(pid, field):
    """A line of /proc/PID/status; "" if it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    return text.partition(f"\n{field}:\t")[2].partition("\n")[0]


class Client:
    """One process of client.c; see there for what it understands."""

    def __init__(self, command, **more):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **more
        )
        self._rest = b""
        self.pid = self.process.pid
        self.inner = int(self.hear())
        """Its number as it sees it itself."""
        self.fd = -1

    def tell(self, command):
        self.process.stdin.write(command.encode() + b"\n")

    def hear(self):
        """What it says next; "" if it has ended."""
        while b"\n" not in self._rest:
            readable, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
            assert readable, f"no answer from {self.pid}: {status(self.pid, 'State')}"
            piece = os.read(self.process.stdout.fileno(), 4096)
            if not piece:
                return ""
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def do(self, command):
        self.tell(command)
        return self.hear()

    def open(self, path, flags=os.O_RDWR):
        self.fd = int(self.do(f"open {path} {flags}"))
        return self.fd

    def map(self, path, prot=3, size=SIZE):
        """Open and map the region."""
        assert self.open(path, os.O_RDWR if prot & 2 else os.O_RDONLY) >= 0, self.fd
        answer = self.do(f"map {self.fd} {size} 0 {prot}")
        assert answer == "ok", answer
        return self

    def load(self, offset):
        return self.do(f"load {offset}")

    def store(self, offset, byte=1):
        return self.do(f"store {offset} {byte}")

    def blocked(self):
        """Whether it waits for its next command."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/syscall").read_text().startswith("0 0x0 ")
        return False

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def gone(self):
        """Its exit status, once it has ended."""
        return self.process.wait(PATIENCE)

    def end(self):
        """It ends by itself, as a program does that nothing has happened to."""
        self.process.stdin.close()
        assert self.process.wait(PATIENCE) == 7
        self.process.stdout.close()

    def clean_up(self):
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A function from a source's name to the program made of it; "client32" is for 32 bits."""
    place = tmp_path_factory.mktemp("deaths")
    made = {}

    def build(name):
        if name not in made:
            source, more = HERE / f"{name.removesuffix('32')}.c", ["-m32"] * name.endswith("32")
            command = ["gcc", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", *more]
            command += ["-I", str(INCLUDE), "-o", str(place / name), str(source)]
            subprocess.run(command, check=True)
            made[name] = str(place / name)
        return made[name]

    return build


@pytest.fixture
def clients(programs):
    """Start clients; all end with the test. ``before`` is the command that starts the program."""
    started = []

    def start(*before, program="client", **more):
        client = Client([*before, programs(program)], **more)
        started.append(client)
        return client

    yield start
    for client in started:
        client.clean_up()


def does_not_come_in(client, path, code=errno.EPERM):
    """The gate refuses it: that of lsm its mmap(), the other its open() already."""
    if GATE != "lsm":
        assert client.open(path) == -code
        return
    assert client.open(path) >= 0
    assert client.do(f"map {client.fd} {SIZE} 0 3") == str(-code)


@attrs.define(eq=False)
class Place:
    """A mount with one region of 16 pages, all rw-, and its events from now on."""

    served: object
    region: Region
    path: Path
    _events: int

    def events(self, *kinds):
        """Those since last asked for, without waiting."""
        text = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._events, 1 << 16):
                text += piece
        found = [json.loads(line) for line in text.splitlines()]
        return [event for event in found if not kinds or event["event"] in kinds]

    def event(self, kind, since=()):
        """The next one of a kind."""
        found = list(since)
        until(lambda: found or found.extend(self.events(kind)), f"a {kind} event")
        return found[0]

    def standing(self, pid):
        """(state, why) of a process, as the clients file has it; None if it is not there."""
        text = (self.served.path / ".control" / self.path.name / "clients").read_text()
        found = {(c.state, c.why) for c in parse_clients(text) if c.pid == pid}
        assert len(found) < 2, text
        return found.pop() if found else None

    def standing_clients(self):
        """All lines of the clients file."""
        return (self.served.path / ".control" / self.path.name / "clients").read_text()

    def state(self, pid):
        found = self.standing(pid)
        return found and found[0]

    def obeys(self, client, page=2):
        """A change reaches it, both ways."""
        self.region.protect(page * PAGE, PAGE, "r--")
        assert client.store(page * PAGE) == f"{SIGSEGV} {page * PAGE}"
        self.region.protect(page * PAGE, PAGE, "rw-")
        assert client.store(page * PAGE) == "ok"


@pytest.fixture
def place(start_mount):
    """Make a place, by the options of its mount; whatever was in it has gone at the end."""
    places = []

    def make(options="", prot="rw-"):
        if "gate=" not in options and not GATE:
            options += f"{',' if options else ''}gate=ptrace"
        served = start_mount(options)
        path = served.path / "r"
        region = Region.create(path, SIZE)
        path.chmod(0o666)
        region.map(0, SIZE, prot)
        events = os.open(served.path / ".control/r/events", os.O_RDONLY | os.O_NONBLOCK)
        made = Place(served, region, path, events)
        made.events()
        places.append(made)
        return made

    yield make
    for made in places:
        made.region.close()
        os.close(made._events)


@pytest.fixture(params=["vma", "fault"])
def way(request):
    return request.param
