"""Processes that make calls when they are told: ``actor.c``, and what they answer."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).with_name("actor.c")


def build(place: Path) -> Path:
    program = place / "actor"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", SOURCE, "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    return program


@attrs.frozen
class Caught:
    """An access that ended in a signal."""

    signal: int
    address: int


@attrs.define(eq=False)
class Actor:
    """One process. Calls return a number, the name of an errno, or what was Caught."""

    pid: int
    into: IO[str]
    out: IO[str]
    process: subprocess.Popen[str] | None = None
    children: list[Actor] = attrs.field(factory=list)

    @classmethod
    def start(cls, program: Path) -> Actor:
        process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert process.stdin is not None
        assert process.stdout is not None
        return cls(process.pid, process.stdin, process.stdout, process)

    def call(self, *words: object) -> int | str | Caught:
        self.tell(*words)
        return self.hear()

    def tell(self, *words: object) -> None:
        print(*words, file=self.into, flush=True)

    def hear(self) -> int | str | Caught:
        kind, *found = self.out.readline().split()
        if kind == "=":
            return int(found[0], 16)
        if kind == "!":
            return errno.errorcode[int(found[0])]
        return Caught(int(found[0]), int(found[1], 16))

    def map(
        self,
        path: Path,
        length: int,
        address: int = 0,
        *,
        prot: int = 3,
        flags: int = 1,
        offset: int = 0,
        mode: int = os.O_RDWR,
    ) -> int | str | Caught:
        """open(), mmap() and close(): what mmap() returned."""
        return self.call("map", path, mode, address, length, prot, flags, offset)

    def fork(self, place: Path) -> Actor:
        """A child that is told what to do by itself."""
        pipes = [place / f"{kind}.{self.pid}.{len(self.children)}" for kind in ("in", "out")]
        for pipe in pipes:
            os.mkfifo(pipe)
        pid = self.call("fork", *pipes)
        assert isinstance(pid, int), pid
        # In the order in which the child opens its ends.
        into = pipes[0].open("w", buffering=1)
        child = Actor(pid, into, pipes[1].open())
        assert child.hear() == pid
        self.children.append(child)
        return child

    def maps(self, path: Path) -> Iterator[tuple[int, int, str]]:
        """What it has mapped of the file: where, and with which protection."""
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            words = line.split(maxsplit=5)
            if len(words) == 6 and words[5] == str(path):
                start, end = (int(part, 16) for part in words[0].split("-"))
                yield start, end, words[1]

    def close(self) -> None:
        """Let it end. A child's end is its parent's to see, and that is ending too."""
        for child in self.children:
            child.close()
        self.into.close()
        assert self.out.read() == ""
        self.out.close()
        if self.process is not None:
            assert self.process.wait(60) == 0
