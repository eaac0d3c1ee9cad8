"""From FILE as typed to the region, and the reasons behind an errno.

A name with a slash is a path. One without is a name on the mount that the working directory is
on, or else on the only mount. (``ls`` prints the names of regions in directories with a slash:
such a relative path, if it is on no mount, is looked up on the only mount too.)
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from msharefs.abi import Prot
from msharefs.cli.exits import Exit, Failure, describe, status_of
from msharefs.client import (
    NotAMount,
    Region,
    RegionFile,
    connect,
    events,
    locate,
    union,
)
from msharefs.units import errno_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from msharefs.client import Mount

_NO_ROOM = "a process that maps the region can have no more mappings (sysctl vm.max_map_count)"


def resolve(name: str) -> RegionFile:
    """The region that FILE means, existing or not. Raises Failure."""
    try:
        mount, below = _place(name)
    except OSError as error:
        about = f"{error.filename}: " if error.filename else ""
        raise Failure(f"{name}: {about}{describe(error)}", status_of(error)) from error
    if not below:
        raise Failure(f"{name}: is the mount itself, not a region", Exit.USAGE)
    return mount.region(below)


def resolve_place(name: str | None) -> tuple[Mount, str]:
    """A mount, and a directory or region on it ("" for its root). None: the only mount."""
    try:
        return (connect(), "") if name is None else _place(name)
    except OSError as error:
        about = f"{name}: " if name else ""
        raise Failure(f"{about}{describe(error)}", status_of(error)) from error


def _place(name: str) -> tuple[Mount, str]:
    try:
        return locate(name)
    except NotAMount:
        if name.startswith((".", "/")):
            error = NotAMount(errno.ENOENT, "is not on a mount of msharefs")
            raise error from None
        return connect(), os.path.normpath(name)


def open_region(file: RegionFile, *, writable: bool) -> Region:
    """Open it; to read, with as many rights as the region's contents ask for.

    A region that holds rw- can only be opened O_RDWR, by whatever looks into it as well.
    """
    if os.path.isdir(file.path):  # noqa: PTH112 - which can be opened for reading
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), file.path)
    with suppress(OSError):  # it may not be readable, and still be writable
        writable = writable or bool(union(file.mappings()) & Prot.WRITE)
    try:
        return Region.open(file.path, writable=writable)
    except PermissionError:
        if writable:
            raise
        return Region.open(file.path, writable=True)


@contextmanager
def refusing_as(what: str, file: RegionFile) -> Iterator[None]:
    """An OSError inside becomes ``WHAT NAME: ERRNO: why``, with the reason the server gave."""
    try:
        yield
    except OSError as error:
        reason = refusal(file, error)
        status = status_of(error)
        if error.errno == errno.ENOENT and error.filename == file.path:
            reason = f"no such region on {file.mount.path}"
        elif what == "protect" and error.errno == errno.ENOMEM:
            status = Exit.NOTHING_THERE
        elif what in {"map", "unmap"} and error.errno == errno.ENOMEM:
            reason = reason or _NO_ROOM
        about = file.name or file.mount.path
        raise Failure(f"{what} {about}: {describe(error, reason)}", status) from error


def refusal(file: RegionFile, error: OSError) -> str | None:
    """Why the server refused this process just now, from the region's events."""
    found = None
    if error.errno in {errno.ENOENT, errno.ENOTCONN}:
        return None
    with suppress(OSError), events(file.control / "events", history=True) as stream:
        for event in map(json.loads, stream.lines(wait=False)):
            if event["event"] == "refuse" and event["pid"] == os.getpid():
                found = event
    if found is None or found.get("error") != errno_name(error.errno or 0):
        return None
    return str(found["reason"])
