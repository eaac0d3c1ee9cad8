"""``mshare map``."""

from __future__ import annotations

import os
import stat

import click

from msharefs.abi import PAGE_SIZE, Prot
from msharefs.cli.command import define
from msharefs.cli.exits import failing_as
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument, offset_option, prot, size
from msharefs.client import Region


@define(
    "map",
    examples=(
        "mshare map pool --anon --offset 0 --length 16M --prot rw-",
        "mshare map pool /var/lib/table --offset 16M --prot r--",
    ),
)
@file_argument
@click.argument("object", metavar="[OBJECT]", required=False, type=click.Path())
@click.option("--anon", is_flag=True, help="Map memory instead of a file.")
@offset_option
@click.option(
    "--length",
    type=size,
    help="How much. Default: the rest of OBJECT in whole pages; with --anon, of the region.",
)
@click.option("--prot", "rights", type=prot, required=True, help="Such as rw-, r-- or none.")
@click.option("--object-offset", type=size, default="0", help="Where in OBJECT it begins.")
@click.option("--noreplace", is_flag=True, help="Fail if anything is mapped there already.")
def command(
    file: str,
    object: str | None,  # noqa: A002 - click names it after the argument
    anon: bool,
    offset: int,
    length: int | None,
    rights: Prot,
    object_offset: int,
    noreplace: bool,
) -> None:
    """Put memory, or OBJECT (a file), into a region.

    What was in that range before is replaced, unless --noreplace. OBJECT needs a mount whose
    features name file_objects (mshare info DIR).
    """
    if anon == (object is not None):
        raise click.UsageError("give either OBJECT or --anon")
    if anon and object_offset:
        raise click.UsageError("--object-offset is for OBJECT, not for --anon")
    region = resolve(file)
    if length is None and object is not None:
        with failing_as(f"map {region.name}: {object}"):
            length = _rest_of_object(object, object_offset)
    with refusing_as("map", region), Region.open(region.path) as opened:
        opened.map(
            offset,
            _whole_pages(opened.size - offset) if length is None else length,
            rights,
            object=object,
            object_offset=object_offset,
            replace=not noreplace,
        )


def _rest_of_object(path: str, offset: int) -> int:
    """In whole pages; a page for what has no size, so that the server says what is wrong with it."""
    found = os.stat(path)  # noqa: PTH116 - a string is at hand
    if not stat.S_ISREG(found.st_mode):
        return PAGE_SIZE
    rest = found.st_size - offset
    if rest <= 0:
        raise click.UsageError(f"{path} has {found.st_size} bytes: nothing is left at {offset}")
    return _whole_pages(rest)


def _whole_pages(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE
