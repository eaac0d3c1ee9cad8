"""``mshare objects``."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from msharefs.abi import Kind
from msharefs.cli.columns import HEX, SIZE, Column, Layout, help_rows, output_options
from msharefs.cli.command import define
from msharefs.cli.exits import failing_as
from msharefs.cli.query import PATH_HELP, device, kind, mappings
from msharefs.cli.targets import refusing_as, resolve_place
from msharefs.cli.types import complete_regions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from msharefs.client import Mapping, Mount, RegionFile


@attrs.frozen
class Row:
    """A part of a file in a region."""

    region: str
    mapping: Mapping


COLUMNS: Final[list[Column[Row]]] = [
    Column("REGION", "path of the region below the mount", lambda r: r.region),
    Column("START", "where it begins in the region", lambda r: r.mapping.start, HEX, right=True),
    Column(
        "END",
        "the first byte after it",
        lambda r: r.mapping.end,
        HEX,
        right=True,
        default=False,
    ),
    Column("SIZE", "its length", lambda r: r.mapping.size, SIZE, right=True),
    Column("PROT", "protection", lambda r: r.mapping.prot.text()),
    Column(
        "OBJOFFSET",
        "where it begins in the file",
        lambda r: r.mapping.object_offset,
        HEX,
        right=True,
    ),
    Column("MAJ:MIN", "device of the file", lambda r: device(r.mapping)),
    Column("INODE", "inode number of the file", lambda r: r.mapping.object_ino, right=True),
    Column(
        "KIND",
        "file, or shmem for a file in memory (tmpfs, memfd), which has no storage",
        lambda r: kind(r.mapping),
    ),
    Column("PATH", PATH_HELP, lambda r: r.mapping.object_path),
]


@define(
    "objects",
    tables={"Columns (* by default)": lambda: help_rows(COLUMNS)},
    examples=(
        "mshare objects",
        "mshare objects pool -o START,SIZE,PATH",
        "mshare objects --json | jq -r '.objects[].path' | sort -u",
    ),
)
@click.argument("file", metavar="[FILE|DIR]", required=False, shell_complete=complete_regions)
@output_options(COLUMNS)
def command(file: str | None, **options: Any) -> None:
    """Show the files that lie in regions.

    There is a line for each mapping of a file, in one region or in all of a mount or directory.
    Regions that you may not look into are left out. A file that has been deleted is marked so, as
    in /proc/PID/maps.
    """
    mount, below = resolve_place(file)
    place = mount.region(below)
    if below and not os.path.isdir(place.path):  # noqa: PTH112 - a string is at hand
        with refusing_as("objects", place):
            rows = list(_of_region(place))
    else:
        with failing_as(f"objects {file or mount.path}"):
            rows = list(_of_all(mount, below))
    Layout(**options).show(rows, "objects")


def _of_region(region: RegionFile) -> Iterator[Row]:
    for mapping in mappings(region):
        if mapping.kind is Kind.FILE:
            yield Row(region.name, mapping)


def _of_all(mount: Mount, directory: str) -> Iterator[Row]:
    for region in mount.regions(directory):
        with suppress(FileNotFoundError, PermissionError):  # removed meanwhile, or closed to us
            yield from _of_region(region)
