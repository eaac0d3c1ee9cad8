"""``mshare mount``."""

from __future__ import annotations

import os

import click

from msharefs.cli.server import serve, start_in_background


@click.command("mount")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@click.option("-o", "words", metavar="OPTIONS", multiple=True, help="Separated by commas.")
@click.option("--background", is_flag=True, help="Return once the mount answers.")
def command(directory: str, words: tuple[str, ...], background: bool) -> None:
    r"""Serve shared-memory regions on the directory DIR, for every user.

    In the foreground it says when it is ready, and unmounts on Ctrl-C or SIGTERM.

    \b
    Options for -o:
      size=SIZE     limit for the memory of all regions together (ENOSPC beyond)
      huge=POLICY   huge pages: never, advise, always, within_size (as for tmpfs)
      mode=MODE     mode of the root directory in octal (default 1777)
      uid=UID, gid=GID   its owner (default root)
      events=N      events held for readers that come late (default 65536)
      log=FILE      append the log to FILE
      ro, noexec    as for mount(8)

    \b
    Examples:
      mshare mount /run/mshare
      mshare mount /run/mshare -o size=4G,huge=within_size --background
    """
    text = ",".join(words)
    if background:
        pid = start_in_background(directory, text, source="msharefs")
        click.echo(f"mounted on {os.path.abspath(directory)}, served by process {pid}")  # noqa: PTH100
        return

    def say_ready() -> None:
        click.echo(f"mounted on {os.path.abspath(directory)} (Ctrl-C unmounts)")  # noqa: PTH100

    serve(directory, text, source="msharefs", say_ready=say_ready)
