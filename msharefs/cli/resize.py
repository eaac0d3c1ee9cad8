"""``mshare resize``."""

from __future__ import annotations

import os

import click

from msharefs.cli.command import define
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument, size


@define(
    "resize",
    examples=("mshare resize pool 128M",),
)
@file_argument
@click.argument("size", type=size)
def command(file: str, size: int) -> None:
    """Set the size of a region.

    What lies behind the new end is unmapped and its memory freed.
    """
    region = resolve(file)
    with refusing_as("resize", region):
        os.truncate(region.path, size)
