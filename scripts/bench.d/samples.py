"""Samples of a time, and what is said of them.

The machines this runs on are shared and noisy, so every figure comes as minimum, median and 99th
percentile: the minimum says what the work costs, the distance to the median how far to trust it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable


@attrs.frozen
class Spread:
    """Minimum, median and 99th percentile of ``count`` samples, in the samples' unit."""

    count: int
    min: float
    p50: float
    p99: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """Raises ValueError if there are none."""
        ordered = sorted(samples)
        if not ordered:
            raise ValueError("no samples")
        last = len(ordered) - 1
        return cls(
            len(ordered), ordered[0], ordered[round(last * 0.5)], ordered[round(last * 0.99)]
        )

    @classmethod
    def of_nanoseconds(cls, samples: Iterable[int]) -> Spread:
        """In microseconds."""
        return cls.of(value / 1000 for value in samples)

    def divided(self, by: float) -> Spread:
        """In a unit that is ``by`` times as large."""
        return Spread(self.count, self.min / by, self.p50 / by, self.p99 / by)

    def as_json(self, digits: int = 2) -> dict[str, float]:
        return {name: round(value, digits) for name, value in attrs.asdict(self).items()}
