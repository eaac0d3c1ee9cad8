"""``mshare rm``."""

from __future__ import annotations

import os

import click

from msharefs.cli.command import define
from msharefs.cli.exits import Failure
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import complete_regions
from msharefs.units import one_line


@define(
    "rm",
    examples=("mshare rm pool",),
)
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, shell_complete=complete_regions
)
def command(files: tuple[str, ...]) -> None:
    """Remove regions.

    The memory of one goes when its last user has gone: processes that have it open or mapped keep it for as long as they do. Of several, all that can
    be removed are removed; the exit status is that of the first one that cannot.
    """
    failed: list[Failure] = []
    for name in files:
        try:
            region = resolve(name)
            with refusing_as("rm", region):
                os.unlink(region.path)  # noqa: PTH108 - a string is at hand
        except Failure as failure:
            failed.append(failure)
    for earlier in failed[:-1]:
        click.echo(one_line(f"mshare: {earlier.format_message()}"), err=True)
    if failed:
        raise Failure(failed[-1].message, failed[0].status)
