"""``mshare sync``."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from msharefs.cli.command import define
from msharefs.cli.targets import open_region, refusing_as, resolve
from msharefs.cli.types import file_argument, size

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE: Final = 1.0
"""Seconds before somebody at a terminal is told that there is something to wait for."""


@define(
    "sync",
    examples=(
        "mshare sync pool",
        "mshare sync pool --offset 16M --length 1M",
    ),
)
@file_argument
@click.option(
    "--offset", type=size, default="0", help="Where in the region it begins (default: 0)."
)
@click.option("--length", type=size, help="How much (default: to the end of the region).")
def command(file: str, offset: int, length: int | None) -> None:
    """Write the file objects of a region to their storage.

    As fsync(2) of each file that lies in the range and may be written through the region; all are
    tried, and the error is that of the first one that failed. Memory has no storage. Without
    --offset and --length it is the whole region.
    """
    region = resolve(file)
    with (
        refusing_as("sync", region),
        open_region(region, writable=False) as opened,
        _waiting(f"writing the files in {region.name} to storage"),
    ):
        opened.sync(offset, length)


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Tell somebody at a terminal how long it has lasted, if it lasts."""
    if not sys.stderr.isatty():
        yield
        return
    # Only here: it takes longer to import than most syncs do.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    progress.add_task(what, total=None)
    timer = threading.Timer(_PATIENCE, progress.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
