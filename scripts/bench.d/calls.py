"""System calls on a region against the same calls on a plain pyfuse3 filesystem."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import attrs
from mounts import Mount, compiled, lines_of, msharefs_mount, plain_mount
from samples import Spread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CALLS = {
    "protect": "ioctl PROTECT",
    "protect_gain": "ioctl PROTECT, a new right",
    "query": "ioctl QUERY",
    "info": "ioctl INFO",
    "stat": "stat",
    "open_close": "open + close",
}
PLACES = ("one CPU", "any CPU")
"""Client and servers on one processor, or wherever the scheduler puts them."""


@attrs.frozen
class CallRow:
    """In microseconds; ``plain`` is None where a plain filesystem has no such call."""

    call: str
    place: str
    region: Spread
    plain: Spread | None

    @property
    def ratio(self) -> float | None:
        return None if self.plain is None else self.region.p50 / self.plain.p50

    def as_json(self) -> dict[str, Any]:
        return {
            "call": self.call,
            "place": self.place,
            "us": self.region.as_json(),
            "plain_us": None if self.plain is None else self.plain.as_json(),
            "ratio": None if self.ratio is None else round(self.ratio, 2),
        }


def measure(
    scratch: Path, rounds: int, count: int, advance: Callable[[int], None]
) -> list[CallRow]:
    """``rounds`` times ``count`` samples of each call, side and place, sides taking turns."""
    program = compiled("calls.c", scratch)
    with (
        msharefs_mount(scratch / "msharefs") as mount,
        plain_mount(scratch / "plain") as plain,
    ):
        rows = []
        for place in PLACES:
            samples = _samples(program, mount, plain, rounds, count, place)
            advance(1)
            for call in CALLS:
                beside = samples.get((call, "plain"))
                rows.append(
                    CallRow(
                        call,
                        place,
                        Spread.of_nanoseconds(samples[call, "region"]),
                        None if beside is None else Spread.of_nanoseconds(beside),
                    )
                )
    return rows


def _samples(
    program: Path, mount: Mount, plain: Mount, rounds: int, count: int, place: str
) -> dict[tuple[str, str], list[int]]:
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    for served in (mount, plain):
        served.run_on({cpu} if place == "one CPU" else allowed)
    command = [program, mount.directory / "bench", plain.directory / "file"]
    command += [str(rounds), str(count)]
    if place == "one CPU":
        command.append(str(cpu))
    samples: dict[tuple[str, str], list[int]] = {}
    for call, side, *values in lines_of(command, "calls"):
        samples.setdefault((call, side), []).extend(map(int, values))
    return samples
