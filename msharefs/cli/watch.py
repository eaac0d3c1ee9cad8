"""``mshare watch``."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from msharefs.cli.command import define
from msharefs.cli.exits import Exit, failing_as
from msharefs.cli.targets import resolve_place
from msharefs.cli.types import complete_regions
from msharefs.units import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

_COMMON = {"seq", "time", "region", "event", "offset", "length", "pid", "tid", "comm", "via"}
_ACCESSES = {"fault", "deny", "hold", "release"}


@define(
    "watch",
    examples=(
        "mshare watch pool",
        "mshare watch /run/mshare --json --history",
        "mshare watch pool --count 1 --timeout 10",
    ),
)
@click.argument("file", metavar="FILE|DIR", shell_complete=complete_regions)
@click.option("--json", "as_json", is_flag=True, help="Print the events as they are, one a line.")
@click.option("--count", metavar="N", type=click.IntRange(min=1), help="End after so many events.")
@click.option(
    "--timeout", metavar="SECONDS", type=click.FloatRange(min=0), help="End after so many seconds."
)
@click.option("--history", is_flag=True, help="Begin with what the server still remembers.")
@click.pass_context
def command(
    ctx: click.Context,
    file: str,
    as_json: bool,
    count: int | None,
    timeout: float | None,
    history: bool,
) -> None:
    """Follow what happens to a region, or to all of a mount.

    Ends at --count or --timeout, or by Ctrl-C. Exit status 4 if it ends before --count events came.
    Of a directory, the events of the regions in it and below; for the mount's owner only.
    """
    mount, below = resolve_place(file)
    region = mount.region(below)
    whole = not below or os.path.isdir(region.path)  # noqa: PTH112 - a string is at hand
    source: Any = mount if whole else region
    seen = 0
    # Ctrl-C is how one ends watching.
    with (
        suppress(KeyboardInterrupt),
        failing_as(f"watch {file}"),
        source.events(timeout=timeout, history=history) as stream,
    ):
        for line in stream.lines():
            event = json.loads(line)
            if whole and below and not event.get("region", f"{below}/").startswith(f"{below}/"):
                continue
            click.echo(line.decode().rstrip("\n") if as_json else _text(event))
            seen += 1
            if seen == count:
                return
    if count is not None:
        ctx.exit(int(Exit.NOTHING_THERE))


def _text(event: Mapping[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    stamp = f"{clock}.{int(event['time'] % 1 * 1e6):06d}"
    kind = event["event"]
    if kind == "overflow":
        return f"{stamp} overflow: {event['lost']} events were lost, this reader is too slow"
    where = f"{event['offset']:#x}+{event['length']:#x} " if event["length"] else ""
    if kind in _ACCESSES:  # where a load or store begins is known, not how long it is
        where = f"{event['offset']:#x} " if event["length"] == 1 else where
        where = f"{event['via']} at {where}"
    if kind == "hold":  # whoever reads it has to answer with it
        where = f"{event['seq']} {where}"
    more = " ".join(f"{key}={value}" for key, value in event.items() if key not in _COMMON)
    who = f"{event['comm']}({event['pid']})"
    return one_line(f"{stamp} {event['region']} {kind} {where}{more} by {who}".replace("  ", " "))
