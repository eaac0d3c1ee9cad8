"""What it costs that every process obeys one table, and that stores can be noticed.

PROTECT in many processes against the peer that users have today (peer.c), for each way of
protecting; the first open and mmap with and without a gate; loads and stores afterwards; and
stores to a watched range, from the store to the line that tells of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import memory
from mounts import compiled, lines_of, msharefs_mount
from samples import Spread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
WAYS = ("vma", "fault", "auto")
GATES = ("none", "ptrace")
"""The lsm gate needs a kernel with BPF LSM: where there is one, ``-o gate=auto`` is that one."""
SMALL, LARGE = "small", "huge"
CALLS = {"open": "open", "mmap": "mmap", "both": "open + mmap"}
RATE = 10_000
BURST = 1024
"""Pages stored to one after another."""


@attrs.frozen
class Effort:
    """How much is measured. ``large`` in MiB."""

    clients: int
    large: int
    protect_rounds: int
    adopt_rounds: int
    adopt_count: int
    memory_size: int
    memory_rounds: int
    faults: int
    seconds: int

    @property
    def steps(self) -> int:
        """As many as ``measure`` tells of."""
        return len(WAYS) * 2 + 1 + self.memory_rounds + 2


FULL = Effort(300, 1024, 21, 10, 50, 64 << 20, 20, 2000, 5)
QUICK = Effort(20, 64, 3, 2, 5, 4 << 20, 4, 100, 1)


@attrs.frozen
class ProtectRow:
    """A range made read-only in all clients. Microseconds; page tables in kB a client."""

    way: str
    pages: str
    size: int
    clients: int
    region: Spread
    peer: Spread
    ratio: float  # region to peer, median of the pairs
    restore: Spread
    restore_peer: Spread
    tables: float
    tables_peer: float

    def as_json(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "pages": self.pages,
            "size": self.size,
            "clients": self.clients,
            "us": self.region.as_json(),
            "peer_us": self.peer.as_json(),
            "ratio": round(self.ratio, 3),
            "restore_us": self.restore.as_json(),
            "restore_peer_us": self.restore_peer.as_json(),
            "tables_kb": self.tables,
            "tables_peer_kb": self.tables_peer,
        }


@attrs.frozen
class AdoptRow:
    """The first call of a process, in microseconds, by gate and on a plain file."""

    call: str
    gates: dict[str, Spread]
    plain: Spread

    def as_json(self) -> dict[str, Any]:
        return {
            "call": self.call,
            "us": {gate: spread.as_json() for gate, spread in self.gates.items()},
            "plain_us": self.plain.as_json(),
        }


@attrs.frozen
class FaultRow:
    """One logged store, in microseconds: until it was done, and until its line was read.

    And of many, one after another: until each was done, not watched, watched, watched with _SCAN.
    """

    until: str
    spread: Spread

    def as_json(self) -> dict[str, Any]:
        return {"until": self.until, "us": self.spread.as_json()}


@attrs.frozen
class RateRow:
    """``stores`` watched ones asked for at ``rate`` a second, and what was heard of them."""

    rate: int
    stores: int
    reported: int
    lost: int
    seconds: float

    @property
    def reached(self) -> float:
        """Stores a second."""
        return self.stores / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "reached": round(self.reached)}


@attrs.frozen
class Measured:
    """All of it."""

    protect: list[ProtectRow]
    adopt: list[AdoptRow]
    memory: list[memory.MemoryRow]
    fault: list[FaultRow]
    rate: list[RateRow]

    def as_json(self) -> dict[str, Any]:
        names = [field.name for field in attrs.fields(Measured)]
        return {name: [row.as_json() for row in getattr(self, name)] for name in names}


def measure(scratch: Path, effort: Effort, advance: Callable[[int], None]) -> Measured:
    """``advance`` is told of each step done, ``effort.steps`` in all."""
    return Measured(
        _protect(scratch, effort, advance),
        _adopt(scratch, effort, advance),
        memory.measure(scratch, effort.memory_size, effort.memory_rounds, advance, "gate=ptrace"),
        *_faults(scratch, effort, advance),
    )


# -- PROTECT in many processes


def _protect(scratch: Path, effort: Effort, advance: Callable[[int], None]) -> list[ProtectRow]:
    program = compiled("peer.c", scratch)
    rows = []
    for pages, size, huge in (
        (SMALL, 2 * MIB, ""),
        (LARGE, effort.large * MIB, ",huge=always"),
    ):
        for way in WAYS:
            with msharefs_mount(scratch / "msharefs", f"protect={way}{huge}") as mount:
                rows.append(_one_way(program, mount.directory / "bench", way, pages, size, effort))
            advance(1)
    return rows


def _one_way(
    program: Path, region: Path, way: str, pages: str, size: int, effort: Effort
) -> ProtectRow:
    kind = "huge" if pages == LARGE else "small"
    counts = map(str, (size, effort.clients, effort.protect_rounds))
    samples: dict[tuple[str, str], list[float]] = {}
    for what, side, value in lines_of(
        [program, region, *counts, kind], f"protect={way}, {size // MIB} MiB"
    ):
        samples.setdefault((what, side), []).append(float(value))
    region_ns, peer_ns = samples["protect", "region"], samples["protect", "peer"]
    ratios = Spread.of(ours / theirs for ours, theirs in zip(region_ns, peer_ns, strict=True))
    return ProtectRow(
        way,
        pages,
        size,
        effort.clients,
        Spread.of(value / 1000 for value in region_ns),
        Spread.of(value / 1000 for value in peer_ns),
        ratios.p50,
        Spread.of(value / 1000 for value in samples["restore", "region"]),
        Spread.of(value / 1000 for value in samples["restore", "peer"]),
        samples["pagetables", "region"][0],
        samples["pagetables", "peer"][0],
    )


# -- becoming a client


def _adopt(scratch: Path, effort: Effort, advance: Callable[[int], None]) -> list[AdoptRow]:
    program = compiled("adopt.c", scratch)
    plain = scratch / "plain"
    samples: dict[tuple[str, str], list[int]] = {}
    with (
        msharefs_mount(scratch / "none", "gate=none") as none,
        msharefs_mount(scratch / "ptrace", "gate=ptrace") as ptrace,
    ):
        command = [program, str(effort.adopt_rounds), str(effort.adopt_count)]
        command += [f"none={none.directory}/bench", f"ptrace={ptrace.directory}/bench"]
        for call, name, *values in lines_of([*command, f"plain={plain}"], "adopt"):
            samples.setdefault((call, name), []).extend(map(int, values))
    plain.unlink()
    advance(1)
    return [
        AdoptRow(
            call,
            {gate: Spread.of_nanoseconds(samples[call, gate]) for gate in GATES},
            Spread.of_nanoseconds(samples[call, "plain"]),
        )
        for call in CALLS
    ]


# -- watched stores


def _faults(
    scratch: Path, effort: Effort, advance: Callable[[int], None]
) -> tuple[list[FaultRow], list[RateRow]]:
    program = compiled("faults.c", scratch)
    samples: dict[str, list[int]] = {"store": [], "line": []}
    rates = []
    with msharefs_mount(scratch / "msharefs") as mount:
        region, control = mount.directory / "latency", mount.directory / ".control"
        command = [program, region, control / "latency" / "events", "latency", str(effort.faults)]
        for until, value in lines_of(command, "faults latency"):
            samples[until].append(int(value))
        advance(1)
        region = mount.directory / "burst"
        command = [program, region, control / "burst" / "events", "burst", str(BURST), "5"]
        for way, value in lines_of(command, "faults burst"):
            samples.setdefault(way, []).append(int(value))
        region = mount.directory / "rate"
        command = [program, region, control / "rate" / "events", "rate", str(RATE)]
        for _, stores, reported, lost, taken in lines_of(
            [*command, str(effort.seconds)], "faults rate"
        ):
            rates.append(RateRow(RATE, int(stores), int(reported), int(lost), int(taken) / 1e9))
        advance(1)
    faults = [FaultRow(until, Spread.of_nanoseconds(values)) for until, values in samples.items()]
    return faults, rates
