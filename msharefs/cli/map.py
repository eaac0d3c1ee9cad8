"""``mshare map``."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from msharefs.abi import PAGE_SIZE, Prot
from msharefs.cli.command import define
from msharefs.cli.exits import Failure, describe, failing_as, status_of
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument, offset_option, prot, size
from msharefs.client import Region, open_object

if TYPE_CHECKING:
    from collections.abc import Iterator

    from msharefs.client import RegionFile

_HINTS: Final = {
    errno.EACCES: "you may not open it with the access that {prot} needs",
    errno.EROFS: "it lies on a read-only filesystem: {prot} needs to write it (--prot r-- does not)",
    errno.ETXTBSY: "it is a program that runs: {prot} needs to write it (--prot r-- does not)",
    errno.EISDIR: "it is a directory: only regular files can be mapped",
    errno.ENXIO: "it is a socket, or a device that is not there: only regular files can be mapped",
}
"""What helps if OBJECT cannot be opened."""


@define(
    "map",
    examples=(
        "mshare map pool --anon --offset 0 --length 16M --prot rw-",
        "mshare map pool --anon --offset 16M --length 64M --prot rw- --huge",
        "mshare map pool /var/lib/table --offset 16M --prot r--",
        "mshare map pool a.db --offset 32M --length 4M --object-offset 1M --prot rw-",
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
@click.option(
    "--huge", is_flag=True, help="With --anon: by huge pages. The mount needs -o huge=advise."
)
@click.option("--noreplace", is_flag=True, help="Fail if anything is mapped there already.")
def command(
    file: str,
    object: str | None,  # noqa: A002 - click names it after the argument
    anon: bool,
    offset: int,
    length: int | None,
    rights: Prot,
    object_offset: int,
    huge: bool,
    noreplace: bool,
) -> None:
    """Put memory, or OBJECT (a file), into a region.

    What was in that range before is replaced, unless --noreplace.

    OBJECT is shared, not copied: every process that maps the region sees the file itself, and what
    it stores there is in the file. It is opened for reading, and for writing if --prot has w.
    Regular files of any filesystem can be mapped, on a mount with a gate; whoever may use the
    region needs no right to the file.
    """
    if anon == (object is not None):
        raise click.UsageError("give either OBJECT or --anon")
    if huge and not anon:
        raise click.UsageError("--huge is for --anon, not for OBJECT")
    if anon and object_offset:
        raise click.UsageError("--object-offset is for OBJECT, not for --anon")
    region = resolve(file)
    with refusing_as("map", region), Region.open(region.path) as opened:
        if object is None:
            length = _whole_pages(opened.size - offset) if length is None else length
            opened.map(offset, length, rights, replace=not noreplace, huge=huge)
            return
        with _opened(region, object, rights) as fd:
            if length is None:
                length = _rest(region, object, fd, object_offset)
                _check_room(region, opened.size, offset, length)
            opened.map(
                offset, length, rights, fd=fd, object_offset=object_offset, replace=not noreplace
            )


@contextmanager
def _opened(region: RegionFile, path: str, rights: Prot) -> Iterator[int]:
    try:
        fd = open_object(path, rights)
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "").format(prot=f"--prot {rights.text()}")
        reason = describe(error, hint or os.strerror(error.errno or 0))
        raise Failure(f"map {region.name}: {path}: {reason}", status_of(error)) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _rest(region: RegionFile, path: str, fd: int, offset: int) -> int:
    """In whole pages; a page for what has no size, so that the server says what is wrong with it."""
    with failing_as(f"map {region.name}: {path}"):
        found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        return PAGE_SIZE
    rest = found.st_size - offset
    if rest <= 0:
        where = f"nothing is left at {offset}" if offset else "there is nothing to map"
        raise Failure(f"map {region.name}: {path} has {found.st_size} bytes: {where}")
    return _whole_pages(rest)


def _check_room(region: RegionFile, size: int, offset: int, length: int) -> None:
    """Nobody has said how much is wanted, so a range that does not fit is not theirs."""
    room = _whole_pages(size) - offset
    if length > room >= 0:
        raise Failure(
            f"map {region.name}: {length} bytes do not fit at {offset} of {size}:"
            " give a --length, or make room (mshare resize)"
        )


def _whole_pages(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE
