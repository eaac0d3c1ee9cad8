"""``mshare stat``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msharefs.cli.columns import SIZE, Column, Layout, help_rows, output_options
from msharefs.cli.command import define
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument
from msharefs.footprint import footprints

if TYPE_CHECKING:
    from msharefs.footprint import Footprint
    from msharefs.pagetables import Tables


def _of_tables(client: Footprint, part: str) -> int | None:
    tables: Tables | None = client.tables
    return None if tables is None else int(getattr(tables, part))


COLUMNS: Final[list[Column[Footprint]]] = [
    Column("PID", "process", lambda c: c.pid, right=True),
    Column("COMM", "name of its program", lambda c: c.comm),
    Column("SIZE", "how much of the region it maps", lambda c: c.mapped, SIZE, right=True),
    Column(
        "PRESENT",
        "how much of that is in its page tables (measured: pagemap)",
        lambda c: c.present,
        SIZE,
        right=True,
    ),
    Column(
        "PMD",
        "how much of that is mapped by huge pages, by PMD (measured: pagemap)",
        lambda c: c.huge,
        SIZE,
        right=True,
    ),
    Column(
        "TABLES",
        "its page tables for the region alone (derived from what is present)",
        lambda c: _of_tables(c, "size"),
        SIZE,
        right=True,
    ),
    Column(
        "VMPTE",
        "its page tables for all that it maps (measured: VmPTE of /proc/PID/status)",
        lambda c: c.vmpte,
        SIZE,
        right=True,
    ),
    Column(
        "MAPPINGS",
        "number of its mappings of the region",
        lambda c: c.mappings,
        right=True,
        default=False,
    ),
    Column(
        "PTES",
        "number of its tables of PTEs for the region (derived)",
        lambda c: _of_tables(c, "pte"),
        right=True,
        default=False,
    ),
    Column(
        "PMDS",
        "number of its tables of PMDs for the region (derived)",
        lambda c: _of_tables(c, "pmd"),
        right=True,
        default=False,
    ),
    Column(
        "PUDS",
        "number of its tables of PUDs for the region (derived)",
        lambda c: _of_tables(c, "pud"),
        right=True,
        default=False,
    ),
]


@define(
    "stat",
    tables={"Columns (* by default)": lambda: help_rows(COLUMNS)},
    examples=(
        "mshare stat pool",
        "mshare stat pool -o PID,PMD,VMPTE --noheadings",
        "mshare stat pool --json | jq '[.clients[].tables] | add'",
    ),
)
@file_argument
@output_options(COLUMNS)
def command(file: str, **options: Any) -> None:
    """Show what a region costs each client: huge pages, page tables.

    There is a line for each process that maps the region. What you may not look into, or what
    this kernel does not tell (PAGEMAP_SCAN, Linux 6.7), shows as - (null in JSON).
    """
    region = resolve(file)
    with refusing_as("stat", region):
        region.stat()  # says best if there is none
        rows = list(footprints(region.client_mappings()))
    Layout(**options).show(rows, "clients")
