"""Operations on the mapping table of a region, with 10, 1,000 and 100,000 mappings in it.

What is timed is what an ioctl asks of the core: the checks of the arguments, the plan and its
application. No system call is in it.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import attrs
from samples import Spread

from msharefs.abi import PAGE_SIZE, MapFlag, Prot
from msharefs.region.region import Region

if TYPE_CHECKING:
    from collections.abc import Callable

COUNTS = (10, 1_000, 100_000)
FLAGS = int(MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)
READ, READ_WRITE = int(Prot.READ), int(Prot.READ | Prot.WRITE)

# Mappings of two pages, two pages apart: each can be split, and none merges with its neighbour.
STRIDE, SIZE = 4 * PAGE_SIZE, 2 * PAGE_SIZE


@attrs.frozen
class TableRow:
    operation: str
    spreads: tuple[Spread, ...]  # one for each of COUNTS, in microseconds

    @property
    def growth(self) -> float:
        """The median with the most mappings over that with the fewest."""
        return self.spreads[-1].p50 / self.spreads[0].p50

    def as_json(self) -> dict[str, Any]:
        by_count = zip(COUNTS, self.spreads, strict=True)
        return {
            "operation": self.operation,
            "us": {str(count): spread.as_json() for count, spread in by_count},
            "ratio": round(self.growth, 2),
        }


def measure(rounds: int, advance: Callable[[int], None]) -> list[TableRow]:
    """``rounds`` samples of each operation and count; ``advance`` is told of each batch done."""
    samples: dict[str, list[Spread]] = {}
    for count in COUNTS:
        for operation, values in _measure_one(filled(count), count, rounds, advance).items():
            samples.setdefault(operation, []).append(Spread.of_nanoseconds(values))
    return [TableRow(operation, tuple(spreads)) for operation, spreads in samples.items()]


def filled(count: int) -> Region:
    region = Region(1, "bench")
    region.apply_resize(region.plan_resize(count * STRIDE))
    for index in range(count):
        region.apply(region.plan_map(index * STRIDE, SIZE, READ_WRITE, FLAGS))
    return region


def _measure_one(
    region: Region, count: int, rounds: int, advance: Callable[[int], None]
) -> dict[str, list[int]]:
    rng = random.Random(count)
    now = time.perf_counter_ns
    samples: dict[str, list[int]] = {
        "query": [],
        "query, next": [],
        "protect": [],
        "unmap": [],
        "map": [],
        "protect half": [],
    }
    for step in range(rounds):
        # Somewhere else each time, so that a large table is not measured in the processor's cache.
        at = rng.randrange(count) * STRIDE
        started = now()
        region.query(at + PAGE_SIZE)
        samples["query"].append(now() - started)

        if at + STRIDE < region.size:
            started = now()
            region.query(at + SIZE, or_next=True)
            samples["query, next"].append(now() - started)

        started = now()
        region.apply(region.plan_protect(at, SIZE, READ))
        samples["protect"].append(now() - started)

        started = now()
        region.apply(region.plan_unmap(at, SIZE))
        samples["unmap"].append(now() - started)

        started = now()
        region.apply(region.plan_map(at, SIZE, READ_WRITE, FLAGS))
        samples["map"].append(now() - started)

        started = now()
        region.apply(region.plan_protect(at, PAGE_SIZE, READ))
        samples["protect half"].append(now() - started)
        region.apply(region.plan_protect(at, SIZE, READ_WRITE))
        if step % 100 == 99:
            advance(100)
    advance(rounds % 100)
    assert len(region.table) == count, "each round leaves the table as it was"
    return samples
