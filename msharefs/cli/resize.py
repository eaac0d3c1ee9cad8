"""``mshare resize``."""

from __future__ import annotations

import os

import click

from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument, size


@click.command("resize")
@file_argument
@click.argument("size", type=size)
def command(file: str, size: int) -> None:
    r"""Set the size of a region; what lies behind the new end is unmapped.

    \b
    Example:
      mshare resize pool 128M
    """
    region = resolve(file)
    with refusing_as("resize", region):
        os.truncate(region.path, size)
