"""``mshare decide``."""

from __future__ import annotations

import json
from contextlib import suppress
from errno import ENOENT
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from msharefs.cli.command import define
from msharefs.cli.exits import Exit, Failure
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument

if TYPE_CHECKING:
    from msharefs.client import RegionFile


def complete_held(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """The numbers of what is held."""
    with suppress(OSError, Failure):
        return [
            CompletionItem(str(seq), help=about)
            for seq, about in held(resolve(ctx.params["file"])).items()
            if str(seq).startswith(incomplete)
        ]
    return []


def held(region: RegionFile) -> dict[int, str]:
    """What waits for a decision, from the region's events, as far as they are remembered."""
    found: dict[int, str] = {}
    with region.events(history=True) as stream:
        for event in map(json.loads, stream.lines(wait=False)):
            if event["event"] == "hold":
                found[event["seq"]] = f"{event['via']} at {event['offset']:#x} by {event['comm']}"
            elif event["event"] == "release":
                found.pop(event["hold"], None)
    return found


@define(
    "decide",
    examples=(
        "mshare decide pool 1234 allow",
        "mshare decide pool 1234 deny",
    ),
)
@file_argument
@click.argument("seq", type=click.IntRange(min=1), shell_complete=complete_held)
@click.argument("decision", type=click.Choice(["allow", "deny"]))
def command(file: str, seq: int, decision: str) -> None:
    """Let a held access go, or deny it.

    What is held is a matter of mshare notify --mode hold.
    SEQ is the number that mshare watch prints with it. Exit status 4 if nothing is held under that
    number any more.
    """
    region = resolve(file)
    with refusing_as("decide", region):
        try:
            region.decide(seq, allow=decision == "allow")
        except OSError as error:
            if error.errno == ENOENT and region.control.is_dir():
                message = f"decide {region.name}: nothing is held under number {seq}"
                raise Failure(message, Exit.NOTHING_THERE) from None
            raise
