"""System calls on a region against the same calls on a plain pyfuse3 filesystem."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import attrs
from mounts import Mount, compiled, lines_of, msharefs_mount, plain_mount
from samples import Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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
    """``rounds`` times ``count`` samples of each call, side and place.

    Places take turns, and so do sides within them: the machine may be busier later than sooner.
    """
    samples: dict[tuple[str, str, str], list[int]] = {}
    program = compiled("calls.c", scratch)
    with (
        msharefs_mount(scratch / "msharefs") as mount,
        plain_mount(scratch / "plain") as plain,
    ):
        for _ in range(rounds):
            for place in PLACES:
                for call, side, *values in _round(program, mount, plain, count, place):
                    samples.setdefault((place, call, side), []).extend(map(int, values))
                advance(1)
    return [
        CallRow(
            call,
            place,
            Spread.of_nanoseconds(samples[place, call, "region"]),
            Spread.of_nanoseconds(samples[place, call, "plain"])
            if (place, call, "plain") in samples
            else None,
        )
        for place in PLACES
        for call in CALLS
    ]


def _round(
    program: Path, mount: Mount, plain: Mount, count: int, place: str
) -> Iterator[list[str]]:
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    for served in (mount, plain):
        served.run_on({cpu} if place == "one CPU" else allowed)
    # Twice half of it, so that each side goes first once.
    command = [program, mount.directory / "bench", plain.directory / "file", "2", str(count // 2)]
    if place == "one CPU":
        command.append(str(cpu))
    return lines_of(command, "calls")
