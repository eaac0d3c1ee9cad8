"""The command line of scripts/bench: what is measured, how often, and how it is shown."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import calls
import click
import enforce
import memory
import objects
import postgresql
import table
from mounts import BenchError, check_possible, machine
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from samples import Spread

PARTS = ("table", "memory", "calls")
ASKED_FOR = ("enforce", "objects", "postgresql")
"""Takes minutes, and 300 processes, a file of 2 GiB or a database: never measured unless asked for by name."""
NEEDS_A_MOUNT = ("memory", "calls", "enforce", "objects", "postgresql")
IN_SEVERAL = ("enforce", "objects")
"""Measured into an object of several lists of rows."""


@attrs.frozen
class Effort:
    """How much is measured. Sizes in bytes."""

    table_rounds: int
    memory_size: int
    memory_rounds: int
    call_rounds: int
    call_count: int
    query_scale: int
    query_rounds: int
    query_seconds: int


FULL = Effort(5_000, 64 << 20, 20, 20, 200, 10, 10, 3)
QUICK = Effort(200, 4 << 20, 4, 2, 40, 1, 2, 1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", type=click.Choice(PARTS + ASKED_FOR), help="Measure this part alone.")
@click.option("--quick", is_flag=True, help="Few samples: seconds in all, and rough.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def main(*, only: str | None, quick: bool, as_json: bool) -> None:
    """Measure what a region costs, beside what it is compared with.

    \b
      table   operations on the mapping table at 10, 1,000 and 100,000 mappings
      memory  first touch and bandwidth through a region, against a plain memfd
      calls   ioctls, stat and open+close, against a plain pyfuse3 filesystem
      enforce PROTECT in 300 processes, adoption, and watched stores (with --only alone: minutes)
      objects a file of 2 GiB in a region: laid there with 1 and 100 clients, and used
              (with --only alone: minutes, 2 GiB of disk and of memory)
      postgresql  its dynamic shared memory on automap mounts, against the same on /dev/shm
              (with --only alone: minutes)

    Every figure comes as median, 99th percentile and minimum; ratios are of medians. memory and
    calls mount filesystems of their own, need root, and are left out (with the reason) where that
    cannot be done, unless asked for by --only.
    """  # noqa: D301 (click's mark for a paragraph that is not to be wrapped)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: what was mounted goes
    wanted = PARTS if only is None else (only,)
    skipped: dict[str, str] = {}
    try:
        check_possible()
    except BenchError as error:
        if only in NEEDS_A_MOUNT:
            raise click.ClickException(str(error)) from None
        skipped = dict.fromkeys((part for part in wanted if part in NEEDS_A_MOUNT), str(error))
    try:
        measured = _measure([part for part in wanted if part not in skipped], quick=quick)
    except BenchError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        result: dict[str, Any] = {"machine": machine(), "quick": quick, "skipped": skipped}
        for part, rows in measured.items():
            result[part] = rows.as_json() if part in IN_SEVERAL else [row.as_json() for row in rows]
        print(json.dumps(result, indent=2))
    else:
        # Into a file or a pipe a table is as wide as it needs to be.
        width = None if sys.stdout.isatty() else 120
        _show(Console(width=width), measured, skipped, quick=quick)


def _measure(parts: list[str], *, quick: bool) -> dict[str, Any]:
    effort = QUICK if quick else FULL
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="msharefs-bench.") as name:
        scratch = Path(name)
        for part in parts:
            if part == "table":
                with _progress("table", len(table.COUNTS) * effort.table_rounds) as advance:
                    measured[part] = table.measure(effort.table_rounds, advance)
            elif part == "memory":
                with _progress("memory", effort.memory_rounds) as advance:
                    measured[part] = memory.measure(
                        scratch, effort.memory_size, effort.memory_rounds, advance
                    )
            elif part == "enforce":
                chosen = enforce.QUICK if quick else enforce.FULL
                with _progress("enforce", chosen.steps) as advance:
                    measured[part] = enforce.measure(scratch, chosen, advance)
            elif part == "objects":
                size = objects.QUICK if quick else objects.FULL
                with _progress("objects", size.steps) as advance:
                    measured[part] = objects.measure(scratch, size, advance)
            elif part == "postgresql":
                rounds = effort.query_rounds
                with _progress("postgresql", rounds * len(postgresql.KINDS)) as advance:
                    measured[part] = postgresql.measure(
                        scratch, effort.query_scale, rounds, effort.query_seconds, advance
                    )
            else:
                with _progress("calls", effort.call_rounds * len(calls.PLACES)) as advance:
                    measured[part] = calls.measure(
                        scratch, effort.call_rounds, effort.call_count, advance
                    )
    return measured


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; gone when the part is measured."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda steps: progress.advance(task, steps)


# -- tables


def _show(
    console: Console, measured: dict[str, Any], skipped: dict[str, str], *, quick: bool
) -> None:
    here = machine()
    console.print(
        f"{here['cpu']}, {here['cpus']} CPUs, Linux {here['kernel']}, Python {here['python']},"
        f" load {here['load']}{', quick: rough figures' if quick else ''}",
        soft_wrap=True,
        highlight=False,
    )
    show = {
        "table": _table_of_operations,
        "memory": _table_of_memory,
        "calls": _table_of_calls,
        "postgresql": _table_of_queries,
    }
    several = {"enforce": _tables_of_enforcement, "objects": _tables_of_objects}
    for part, rows in measured.items():
        tables = several[part](rows) if part in several else [show[part](rows)]
        for shown in tables:
            console.print()
            console.print(shown)
    for part, reason in skipped.items():
        console.print(f"\n{part}: left out: {reason}", soft_wrap=True, highlight=False)


def _new_table(title: str, caption: str, *columns: str) -> Table:
    shown = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=SIMPLE,
        padding=(0, 1),
        pad_edge=False,
    )
    shown.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        shown.add_column(column, justify="right", no_wrap=True)
    return shown


def _three(spread: Spread, digits: int = 1) -> str:
    return "  ".join(f"{value:.{digits}f}" for value in (spread.p50, spread.p99, spread.min))


def _table_of_operations(rows: list[table.TableRow]) -> Table:
    shown = _new_table(
        "Table: µs an operation at so many mappings (p50  p99  min)",
        "ratio: p50 at the most mappings to p50 at the fewest",
        "operation",
        *(f"{count:,}" for count in table.COUNTS),
        "ratio",
    )
    for row in rows:
        shown.add_row(row.operation, *map(_three, row.spreads), f"{row.growth:.2f}")
    return shown


def _table_of_memory(rows: list[memory.MemoryRow]) -> Table:
    shown = _new_table(
        "Memory: a region against a memfd (p50  p99  min)",
        "ratio: region to memfd in speed, median of the pairs; aim: 0.97 to 1.03",
        "access",
        "unit",
        "region",
        "memfd",
        "ratio",
    )
    for row in rows:
        digits = 0 if row.unit == "ns/page" else 2
        shown.add_row(
            memory.KINDS[row.kind],
            row.unit,
            _three(row.region, digits),
            _three(row.memfd, digits),
            f"{row.ratios.p50:.3f}",
        )
    return shown


def _table_of_calls(rows: list[calls.CallRow]) -> Table:
    shown = _new_table(
        "Calls: µs each (p50  p99  min), one client",
        "ratio: msharefs to plain pyfuse3, which has no ioctl; aim: PROTECT under 15 µs",
        "call",
        "on",
        "msharefs",
        "plain pyfuse3",
        "ratio",
    )
    for row in rows:
        shown.add_row(
            calls.CALLS[row.call],
            row.place,
            _three(row.region),
            "" if row.plain is None else _three(row.plain),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            end_section=row.call == list(calls.CALLS)[-1],
        )
    return shown


def _tables_of_enforcement(measured: enforce.Measured) -> list[Table]:
    return [
        _table_of_protect(measured.protect),
        _table_of_adoption(measured.adopt),
        _table_of_memory(measured.memory),
        _table_of_faults(measured.fault),
        _table_of_rates(measured.rate),
    ]


def _table_of_protect(rows: list[enforce.ProtectRow]) -> Table:
    shown = _new_table(
        f"PROTECT in {rows[0].clients} processes: ms (p50  p99  min)",
        "peer: each is told by signal, calls mprotect() and confirms; ratio: median of the pairs;"
        " aim: 1.0 with small pages, 0.5 with huge ones\n"
        "tables: growth of page tables in kB a process, region and peer",
        "way",
        "range",
        "region",
        "peer",
        "ratio",
        "restored",
        "by peer",
        "tables",
    )
    for row in rows:
        shown.add_row(
            row.way,
            f"{row.size >> 20} MiB {row.pages}",
            *(_three(spread.divided(1000), 2) for spread in (row.region, row.peer)),
            f"{row.ratio:.2f}",
            *(f"{spread.p50 / 1000:.2f}" for spread in (row.restore, row.restore_peer)),
            f"{row.tables:+.0f}  {row.tables_peer:+.0f}",
        )
    return shown


def _table_of_adoption(rows: list[enforce.AdoptRow]) -> Table:
    shown = _new_table(
        "Becoming a client: µs (p50  p99  min), a new process each time",
        "plain: the same on a file of the scratch directory",
        "first call",
        *(f"gate={gate}" for gate in enforce.GATES),
        "plain",
    )
    for row in rows:
        spreads = [*row.gates.values(), row.plain]
        shown.add_row(enforce.CALLS[row.call], *map(_three, spreads))
    return shown


def _table_of_faults(rows: list[enforce.FaultRow]) -> Table:
    shown = _new_table(
        "A watched store, mode log: µs (p50  p99  min)",
        "aim: p50 under 150 µs until its line is read",
        "until",
        "taken",
    )
    names = {
        "store": "the store is done",
        "line": "a reader has its line",
        "plain": "of many, each: not watched",
        "caught": "of many, each: watched",
        "scanned": "of many, each: with --scan",
    }
    for row in rows:
        shown.add_row(f"{names[row.until]:30}", _three(row.spread))
    return shown


def _table_of_rates(rows: list[enforce.RateRow]) -> Table:
    shown = _new_table(
        "Many such stores, by 8 threads at fixed times",
        "aim: as many a second as asked for, and none lost",
        "stores",
        "asked for a second",
        "reached",
        "reported",
        "lost",
    )
    for row in rows:
        numbers = (row.stores, row.rate, round(row.reached), row.reported, row.lost)
        shown.add_row(*(f"{number:,}" for number in numbers))
    return shown


def _tables_of_objects(measured: objects.Measured) -> list[Table]:
    created = _new_table(
        "A file laid into a region: ms (p50  p99  min), and µs of the first load after it",
        "plain: the first load after an mmap(2) of the file;"
        " aim: the ioctl takes as long for any size",
        "file",
        "clients",
        "CREATE_MAPPING",
        "UNMAP",
        "load",
        "plain",
    )
    for row in measured.create:
        created.add_row(
            f"{row.size >> 20} MiB, {row.place}",
            str(row.clients),
            *(_three(row.spreads[call].divided(1000), 2) for call in ("create", "unmap")),
            *(f"{row.spreads[call].p50:.1f}" for call in ("first", "plain")),
        )
    used = _new_table(
        "A file in a region against a plain mapping of it: ms a pass (p50  p99  min)",
        "ratio: region to plain in speed, median of the pairs; aim: 1.00 within noise",
        "access",
        "file",
        "region",
        "plain",
        "ratio",
    )
    for access in measured.access:
        used.add_row(
            objects.KINDS[access.kind],
            access.place,
            _three(access.region),
            _three(access.plain),
            f"{access.ratios.p50:.3f}",
            end_section=access.kind == list(objects.KINDS)[-1],
        )
    return [created, used]


def _table_of_queries(rows: list[postgresql.QueryRow]) -> Table:
    shown = _new_table(
        "PostgreSQL: queries a second by where its dynamic shared memory lies (p50  p99  min)",
        "ratio: to tmpfs, median of the rounds; aim: 0.97 or more",
        "query",
        "its memory lies on",
        "queries",
        "ratio",
    )
    for row in rows:
        for side, spread in row.rates.items():
            ratio = f"{row.ratios[side].p50:.3f}" if side in row.ratios else ""
            where = postgresql.OPTIONS.get(side, side)
            last = side == postgresql.SIDES[-1]
            shown.add_row(
                postgresql.KINDS[row.kind], where, _three(spread), ratio, end_section=last
            )
    return shown


if __name__ == "__main__":
    main(prog_name="scripts/bench")
