"""``mshare query``."""

from __future__ import annotations

from errno import ENOENT
from typing import TYPE_CHECKING, Any, Final

import click

from msharefs.abi import Kind
from msharefs.cli.columns import HEX, SIZE, Column, Layout, help_rows, output_options
from msharefs.cli.command import define
from msharefs.cli.exits import Exit, Failure
from msharefs.cli.targets import open_region, refusing_as, resolve
from msharefs.cli.types import file_argument, size

if TYPE_CHECKING:
    from msharefs.client import Mapping, RegionFile

KIND_HELP: Final = (
    "anon (the region's memory), huge (memory that asks for huge pages), file, or shmem (a file in"
    " memory: tmpfs, memfd)"
)
PATH_HELP: Final = "path of a file object, as the server sees it now"


def kind(mapping: Mapping) -> str:
    if mapping.huge:
        return "huge"
    return "shmem" if mapping.object_shmem else mapping.kind.name.lower()


def device(mapping: Mapping) -> str | None:
    """As ``/proc/self/mountinfo`` writes it; None for memory."""
    if mapping.kind is Kind.ANON:
        return None
    major, minor = mapping.object_dev
    return f"{major}:{minor}"


COLUMNS: Final[list[Column[Mapping]]] = [
    Column("START", "where it begins in the region", lambda m: m.start, HEX, right=True),
    Column("END", "the first byte after it", lambda m: m.end, HEX, right=True),
    Column("SIZE", "its length", lambda m: m.size, SIZE, right=True),
    Column("PROT", "protection", lambda m: m.prot.text()),
    Column("KIND", KIND_HELP, kind),
    Column(
        "OBJOFFSET",
        "where its part begins in the object",
        lambda m: m.object_offset,
        HEX,
        right=True,
        default=False,
    ),
    Column(
        "MAJ:MIN",
        "device of a file object",
        device,
        default=False,
    ),
    Column(
        "INODE",
        "inode number of a file object",
        lambda m: m.object_ino or None,
        right=True,
        default=False,
    ),
    Column("PATH", PATH_HELP, lambda m: m.object_path),
]


@define(
    "query",
    tables={"Columns (* by default)": lambda: help_rows(COLUMNS)},
    examples=(
        "mshare query pool",
        "mshare query pool --offset 4M -o PROT --noheadings",
        "mshare query pool --json | jq '[.mappings[].size] | add'",
    ),
)
@file_argument
@click.option("--offset", type=size, help="Only the mapping that covers this offset.")
@output_options(COLUMNS)
def command(file: str, offset: int | None, **options: Any) -> None:
    """Show what is mapped in a region: all of it, or at one offset.

    With --offset, a hole there is exit status 4.
    """
    region = resolve(file)
    with refusing_as("query", region):
        found = mappings(region)
    if offset is not None:
        found = [mapping for mapping in found if mapping.start <= offset < mapping.end]
        if not found:
            message = f"query {region.name}: nothing is mapped at {offset:#x}"
            raise Failure(message, Exit.NOTHING_THERE)
    Layout(**options).show(found, "mappings")


def mappings(region: RegionFile) -> list[Mapping]:
    """From the control file, which asks for no right to what is inside; or by the ioctl."""
    try:
        return region.mappings()
    except OSError:
        try:
            with open_region(region, writable=False) as opened:
                return list(opened)
        except OSError as error:
            if error.errno == ENOENT:
                error.filename = region.path
            raise
