"""Memory through a region against a plain memfd: first touch, sequential write and read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from mounts import compiled, lines_of, msharefs_mount
from samples import Spread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
KINDS = {"touch": "first touch", "write": "sequential write", "read": "sequential read"}


@attrs.frozen
class MemoryRow:
    """Spreads of nanoseconds a page for ``touch``, of GB/s for the others."""

    kind: str
    unit: str
    region: Spread
    memfd: Spread
    ratios: Spread  # speed of the region over that of the memfd, pair by pair

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "unit": self.unit,
            "region": self.region.as_json(),
            "memfd": self.memfd.as_json(),
            "ratio": round(self.ratios.p50, 3),
            "pairs": self.ratios.count,
        }


def measure(
    scratch: Path, size: int, rounds: int, advance: Callable[[int], None], options: str = ""
) -> list[MemoryRow]:
    """``rounds`` of passes over ``size`` bytes on both sides, in processes of their own."""
    program = compiled("memory.c", scratch)
    samples: dict[tuple[str, str], list[int]] = {}
    with msharefs_mount(scratch / "msharefs", options) as mount:
        # Two passes at a time, so that each side goes first once.
        command = [program, mount.directory / "bench", str(size), "2"]
        for _ in range(rounds):
            for kind, side, nanoseconds in lines_of(command, "memory"):
                samples.setdefault((kind, side), []).append(int(nanoseconds))
            advance(1)
    return [_row(kind, size, samples[kind, "region"], samples[kind, "memfd"]) for kind in KINDS]


def _row(kind: str, size: int, region: list[int], memfd: list[int]) -> MemoryRow:
    ratios = Spread.of(b / a for a, b in zip(region, memfd, strict=True))
    if kind == "touch":
        pages = size // 4096
        sides = [Spread.of(value / pages for value in side) for side in (region, memfd)]
        return MemoryRow(kind, "ns/page", *sides, ratios)
    sides = [Spread.of(size / value for value in side) for side in (region, memfd)]
    return MemoryRow(kind, "GB/s", *sides, ratios)
