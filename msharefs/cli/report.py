"""``mshare report``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from msharefs.cli.columns import SIZE, Column, Layout, help_rows, output_options
from msharefs.cli.command import define
from msharefs.cli.exits import failing_as
from msharefs.cli.plot import Curve, draw, plot_file
from msharefs.cli.query import mappings
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import counts, file_argument
from msharefs.footprint import footprints
from msharefs.pagetables import Cost, Span, cost
from msharefs.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from msharefs.footprint import Footprint

NUMBERS: Final = "1,10,100,1000"
LIVE: Final = "live"
MODEL: Final = "model"


@attrs.frozen
class Row:
    """So many clients, and what their page tables take. Bytes; None is not known."""

    what: str
    cost: Cost
    present: int | None
    now: int | None
    vmpte: int | None

    @property
    def clients(self) -> int:
        return self.cost.clients


COLUMNS: Final[list[Column[Row]]] = [
    Column(
        "WHAT",
        "live (the clients there are), or model (that many, each of which has touched everything)",
        lambda r: r.what,
    ),
    Column("CLIENTS", "number of clients", lambda r: r.clients, right=True),
    Column(
        "PRESENT",
        "how much of the region is in page tables, all clients together (live: measured)",
        lambda r: r.present,
        SIZE,
        right=True,
    ),
    Column(
        "NOW",
        "page tables for the region (live: derived from what is present; model: as much a client)",
        lambda r: r.now,
        SIZE,
        right=True,
    ),
    Column(
        "SMALL", "what they would be with 4 KiB pages", lambda r: r.cost.small, SIZE, right=True
    ),
    Column(
        "THP",
        "what they would be with huge pages wherever one fits",
        lambda r: r.cost.thp,
        SIZE,
        right=True,
    ),
    Column(
        "SHARED",
        "what they would be with 4 KiB pages and one set of tables for all clients",
        lambda r: r.cost.shared,
        SIZE,
        right=True,
    ),
    Column(
        "VMPTE",
        "page tables of the live clients for all that they map (measured)",
        lambda r: r.vmpte,
        SIZE,
        right=True,
    ),
]


@define(
    "report",
    tables={"Columns (* by default)": lambda: help_rows(COLUMNS)},
    examples=(
        "mshare report pool",
        "mshare report pool --clients 1,100,1500 --plot pool.svg",
        "mshare report pool --json | jq '.report[0].vmpte'",
    ),
)
@file_argument
@click.option(
    "--clients",
    "numbers",
    type=counts,
    metavar="N,...",
    default=NUMBERS,
    show_default=True,
    help="For how many clients to say what the region would cost.",
)
@click.option(
    "--plot",
    metavar="FILE",
    callback=plot_file,
    type=click.Path(dir_okay=False),
    help="Also draw it, into FILE.svg or FILE.png (needs the extra msharefs[plot]).",
)
@output_options(COLUMNS)
def command(file: str, numbers: list[int], plot: Path | None, **options: Any) -> None:
    """Show what page tables the clients of a region spend, and would.

    The first line is about the clients there are; the others say what so many clients would
    spend: as now, with 4 KiB pages, with huge pages, and with one set of page tables for all
    (as the kernel's mshare series has it), when each has touched all that is mapped.
    """
    region = resolve(file)
    with refusing_as("report", region):
        region.stat()  # says best if there is none
        memory = [Span(mapping.start, mapping.end) for mapping in mappings(region)]
        found = list(footprints(region.client_mappings()))
    rows = report(memory, found, numbers)
    if plot is not None:
        with failing_as(str(plot)):
            size = sum(span.end - span.start for span in memory)
            draw(plot, f"{region.name}: {format_size(size)} of shared memory", curves(rows))
    Layout(**options).show(rows, "report")


def report(memory: Sequence[Span], found: Sequence[Footprint], numbers: Sequence[int]) -> list[Row]:
    """The live clients, then each number of clients. ``memory``: what is mapped in the region."""
    tables = _total([None if c.tables is None else c.tables.size for c in found])
    live = Row(
        LIVE,
        cost(memory, len(found)),
        present=_total([client.present for client in found]),
        now=tables,
        vmpte=_total([client.vmpte for client in found]),
    )
    size = sum(span.end - span.start for span in memory)
    rows = [live]
    for number in numbers:
        now = tables * number // len(found) if tables is not None and found else None
        rows.append(Row(MODEL, cost(memory, number), size * number, now, vmpte=None))
    return rows


def _total(values: list[int | None]) -> int | None:
    """None if one of them is not known: a sum of the others would pass for the whole."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def curves(rows: Sequence[Row]) -> list[Curve]:
    """What a logarithmic axis can show: nothing that is nought."""
    model = sorted((row for row in rows if row.what == MODEL), key=lambda row: row.clients)
    live = [row for row in rows if row.what == LIVE]
    candidates = [
        Curve("4 KiB pages", [(r.clients, r.cost.small) for r in model], dashed=True),
        Curve("huge pages", [(r.clients, r.cost.thp) for r in model], dashed=True),
        Curve("one set of tables", [(r.clients, r.cost.shared) for r in model], dashed=True),
        Curve("as now", [(r.clients, r.now or 0) for r in model], dashed=True),
        Curve("now", [(r.clients, r.now or 0) for r in live]),
    ]
    shown = [
        attrs.evolve(curve, points=[point for point in curve.points if all(point)])
        for curve in candidates
    ]
    return [curve for curve in shown if curve.points]
