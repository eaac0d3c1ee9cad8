"""The command line of scripts/bench-pagetables: page tables against the number of clients.

For: the table that says what shared memory costs beside itself. At each number of clients ``mshare
report`` is run on the live region, once with 4 KiB pages and once with huge ones; what is measured
stands beside what it reckons.

Promises: everything it mounts and starts ends with it, whatever ends it; a step for which the
machine has not enough memory free is left out, and said so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
from mounts import ROOT, BenchError, check_possible, compiled, machine, msharefs_mount
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from msharefs.cli.plot import Curve, draw, plot_file
from msharefs.cli.types import counts, size
from msharefs.footprint import page_tables
from msharefs.pagetables import Span, cost
from msharefs.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1 << 30
KINDS = {"small": "", "huge": "huge=always"}
NAMES = {"small": "4 KiB pages", "huge": "huge=always"}
AIM = 100
SPARE = GIB
"""Bytes of memory that are left to everybody else."""
A_CLIENT = 256 << 10
"""Bytes that a client needs beside its page tables: stack, kernel's structures, some of it seen."""


@attrs.frozen
class Effort:
    """Bytes of the region, and at how many clients it is looked at."""

    size: int
    steps: list[int]


FULL = Effort(2 * GIB, [1, 3, 10, 30, 100, 300, 1000])
QUICK = Effort(64 << 20, [1, 3, 10])


@attrs.frozen
class Row:
    """All clients together, in bytes.

    ``vmpte`` is measured and holds their other page tables as well; ``grown`` is by how much it
    exceeds that of as many processes that map the region and have touched nothing of it.
    ``derived`` is what mshare report says of the region alone, ``model`` and ``shared`` what it
    reckons.
    """

    pages: str
    clients: int
    present: int
    vmpte: int
    grown: int
    derived: int
    model: int
    shared: int


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", "wanted", type=size, help="Of the region (default 2G, or 64M if quick).")
@click.option("--clients", type=counts, metavar="N,...", help="Default 1,3,10,30,100,300,1000.")
@click.option("--quick", is_flag=True, help="64 MiB and 10 clients: seconds in all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the tables.")
@click.option(
    "--plot", callback=plot_file, metavar="FILE", help="Draw it, into FILE.svg or FILE.png."
)
def main(
    *, wanted: int | None, clients: list[int] | None, quick: bool, as_json: bool, plot: Path | None
) -> None:
    """Measure the page tables of 1 to 1,000 processes that share a region.

    All clients are forked from one C program and touch every page: once with 4 KiB pages and once
    with huge ones. The full run needs 7 GiB of memory (2 for the region, 4 for page tables) and
    takes some minutes.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: what was mounted goes
    effort = QUICK if quick else FULL
    effort = Effort(wanted or effort.size, clients or effort.steps)
    try:
        check_possible()
        rows, skipped = measure(effort)
    except BenchError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        result = {
            "machine": machine(),
            "size": effort.size,
            "rows": [attrs.asdict(row) for row in rows],
            "skipped": skipped,
            "ratio": ratio(rows),
        }
        print(json.dumps(result, indent=2))
    else:
        show(Console(width=None if sys.stdout.isatty() else 120), effort, rows, skipped)
    if plot is not None:
        title = f"A region of {format_size(effort.size)}, touched by every client"
        draw(plot, title, curves(effort, rows))


# -- measuring


def measure(effort: Effort) -> tuple[list[Row], dict[str, str]]:
    """The rows, and why steps were left out, by kind of pages."""
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory(prefix="msharefs-bench.") as name,
        _progress(len(KINDS) * len(effort.steps)) as progress,
    ):
        scratch = Path(name)
        program = compiled("sharers.c", scratch)
        for pages, options in KINDS.items():
            steps = _that_fit(effort, pages)
            if steps != effort.steps:
                left_out = ", ".join(f"{n:,}" for n in effort.steps if n not in steps)
                free = format_size(_available())
                skipped[pages] = f"{left_out} clients need more memory than is free ({free})"
            with msharefs_mount(scratch / "msharefs", options) as mount:
                region = mount.directory / "region"
                for step in _measured(program, region, effort.size, steps):
                    rows.append(_row(pages, effort.size, *step))
                    progress(1)
            progress(len(effort.steps) - len(steps))
    return rows, skipped


def _measured(
    program: Path, region: Path, size: int, steps: list[int]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """At each step: the clients, VmPTE of one before it touched anything, the report's live row."""
    with tempfile.TemporaryFile("w+") as errors:
        sharers = subprocess.Popen(
            [program, region, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            bare = 0
            for step in [0, *steps]:
                assert sharers.stdin is not None
                assert sharers.stdout is not None
                print(step, file=sharers.stdin, flush=True)
                if sharers.stdout.readline() != f"ready {step}\n":
                    errors.seek(0)
                    raise BenchError(f"{step} clients: {errors.read().strip()}")
                if step:
                    yield step, bare, _report(region)
                else:
                    bare = page_tables(sharers.pid) or 0
        finally:
            sharers.terminate()  # and its clients with it
            sharers.communicate()


def _report(region: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "msharefs.cli.main", "report", region, "--json", "--clients", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise BenchError(done.stderr.strip())
    live: dict[str, Any] = json.loads(done.stdout)["report"][0]
    return live


def _row(pages: str, size: int, clients: int, bare: int, live: dict[str, Any]) -> Row:
    if live["clients"] != clients or live["present"] != size * clients:
        raise BenchError(
            f"{live['clients']} of {clients} clients are seen, with"
            f" {live['present']} of {size * clients} bytes present"
        )
    return Row(
        pages=pages,
        clients=clients,
        present=live["present"],
        vmpte=live["vmpte"],
        grown=live["vmpte"] - bare * clients,
        derived=live["now"],
        model=live["small" if pages == "small" else "thp"],
        shared=live["shared"],
    )


def _that_fit(effort: Effort, pages: str) -> list[int]:
    free = _available() - effort.size - SPARE
    one = cost([Span(0, effort.size)], 1)
    each = (one.small if pages == "small" else one.thp) + A_CLIENT
    return [clients for clients in effort.steps if clients * each <= free]


def _available() -> int:
    """MemAvailable of proc_meminfo(5), in bytes."""
    _, _, rest = Path("/proc/meminfo").read_text().partition("MemAvailable:")
    return int(rest.split(None, 1)[0]) * 1024


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    console = Console(stderr=True)
    with Progress(
        TextColumn("clients"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("clients", total=total)
        yield lambda steps: progress.advance(task, steps)


def ratio(rows: list[Row]) -> float | None:
    """Page tables of a client with 4 KiB pages to those with huge ones, at the most clients of both.

    No better than it is: of what VmPTE grew by and what was derived, the less for 4 KiB pages, and
    the more for huge ones, whose few tables a process may have had anyway.
    """
    small = {row.clients: min(row.grown, row.derived) for row in rows if row.pages == "small"}
    huge = {row.clients: max(row.grown, row.derived) for row in rows if row.pages == "huge"}
    both = small.keys() & huge.keys()
    return round(small[max(both)] / huge[max(both)], 1) if both else None


# -- showing


def show(console: Console, effort: Effort, rows: list[Row], skipped: dict[str, str]) -> None:
    here = machine()
    console.print(
        f"{here['cpu']}, {here['cpus']} CPUs, Linux {here['kernel']}, load {here['load']}",
        soft_wrap=True,
        highlight=False,
    )
    table = Table(
        title=f"Page tables of all clients of a region of {format_size(effort.size)}",
        caption="VmPTE and region: measured (region: without what the processes have anyway);"
        " derived: mshare report\nmodel: reckoned from the size; one set: 4 KiB pages and shared"
        " page tables, reckoned",
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=SIMPLE,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("pages", no_wrap=True)
    headings = ("clients", "VmPTE", "region", "derived", "model", "a client", "per GiB", "one set")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        each = row.grown / row.clients
        table.add_row(
            NAMES[row.pages],
            f"{row.clients:,}",
            *map(format_size, (row.vmpte, row.grown, row.derived, row.model)),
            format_size(round(each)),
            format_size(round(each * GIB / effort.size)),
            format_size(row.shared),
            end_section=row.clients == max(r.clients for r in rows if r.pages == row.pages),
        )
    console.print()
    console.print(table)
    found = ratio(rows)
    if found is not None:
        console.print(
            f"\na client's page tables, 4 KiB pages to huge ones: {found:,} (aim: {AIM} or more)",
            highlight=False,
        )
    for pages, reason in skipped.items():
        console.print(f"\n{NAMES[pages]}: left out: {reason}", soft_wrap=True, highlight=False)


def curves(effort: Effort, rows: list[Row]) -> list[Curve]:
    """What was measured, and beside it one set of tables, which nobody can measure here."""
    shown = [
        Curve(f"{NAMES[pages]} (measured)", points)
        for pages in KINDS
        if (points := [(r.clients, r.grown) for r in rows if r.pages == pages and r.grown > 0])
    ]
    one = cost([Span(0, effort.size)], 1).shared
    return [
        *shown,
        Curve(
            "4 KiB pages, one set of tables (reckoned)",
            [(n, one) for n in effort.steps],
            dashed=True,
        ),
    ]


if __name__ == "__main__":
    main(prog_name="scripts/bench-pagetables")
