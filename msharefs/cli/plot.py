"""Curves of memory against the number of clients, as a picture in a file.

matplotlib is the optional extra ``plot``, and is imported when something is drawn. Its figures are
made without pyplot: no window system, no state of its own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from msharefs.cli.exits import Failure
from msharefs.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMATS: Final = (".svg", ".png")
MISSING: Final = "--plot needs matplotlib: pip install 'msharefs[plot]'"


@attrs.frozen
class Curve:
    """Points ``(clients, bytes)``, both positive. ``dashed``: calculated, not seen."""

    label: str
    points: Sequence[tuple[int, int]]
    dashed: bool = False


def plot_file(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Path | None:
    """A click callback: the file to draw into, before any work is done for it."""
    if value is None:
        return None
    path = Path(value)
    if path.suffix.lower() not in FORMATS:
        raise click.BadParameter(f"{value!r} ends neither in .svg nor in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise Failure(MISSING)
    return path


def draw(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """Both axes are logarithmic. Raises OSError if the file cannot be written."""
    from matplotlib import rc_context  # noqa: PLC0415 - half a second, and not always there
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: PLC0415

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.add_subplot()
    for curve in curves:
        clients, sizes = zip(*curve.points, strict=True)
        style = {"linestyle": "--"} if curve.dashed else {"marker": "o"}
        axes.plot(clients, sizes, label=curve.label, **style)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_size(int(value))))
    axes.set_xlabel("clients")
    axes.set_ylabel("page tables of all clients")
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    # Words stay words; without a date and with names that are not drawn by lot, the same figures
    # give the same file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "msharefs"}):
        figure.savefig(path, metadata=metadata)
