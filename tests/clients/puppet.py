"""Processes that do what a test tells them: map, protect, fork, exec, end.

A puppet runs Python code sent to it, one piece at a time, with the C library's calls at hand as
plain numbers in and out. It ends with the socket it is told through, so with the test.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE = 30

PAGE = 4096
SHARED, PRIVATE, FIXED, ANONYMOUS = 1, 2, 0x10, 0x20


class Puppet:
    """One process. ``run`` gives the value of an expression; ``do`` executes statements."""

    def __init__(self, pid: int, talk: socket.socket, process: Any = None) -> None:
        self.pid = pid
        self._talk = talk
        self._process = process
        self._pidfd = os.pidfd_open(pid)
        self._children: list[Puppet] = []
        self._closed = False
        talk.settimeout(PATIENCE)

    @classmethod
    def start(cls, *descriptors: int) -> Puppet:
        """A new program, which inherits these descriptors under the same numbers."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-S", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno(), *descriptors],
                cwd=Path(__file__).parent,
            )
        return cls(process.pid, ours, process)

    def run(self, expression: str) -> Any:
        return self._ask("run", expression)

    def do(self, statements: str) -> None:
        self._ask("do", statements)

    def send(self, statements: str) -> None:
        """Have it executed, and expect no answer."""
        self._talk.send(pickle.dumps(("do", statements)))

    def receive(self) -> tuple[bool, Any]:
        """The answer to what was sent: whether it went well, and the value."""
        good, value = pickle.loads(self._talk.recv(1 << 20))
        return good, value

    def fork(self) -> Puppet:
        """A child of it, with all that it has mapped. It is reaped when it ends."""
        self._talk.send(pickle.dumps(("fork", "")))
        data, (descriptor,), _, _ = socket.recv_fds(self._talk, 64, 1)
        self._children.append(Puppet(int(data), socket.socket(fileno=descriptor)))
        return self._children[-1]

    def execute(self, *command: str) -> None:
        """It becomes another program; returns once it has. It cannot be told anything then."""
        self._talk.send(pickle.dumps(("exec", list(command))))
        assert not self._talk.recv(1 << 16), "the socket closes on exec"

    def turn_into_puppet(self) -> None:
        """It becomes another program, of the same kind."""
        self._talk.send(pickle.dumps(("again", "")))
        assert self.run("1") == 1

    def kill(self) -> None:
        """Returns once it has ended."""
        os.kill(self.pid, signal.SIGKILL)
        wait_for_end(self._pidfd)

    def close(self) -> None:
        """End it and its children, if they have not ended."""
        for child in self._children:
            child.close()
        if self._closed:
            return
        self._closed = True
        self._talk.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        try:
            wait_for_end(self._pidfd)
        finally:
            os.close(self._pidfd)
            if self._process is not None:
                self._process.wait(PATIENCE)

    def _ask(self, what: str, code: str) -> Any:
        self._talk.send(pickle.dumps((what, code)))
        good, value = self.receive()
        assert good, value
        return value


def wait_for_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(PATIENCE * 1000), "the process goes on"


def wait_until(condition: Any) -> None:
    """For what the kernel tells nobody: look again and again, and let others run meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p

    def checked(result: int | None) -> int:
        if result in {-1, (1 << 64) - 1}:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result or 0

    def number(value: int) -> ctypes.c_ulong:
        return ctypes.c_ulong(value)

    def call(name: str) -> Any:
        function = getattr(libc, name)
        return lambda *values: checked(function(*map(number, values)))

    names = {name: call(name) for name in ("mmap", "munmap", "mprotect", "mremap", "clone")}
    scope: dict[str, Any] = {**names, "os": os, "ctypes": ctypes, "libc": libc, "PAGE": PAGE}
    talk = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(talk.fileno(), False)
    while data := talk.recv(1 << 16):
        what, code = pickle.loads(data)
        if what == "exec":
            os.execvp(code[0], code)
        if what == "again":
            os.set_inheritable(talk.fileno(), True)
            os.execv(sys.executable, [sys.executable, "-S", *sys.argv[:1], str(talk.fileno())])
        if what == "fork":
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if pid := os.fork():
                theirs.close()
                socket.send_fds(talk, [str(pid).encode()], [ours.fileno()])
                ours.close()
            else:
                ours.close()
                talk.close()
                talk = theirs
            continue
        try:
            answer = True, (eval if what == "run" else exec)(code, scope)
        except Exception as error:  # noqa: BLE001 (told to the test)
            answer = False, f"{code}: {error!r}"
        talk.send(pickle.dumps(answer))


if __name__ == "__main__":
    main()
