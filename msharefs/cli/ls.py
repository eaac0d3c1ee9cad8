"""``mshare ls``."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from msharefs.cli.columns import SIZE, Column, Layout, help_rows, output_options
from msharefs.cli.command import define
from msharefs.cli.exits import Exit, Failure, failing_as
from msharefs.cli.targets import resolve_place
from msharefs.cli.types import complete_mounts
from msharefs.client import union

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from msharefs.client import Mapping, Mount, RegionFile

_T = TypeVar("_T")


class Listed:
    """A row: a region, of which only what the columns ask for is read."""

    def __init__(self, region: RegionFile) -> None:
        self.region = region
        self.stat = region.stat()

    @cached_property
    def stats(self) -> dict[str, int]:
        """Empty if it may not be read."""
        with suppress(OSError):
            return self.region.stats()
        return {}

    @cached_property
    def mappings(self) -> list[Mapping] | None:
        with suppress(OSError):
            return self.region.mappings()
        return None

    @property
    def prot(self) -> str | None:
        return None if self.mappings is None else union(self.mappings).text()

    @property
    def clients(self) -> int | None:
        with suppress(OSError):
            return len(self.region.clients())
        return None


def _name_of(find: Callable[[int], _T], number: int, name: Callable[[_T], str]) -> str:
    try:
        return name(find(number))
    except KeyError:
        return str(number)


def _owner(row: Listed) -> str:
    return _name_of(pwd.getpwuid, row.stat.st_uid, lambda entry: entry.pw_name)


def _group(row: Listed) -> str:
    return _name_of(grp.getgrgid, row.stat.st_gid, lambda entry: entry.gr_name)


COLUMNS: Final[list[Column[Listed]]] = [
    Column("NAME", "path below the mount", lambda r: r.region.name),
    Column("SIZE", "size of the region", lambda r: r.stat.st_size, SIZE, right=True),
    Column("MAPPED", "how much of it is mapped", lambda r: r.stats.get("mapped"), SIZE, right=True),
    Column("USED", "memory in use", lambda r: r.stat.st_blocks * 512, SIZE, right=True),
    Column("PROT", "the union of all protections inside", lambda r: r.prot),
    Column("MAPPINGS", "number of mappings", lambda r: r.stats.get("mappings"), right=True),
    Column("MODE", "permissions", lambda r: stat.filemode(r.stat.st_mode)),
    Column("OWNER", "user that owns it", _owner),
    Column("GROUP", "group that owns it", _group, default=False),
    Column(
        "OPEN", "open descriptors", lambda r: r.stats.get("descriptors"), right=True, default=False
    ),
    Column("CLIENTS", "processes that map it", lambda r: r.clients, right=True, default=False),
    Column("LINKS", "number of names", lambda r: r.stat.st_nlink, right=True, default=False),
    Column("INODE", "inode number", lambda r: r.stat.st_ino, right=True, default=False),
    Column("PATH", "absolute path", lambda r: r.region.path, default=False),
]


@define(
    "ls",
    tables={"Columns (* by default)": lambda: help_rows(COLUMNS)},
    examples=(
        "mshare ls",
        "mshare ls /run/mshare -o NAME,USED,CLIENTS",
        "mshare ls --json | jq -r '.regions[].name'",
    ),
)
@click.argument("directory", metavar="[DIR]", required=False, shell_complete=complete_mounts)
@output_options(COLUMNS)
def command(directory: str | None, **options: Any) -> None:
    """List the regions of a mount, or of a directory on it.

    What you may not look into shows as - (null in JSON).
    """
    mount, below = resolve_place(directory)
    with failing_as(directory or mount.path):
        rows = list(_rows(mount, below))
    Layout(**options).show(rows, "regions")


def _rows(mount: Mount, below: str) -> Iterator[Listed]:
    place = mount.region(below)
    if below and not os.path.isdir(place.path):  # noqa: PTH112 - a string is at hand
        if not os.path.lexists(place.path):
            raise Failure(f"{below}: no such region or directory on {mount.path}", Exit.NOT_FOUND)
        yield Listed(place)
        return
    for region in mount.regions(below):
        with suppress(FileNotFoundError):  # removed meanwhile
            yield Listed(region)
