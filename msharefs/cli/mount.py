"""``mshare mount``."""

from __future__ import annotations

import os

import click

from msharefs.cli.command import define
from msharefs.cli.server import option_rows, serve, start_in_background


@define(
    "mount",
    tables={"Options for -o": option_rows},
    examples=(
        "mshare mount /run/mshare",
        "mshare mount /run/mshare -o size=4G,huge=within_size --background",
    ),
)
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@click.option(
    "-o", "words", metavar="OPTIONS", multiple=True, help="See below; separated by commas."
)
@click.option("--background", is_flag=True, help="Return as soon as the mount answers.")
def command(directory: str, words: tuple[str, ...], background: bool) -> None:
    """Serve regions on the directory DIR, for every user.

    In the foreground it says when it is ready, and unmounts on Ctrl-C or SIGTERM.
    """
    text = ",".join(words)
    if background:
        pid = start_in_background(directory, text, source="msharefs")
        click.echo(f"mounted on {os.path.abspath(directory)}, served by process {pid}")  # noqa: PTH100
        return

    def say_ready() -> None:
        click.echo(f"mounted on {os.path.abspath(directory)} (Ctrl-C unmounts)")  # noqa: PTH100

    serve(directory, text, source="msharefs", say_ready=say_ready)
