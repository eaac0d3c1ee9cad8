"""How a command ends: the exit codes, and one line for each way to fail.

The table is the one definition: the code, ``mshare --help`` and the man page have it from here.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import click

from msharefs.client import NotAMount, SeveralMounts
from msharefs.units import errno_name

if TYPE_CHECKING:
    from collections.abc import Iterator


class Exit(IntEnum):
    """The status of a command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    NOTHING_THERE = 4
    PERMISSION = 5
    BUSY = 6


EXIT_CODES: Final[dict[Exit, str]] = {
    Exit.OK: "it is done",
    Exit.FAILED: "the system refused; the message has the errno (check: a mount would not work)",
    Exit.USAGE: "wrong usage: an unknown option, a size or protection that is none",
    Exit.NOT_FOUND: "no such region, or no such mount (ENOENT, ENOTCONN)",
    Exit.NOTHING_THERE: (
        "nothing is mapped there (query, protect), or watch ended before --count events came"
    ),
    Exit.PERMISSION: "not permitted (EACCES, EPERM, EROFS)",
    Exit.BUSY: "in use, or in the way (EBUSY, EEXIST)",
}

_EXIT_OF_ERRNO: Final = {
    errno.ENOENT: Exit.NOT_FOUND,
    errno.ENOTCONN: Exit.NOT_FOUND,
    errno.ENOTUNIQ: Exit.NOT_FOUND,
    errno.EACCES: Exit.PERMISSION,
    errno.EPERM: Exit.PERMISSION,
    errno.EROFS: Exit.PERMISSION,
    errno.EBUSY: Exit.BUSY,
    errno.EEXIST: Exit.BUSY,
}

HINTS: Final[dict[int, str]] = {
    errno.ENOTCONN: "the server has ended: umount it (mshare umount --lazy) and mount again",
    errno.ECONNABORTED: "the server ended meanwhile: umount it and mount again",
    errno.ENOTTY: "it is no region, or there is no such command",
    errno.EINVAL: "offsets and sizes are multiples of 4096 within the region, which needs a size",
    errno.EBUSY: "a process has the region open or mapped with fewer rights than that",
    errno.ENOMEM: "a part of the range is not mapped (mshare query shows what is)",
    errno.ENOSPC: "the mount is full: see size= in its options, and mshare ls",
    errno.EOPNOTSUPP: "this mount cannot do it (mshare info DIR lists its features)",
    errno.EMFILE: "a process that maps the region has no descriptor free (ulimit -n)",
    errno.EIO: "the server failed to do it: its log has the reason",
    errno.EACCES: "the mode or the access given does not include every right needed",
    errno.EPERM: "it needs root",
    errno.EISDIR: "it is a directory",
    errno.EEXIST: "something is there already",
}
"""What helps, where the server has not said it better."""


class Failure(click.ClickException):
    """One line for standard error, and the status."""

    def __init__(self, message: str, status: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.status = status
        setattr(self, "exit_code", int(status))  # noqa: B010 - typed as the class's, not ours


def describe(error: OSError, reason: str | None = None) -> str:
    """``EBUSY: why``: the server's reason, what usually helps, or what the system calls it."""
    code = error.errno or 0
    if isinstance(error, NotAMount | SeveralMounts):
        return str(error.strerror)
    known = error.strerror if code and error.strerror != os.strerror(code) else None
    why = reason or known or HINTS.get(code) or error.strerror or str(error)
    return f"{errno_name(code)}: {why}"


def status_of(error: OSError) -> Exit:
    return _EXIT_OF_ERRNO.get(error.errno or 0, Exit.FAILED)


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """An OSError inside becomes ``mshare: WHAT: ERRNO: why`` and its exit code."""
    try:
        yield
    except OSError as error:
        raise Failure(f"{what}: {describe(error)}", status_of(error)) from error


def exit_rows() -> list[tuple[str, str]]:
    """The exit codes for ``--help`` and the manual page."""
    return [(str(int(code)), meaning) for code, meaning in EXIT_CODES.items()]
