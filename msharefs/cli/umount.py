"""``mshare umount``."""

from __future__ import annotations

import errno
import os

import click

from msharefs.cli.command import define
from msharefs.cli.exits import Exit, Failure, status_of
from msharefs.cli.types import complete_mounts
from msharefs.client import mounts


@define(
    "umount",
    examples=("mshare umount /run/mshare",),
)
@click.argument("directory", metavar="DIR", shell_complete=complete_mounts)
@click.option("--lazy", is_flag=True, help="Take it out of sight now, even if it is in use.")
def command(directory: str, lazy: bool) -> None:
    """Unmount DIR; its server ends by itself.

    Programs that map a region keep the mount busy; --lazy leaves their memory to them.
    """
    from msharefs.service.mounts import MountError, unmount, users  # noqa: PLC0415 - heavy

    path = directory.rstrip("/") or "/"
    if path not in {mount.path for mount in mounts()}:
        path = os.path.abspath(path)  # noqa: PTH100 - resolving would ask a dead server
        if path not in {mount.path for mount in mounts()}:
            raise Failure(f"{directory}: is no mount of msharefs", Exit.NOT_FOUND)
    try:
        unmount(path, detach=lazy)
    except MountError as error:
        if error.errno == errno.EBUSY:
            who = ", ".join(users(path))
            held = f"in use by {who}" if who else "in use"
            raise Failure(f"{path} is {held}; end them, or use --lazy", Exit.BUSY) from error
        raise Failure(str(error), status_of(error)) from error
