"""``mshare clients``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msharefs.cli.columns import HEX, SIZE, Column, Layout, help_rows, output_options
from msharefs.cli.command import define
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument

if TYPE_CHECKING:
    from msharefs.client import ClientMapping

COLUMNS: Final[list[Column[ClientMapping]]] = [
    Column("PID", "process", lambda c: c.pid, right=True),
    Column("COMM", "name of its program", lambda c: c.comm),
    Column("OFFSET", "where in the region its mapping begins", lambda c: c.offset, HEX, right=True),
    Column(
        "SIZE", "how much of the region it maps there", lambda c: c.end - c.start, SIZE, right=True
    ),
    Column("PROT", "what its mapping allows, as the system sees it", lambda c: c.prot.text()),
    Column(
        "STATE",
        "replica (the mapping is what the region's table says), fault (some of it is enforced by"
        " faults), unenforced",
        lambda c: c.state,
    ),
    Column("WHY", "why it is unenforced", lambda c: c.why or None),
    Column("START", "address of the mapping", lambda c: c.start, HEX, right=True, default=False),
    Column("END", "the first address after it", lambda c: c.end, HEX, right=True, default=False),
    Column(
        "ARMED",
        "ranges that are caught in the process",
        lambda c: c.armed,
        right=True,
        default=False,
    ),
    Column("FAULTS", "accesses that were caught", lambda c: c.faults, right=True, default=False),
]


@define(
    "clients",
    tables={"Columns (* by default)": lambda: help_rows(COLUMNS)},
    examples=(
        "mshare clients pool",
        "mshare clients pool -o PID,STATE,WHY --noheadings",
        "mshare clients pool --json | jq '.clients[] | select(.state == \"unenforced\")'",
    ),
)
@file_argument
@output_options(COLUMNS)
def command(file: str, **options: Any) -> None:
    """Show who maps a region, and whether they obey it.

    There is a line for each mapping of each process.
    """
    region = resolve(file)
    with refusing_as("clients", region):
        found = region.client_mappings()
    Layout(**options).show(found, "clients")
