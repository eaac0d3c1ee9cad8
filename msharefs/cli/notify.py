"""``mshare notify``."""

from __future__ import annotations

import signal
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from msharefs.abi import PAGE_SIZE, NotifyEvent, NotifyMode, OnTimeout
from msharefs.cli.command import define
from msharefs.cli.targets import refusing_as, resolve
from msharefs.cli.types import file_argument, size
from msharefs.client import Region

_EVENTS: Final = {"write": NotifyEvent.WRITE, "read": NotifyEvent.READ}
_MODES: Final = {mode.name.lower(): mode for mode in NotifyMode}
_POLICIES: Final = {policy.name.lower(): policy for policy in OnTimeout}


def events(text: str) -> NotifyEvent:
    """``write``, ``read``, or both with a comma."""
    found = NotifyEvent.DISARM
    for word in text.split(","):
        if word not in _EVENTS:
            raise click.BadParameter(f"{word!r} is neither write nor read")
        found |= _EVENTS[word]
    return found


def signal_name(text: str) -> int:
    """``USR1``, ``SIGUSR1``, ``RTMIN+2`` or a number."""
    name = text.upper().removeprefix("SIG")
    base, plus, more = name.partition("+")
    if base.isdecimal() and not plus:
        number = int(base)
    elif f"SIG{base}" in signal.Signals.__members__ and (not plus or more.isdecimal()):
        number = signal.Signals[f"SIG{base}"] + int(more or 0)
    else:
        number = 0
    if number not in signal.valid_signals():
        raise click.BadParameter(f"{text!r} is no signal (see kill -l)")
    return int(number)


def complete_signals(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    names = [name.removeprefix("SIG") for name in signal.Signals.__members__]
    return [CompletionItem(name) for name in names if name.startswith(incomplete.upper())]


def complete_events(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    known = ("write", "read", "write,read")
    return [CompletionItem(word) for word in known if word.startswith(incomplete)]


MODES: Final = (
    ("log", "the first access to each page is reported, until the range is armed anew"),
    ("signal", "the thread gets a signal as well, at its process's first access to each page"),
    ("hold", "it waits until somebody says mshare decide, or for the timeout"),
)


@define(
    "notify",
    tables={"Modes": lambda: MODES},
    examples=(
        "mshare notify pool --offset 0 --length 1M",
        "mshare notify pool --offset 1M --length 4K --events write,read",
        "mshare notify pool --offset 0 --length 4K --mode signal --signal USR1",
        "mshare notify pool --length 4K --mode hold --timeout 5 --on-timeout allow",
        "mshare notify pool --scan",
        "mshare notify pool --off",
    ),
)
@file_argument
@click.option(
    "--offset", type=size, default="0", help="Where in the region it begins (default: 0)."
)
@click.option("--length", type=size, help="How much (default: to the end of the region).")
@click.option(
    "--events",
    type=events,
    default="write",
    show_default=True,
    shell_complete=complete_events,
    help="What is watched: write, read, or both with a comma.",
)
@click.option(
    "--mode",
    type=click.Choice(list(_MODES)),
    default="log",
    show_default=True,
    help="What becomes of an access that the protection allows.",
)
@click.option(
    "--signal",
    "signo",
    type=signal_name,
    metavar="SIGNAL",
    shell_complete=complete_signals,
    help="For mode signal: which (USR1, a number).",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.001, max=4_294_967),
    metavar="SECONDS",
    help="For mode hold: wait at most so many seconds (default: for ever).",
)
@click.option(
    "--on-timeout",
    type=click.Choice(list(_POLICIES)),
    help="For mode hold: what becomes of it then, or when nobody can decide (default: deny).",
)
@click.option(
    "--scan",
    is_flag=True,
    help="For mode log: look for stored-to pages every log_period= of the mount; no thread waits.",
)
@click.option("--off", is_flag=True, help="Watch the range no more.")
def command(
    file: str,
    offset: int,
    length: int | None,
    events: NotifyEvent,
    mode: str,
    signo: int | None,
    timeout: float | None,
    on_timeout: str | None,
    scan: bool,
    off: bool,
) -> None:
    """Watch a range: what touches it is reported.

    The reports are events, as mshare watch shows them.
    An access that the protection forbids is reported and denied, whatever the mode. A held access
    needs somebody who has the region's events open (mshare watch does): it is decided by
    --on-timeout at once if there is nobody.
    """
    _check(mode, signo=signo, timeout=timeout, on_timeout=on_timeout)
    if scan and (mode, events) != ("log", NotifyEvent.WRITE):
        raise click.UsageError("--scan goes with --mode log and --events write")
    region = resolve(file)
    with refusing_as("notify", region), Region.open(region.path) as opened:
        wanted = -(-opened.size // PAGE_SIZE) * PAGE_SIZE - offset if length is None else length
        if off:
            opened.notify(offset, wanted, NotifyEvent.DISARM)
            return
        opened.notify(
            offset,
            wanted,
            events,
            mode=_MODES[mode],
            signo=signo or 0,
            timeout_ms=round((timeout or 0) * 1000),
            on_timeout=_POLICIES[on_timeout or "deny"],
            scan=scan,
        )


def _check(mode: str, **options: Any) -> None:
    """An option that the mode has no use for is a mistake of whoever typed it."""
    of_mode = {"signo": "signal", "timeout": "hold", "on_timeout": "hold"}
    for name, value in options.items():
        if value is not None and of_mode[name] != mode:
            option = "--signal" if name == "signo" else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} goes with --mode {of_mode[name]}")
    if mode == "signal" and options["signo"] is None:
        raise click.UsageError("--mode signal needs --signal")
