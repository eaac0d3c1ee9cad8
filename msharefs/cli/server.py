"""``msharefs``: the server of a mount, as ``mshare mount``, mount(8) and systemd start it.

Promises: exit status 0 in the background only once the mount answers; one line and another status
if it cannot be mounted. In the background it is a new process in a session of its own (never a
fork of one that has threads), and logs to ``-o log=FILE`` or to syslog. SIGUSR1 writes the stacks
of all threads to standard error or to that FILE.
"""

from __future__ import annotations

import faulthandler
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import click

from msharefs.cli.command import define
from msharefs.cli.exits import Exit, Failure, status_of
from msharefs.cli.main import run as run_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from msharefs.cli.command import Rows
    from msharefs.service.options import MountOptions

log = logging.getLogger(__name__)

READY: Final = b"ready\n"
_SYSLOG: Final = Path("/dev/log")


def option_rows() -> Rows:
    """What ``-o`` takes, for ``--help``."""
    from msharefs.service.options import MountOptions  # noqa: PLC0415 - heavy

    return MountOptions.HELP


@define(
    "msharefs",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    tables={"Options for -o": option_rows},
    examples=(
        "msharefs /run/mshare -o size=1G",
        "mount -t fuse.msharefs none /run/mshare -o size=1G",
    ),
)
@click.argument("source_and_dir", nargs=-1, required=True, metavar="[SOURCE] DIR")
@click.option(
    "-o", "option_words", metavar="OPTIONS", multiple=True, help="See below; separated by commas."
)
@click.option("-f", "--foreground", is_flag=True, help="Stay; log to standard error.")
@click.option("--ready-fd", type=int, hidden=True)
def server(
    source_and_dir: tuple[str, ...],
    option_words: tuple[str, ...],
    foreground: bool,
    ready_fd: int | None,
) -> None:
    """Serve shared-memory regions on the directory DIR.

    Goes to the background once the mount answers, unless -f is given. Ends when it is unmounted,
    or by SIGINT or SIGTERM, which unmount. SIGUSR1 writes the stacks of its threads to
    standard error, or to log=FILE.
    """
    if len(source_and_dir) > 2:
        raise click.UsageError("one SOURCE and one DIR at most")
    source = source_and_dir[0] if len(source_and_dir) == 2 else "msharefs"
    directory = source_and_dir[-1]
    text = ",".join(option_words)
    if foreground or ready_fd is not None:
        serve(directory, text, source=source, ready_fd=ready_fd)
    else:
        start_in_background(directory, text, source=source)


def parse_options(text: str, source: str) -> MountOptions:
    """Raises Failure for an option that is none."""
    from msharefs.service.options import MountOptions, OptionError  # noqa: PLC0415 - heavy

    try:
        return MountOptions.parse(text, source=source)
    except OptionError as error:
        raise Failure(str(error), Exit.USAGE) from error


def serve(
    directory: str,
    text: str,
    *,
    source: str,
    ready_fd: int | None = None,
    say_ready: Callable[[], None] | None = None,
) -> None:
    """Mount and serve in this process, until it ends. Raises Failure."""
    from msharefs.service.daemon import run  # noqa: PLC0415 - heavy, and not needed by --help

    options = parse_options(text, source)
    _set_up_logging(options.log, in_background=ready_fd is not None)

    is_ready = False

    def ready() -> None:
        nonlocal is_ready
        is_ready = True
        if ready_fd is not None:
            os.write(ready_fd, READY)
            os.close(ready_fd)
            # Nobody reads our standard error from here on.
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, sys.stderr.fileno())
            os.close(devnull)
        if say_ready is not None:
            say_ready()

    try:
        run(os.path.abspath(directory), options, ready=ready)  # noqa: PTH100 - keeps symlinks
    except OSError as error:
        if is_ready:
            log.exception("the server ends")
        # Before that, the process that waits for us has the line from our standard error.
        raise Failure(str(error), status_of(error)) from error
    except Exception:
        log.exception("a bug ends the server")
        raise


def start_in_background(directory: str, text: str, *, source: str) -> int:
    """Start a server and wait until its mount answers. Returns its process id. Raises Failure."""
    parse_options(text, source)  # a mistake in them is ours to tell
    readable, writable = os.pipe()
    command = [sys.executable, "-m", "msharefs.cli.server", f"--ready-fd={writable}"]
    if text:
        command += ["-o", text]
    command += ["--", source, os.path.abspath(directory)]  # noqa: PTH100 - keeps symlinks
    errors, errors_end = os.pipe()
    with open(readable, "rb") as ready, open(errors, "rb") as complaints:  # noqa: PTH123 - fds
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors_end,
                pass_fds=[writable],
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": _python_path()},
            )
        finally:
            os.close(writable)
            os.close(errors_end)
        if ready.read() == READY:
            return process.pid
        status = process.wait()
        lines = complaints.read().decode(errors="replace").strip().splitlines()
    message = lines[-1].removeprefix("msharefs: ") if lines else f"the server ended with {status}"
    raise Failure(message, Exit(status) if status in set(Exit) and status else Exit.FAILED)


def _python_path() -> str:
    """So that the new process finds this very package, wherever this one was started from."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))


def _set_up_logging(file: str | None, *, in_background: bool) -> None:
    handler: logging.Handler
    form = "%(asctime)s msharefs[%(process)d] %(levelname)s: %(message)s"
    if file is not None:
        try:
            handler = logging.FileHandler(file)
        except OSError as error:
            raise Failure(f"log={file}: {error.strerror}", status_of(error)) from error
    elif in_background and _SYSLOG.exists():
        handler = logging.handlers.SysLogHandler(str(_SYSLOG))
        form = "msharefs[%(process)d]: %(levelname)s: %(message)s"
    elif in_background:
        handler = logging.NullHandler()
    else:
        handler = logging.StreamHandler()
        form = "msharefs: %(levelname)s: %(message)s"
    handler.setFormatter(logging.Formatter(form))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if os.environ.get("MSHARE_DEBUG") else logging.INFO)
    stream = getattr(handler, "stream", None)
    if stream is not None:
        faulthandler.register(signal.SIGUSR1, file=stream)
    else:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The program ``msharefs``."""
    run_command(server, arguments, "msharefs")


if __name__ == "__main__":
    main()
