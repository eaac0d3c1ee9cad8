"""A file in a region: getting it there with few and with many clients, and using it.

Two sizes of it, in two places: on the disk of the scratch directory, and in memory. What a region
costs stands beside a plain mapping of the file, in the same process.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from mounts import BenchError, compiled, lines_of, msharefs_mount
from samples import Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
PLACES = ("disk", "memory")
KINDS = {
    "touch": "load from each page, first time",
    "read": "sequential read",
    "load": "random loads",
    "write": "sequential write",
    "store": "random stores",
}
CALLS = ("create", "first", "unmap", "mmap", "plain")


@attrs.frozen
class Effort:
    """How much is measured. ``sizes`` in bytes, the largest is the file's."""

    sizes: tuple[int, ...]
    clients: tuple[int, ...]
    create_rounds: int
    access_rounds: int

    @property
    def steps(self) -> int:
        """As many as ``measure`` tells of."""
        return len(PLACES) * (len(self.sizes) * len(self.clients) + 1)


FULL = Effort((2 * MIB, 2048 * MIB), (1, 100), 21, 10)
QUICK = Effort((2 * MIB, 32 * MIB), (1, 10), 3, 2)


@attrs.frozen
class CreateRow:
    """Microseconds: the ioctl, the first load after it, taking the file out again.

    ``mmap`` and ``plain``: mmap(2) of the file by one process, and the first load after it.
    """

    place: str
    size: int
    clients: int
    spreads: dict[str, Spread]

    def as_json(self) -> dict[str, Any]:
        spreads = {call: spread.as_json() for call, spread in self.spreads.items()}
        return {"place": self.place, "size": self.size, "clients": self.clients, "us": spreads}


@attrs.frozen
class AccessRow:
    """Milliseconds a pass, and the region's speed over that of the plain mapping.

    ``ratios``: of two rounds each, in one of which either was first. Who is first on a disk's file
    pays for what the other one then finds (a page that is dirty already, blocks that are mapped).
    """

    place: str
    kind: str
    region: Spread
    plain: Spread
    ratios: Spread

    def as_json(self) -> dict[str, Any]:
        return {
            "place": self.place,
            "kind": self.kind,
            "region": self.region.as_json(4),
            "plain": self.plain.as_json(4),
            "ratio": round(self.ratios.p50, 3),
            "pairs": self.ratios.count,
        }


@attrs.frozen
class Measured:
    """All of it."""

    create: list[CreateRow]
    access: list[AccessRow]

    def as_json(self) -> dict[str, Any]:
        return {
            "create": [row.as_json() for row in self.create],
            "access": [row.as_json() for row in self.access],
        }


def measure(scratch: Path, effort: Effort, advance: Callable[[int], None]) -> Measured:
    """``advance`` is told of each step done, ``effort.steps`` in all."""
    program = compiled("objects.c", scratch)
    measured = Measured([], [])
    with msharefs_mount(scratch / "msharefs") as mount:
        region = mount.directory / "bench"
        for place in PLACES:
            with _file(scratch, place, max(effort.sizes)) as file:
                for clients in effort.clients:
                    for size in effort.sizes:
                        counts = map(str, (size, clients, effort.create_rounds))
                        command = [program, "create", region, file, *counts]
                        measured.create.append(_created(command, place, size, clients))
                        advance(1)
                counts = map(str, (max(effort.sizes), effort.access_rounds))
                measured.access.extend(_accessed([program, "access", region, file, *counts], place))
                advance(1)
    return measured


@contextmanager
def _file(scratch: Path, place: str, size: int) -> Iterator[Path]:
    """A file each of whose bytes is the number of its MiB (modulo 251), in page cache."""
    if place == "disk":
        path = scratch / "object"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    else:
        fd = os.memfd_create("object")
        path = Path(f"/proc/{os.getpid()}/fd/{fd}")
    try:
        for number in range(size // MIB):
            if os.pwrite(fd, bytes([number % 251]) * MIB, number * MIB) != MIB:
                raise BenchError(f"{size // MIB} MiB do not fit into {path}")
        os.fsync(fd)  # what is written back meanwhile would be measured
        yield path
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    finally:
        os.close(fd)
        if place == "disk":
            path.unlink()


def _created(command: list[str | Path], place: str, size: int, clients: int) -> CreateRow:
    samples: dict[str, list[int]] = {}
    for call, nanoseconds in lines_of(command, f"objects create, {clients} clients"):
        samples.setdefault(call, []).append(int(nanoseconds))
    spreads = {call: Spread.of_nanoseconds(samples[call]) for call in CALLS}
    return CreateRow(place, size, clients, spreads)


def _accessed(command: list[str | Path], place: str) -> Iterator[AccessRow]:
    samples: dict[tuple[str, str], list[int]] = {}
    for kind, side, nanoseconds in lines_of(command, "objects access"):
        samples.setdefault((kind, side), []).append(int(nanoseconds))
    for kind in KINDS:
        region, plain = samples[kind, "region"], samples[kind, "plain"]
        ratios = Spread.of(
            b / a for a, b in zip(_in_both_orders(region), _in_both_orders(plain), strict=True)
        )
        sides = [Spread.of_nanoseconds(side).divided(1000) for side in (region, plain)]
        yield AccessRow(place, kind, *sides, ratios)


def _in_both_orders(samples: list[int]) -> list[int]:
    """The sums of two rounds each."""
    return [one + other for one, other in zip(samples[::2], samples[1::2], strict=True)]
