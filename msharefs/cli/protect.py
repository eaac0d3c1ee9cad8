"""``mshare protect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from msharefs.cli.command import define
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument, length_option, offset_option, prot
from msharefs.client import Region

if TYPE_CHECKING:
    from msharefs.abi import Prot


@define(
    "protect",
    examples=("mshare protect pool --offset 0 --length 1M --prot r--",),
)
@file_argument
@offset_option
@length_option
@click.option("--prot", "rights", type=prot, required=True, help="Such as rw-, r-- or none.")
def command(file: str, offset: int, length: int, rights: Prot) -> None:
    """Set the protection of a range for every process at once.

    Everything in the range must be mapped: else ENOMEM (exit status 4), and nothing has changed.
    A right that someone who has the region open or mapped does not have is refused: EBUSY.
    """
    region = resolve(file)
    with refusing_as("protect", region), Region.open(region.path) as opened:
        opened.protect(offset, length, rights)
