"""``mshare create``."""

from __future__ import annotations

import os

import click

from msharefs.cli.command import define
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument, mode, size
from msharefs.client import Region


@define(
    "create",
    examples=(
        "mshare create pool --size 64M",
        "mshare create /run/mshare/shared --size 2G --mode 666",
    ),
)
@file_argument
@click.option("--size", "length", type=size, required=True, help="How large.")
@click.option(
    "--mode", "permissions", type=mode, default="600", show_default=True, help="As for chmod(1)."
)
def command(file: str, length: int, permissions: int) -> None:
    """Make a region that holds nothing yet."""
    region = resolve(file)
    with refusing_as("create", region), Region.create(region.path, length, 0o600):
        # Exactly this mode, whatever the umask: it was asked for in so many words.
        os.chmod(region.path, permissions)  # noqa: PTH101 - a string is at hand
