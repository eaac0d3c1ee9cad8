"""``mshare``: the group, which finds each command in the module of its name.

Promises: errors are one line on standard error and an exit code of :mod:`msharefs.cli.exits`; a
closed pipe ends a command quietly; ``--debug`` or MSHARE_DEBUG shows where an error came from.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from msharefs import __version__
from msharefs.cli.command import write_sections
from msharefs.cli.exits import Exit, describe, exit_rows, status_of
from msharefs.units import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS: Final = {
    name: f"msharefs.cli.{module}"
    for name, module in [
        ("mount", "mount"),
        ("umount", "umount"),
        ("create", "create"),
        ("ls", "ls"),
        ("info", "info"),
        ("map", "map"),
        ("unmap", "unmap"),
        ("protect", "protect"),
        ("query", "query"),
        ("objects", "objects"),
        ("sync", "sync"),
        ("clients", "clients"),
        ("stat", "stat"),
        ("report", "report"),
        ("watch", "watch"),
        ("notify", "notify"),
        ("decide", "decide"),
        ("resize", "resize"),
        ("rm", "rm"),
        ("ioctl", "ioctl"),
        ("check", "check"),
        ("completion", "completion"),
    ]
}
"""In the order of ``--help``."""


ENVIRONMENT: Final = (("MSHARE_DEBUG", "if set and not empty: as --debug, and servers log more"),)
FIRST_STEPS: Final = (
    "mkdir -p /run/mshare && mshare mount /run/mshare --background",
    "mshare create pool --size 64M",
    "mshare map pool --anon --offset 0 --prot rw-",
    "mshare query pool",
)


class ClosedPipe(Exception):
    """Whoever reads our output has what it wanted (head, grep -q)."""


@contextmanager
def _closed_pipe_told() -> Iterator[None]:
    """Click would end with status 1 by itself if it saw an EPIPE."""
    try:
        yield
    except BrokenPipeError:
        raise ClosedPipe from None


class Commands(click.Group):
    """Imports a command's module when it is asked for."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _closed_pipe_told():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _closed_pipe_told():
            return super().invoke(ctx)

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        tables = {"Exit status": exit_rows, "Environment": lambda: ENVIRONMENT}
        write_sections(formatter, tables, FIRST_STEPS)

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name]).command
        assert isinstance(command, click.Command)
        return command


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"mshare {__version__}")
        ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.option("--debug", is_flag=True, help="Show where an error came from.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@click.pass_context
def mshare(ctx: click.Context, debug: bool) -> None:
    """Shared-memory regions as files: make them, change them, watch them.

    FILE is a path on a mount, or a name on the only mount there is. Sizes and offsets are bytes,
    also written as 64M, 4KiB or 0x1000. Protections are written as in /proc/PID/maps: rw-, r--,
    --- (or none).
    """
    ctx.obj = debug


def main(arguments: list[str] | None = None) -> NoReturn:
    """The program ``mshare``."""
    run(mshare, arguments, "mshare")


def run(command: click.Command, arguments: list[str] | None, program: str) -> NoReturn:
    """Run a click command as a program: its errors as one line, its result as the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = bool(os.environ.get("MSHARE_DEBUG")) or "--debug" in arguments
    try:
        status = _invoke(command, arguments, program)
        sys.stdout.flush()
    except click.ClickException as error:
        _explain(error, program)
        _trace(debug)
        status = error.exit_code
    except (BrokenPipeError, ClosedPipe):
        # Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = Exit.OK
    except OSError as error:
        about = f"{error.filename}: " if error.filename else ""
        click.echo(one_line(f"{program}: {about}{describe(error)}"), err=True)
        _trace(debug)
        status = status_of(error)
    except (KeyboardInterrupt, click.Abort):
        status = 130
    sys.exit(int(status))


def _invoke(command: click.Command, arguments: list[str], program: str) -> int:
    result: Any = command.main(arguments, prog_name=program, standalone_mode=False)
    return result if isinstance(result, int) else Exit.OK


def _explain(error: click.ClickException, program: str) -> None:
    # Click 8.2 makes an error of what only shows help.
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        click.echo(error.format_message(), err=True)
        return
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else program
    where, _, command = path.partition(" ")
    message = error.format_message()
    text = f"{where}: {command}: {message}" if command else f"{where}: {message}"
    if isinstance(error, click.UsageError):
        text = f"{text.rstrip('.')} (try '{path} --help')"
    click.echo(one_line(text), err=True)


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


if __name__ == "__main__":
    main()
