"""``mshare unmap``."""

from __future__ import annotations

from msharefs.cli.command import define
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument, length_option, offset_option
from msharefs.client import Region


@define(
    "unmap",
    examples=("mshare unmap pool --offset 4M --length 64K",),
)
@file_argument
@offset_option
@length_option
def command(file: str, offset: int, length: int) -> None:
    """Take a range out of a region and free its memory.

    The range may hold holes, and may begin and end within mappings.
    """
    region = resolve(file)
    with refusing_as("unmap", region), Region.open(region.path) as opened:
        opened.unmap(offset, length)
