"""What arguments look like: sizes, protections, regions, modes; and how a shell completes them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from msharefs.abi import Prot
from msharefs.client import mounts
from msharefs.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from msharefs.cli.columns import Column

_F = TypeVar("_F", bound="Callable[..., Any]")


# Converters for click's ``type=``: it prints their names, in capitals, where a value goes.


def size(text: str) -> int:
    return _converted(parse_size, text)


def prot(text: str) -> Prot:
    return _converted(Prot.parse, text)


def mode(text: str) -> int:
    return _converted(parse_mode, text)


def counts(text: str) -> list[int]:
    return _converted(parse_counts, text)


_T = TypeVar("_T")


def _converted(convert: Callable[[str], _T], text: str) -> _T:
    try:
        return convert(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_mode(text: str) -> int:
    """Permission bits in octal. Raises ValueError."""
    if not text or set(text) - set("01234567") or int(text, 8) > 0o7777:
        raise ValueError(f"not a mode: {text!r} (write it in octal, as 600 or 0644)")
    return int(text, 8)


def parse_counts(text: str) -> list[int]:
    """Positive numbers in ascending order, each once, of ``100,1``. Raises ValueError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) for word in words):
        raise ValueError(f"not a list of numbers: {text!r} (write it as 1,10,100)")
    return sorted({int(word) for word in words})


# Arguments that several commands have.


def file_argument(function: _F) -> _F:
    return click.argument("file", metavar="FILE", shell_complete=complete_regions)(function)


def offset_option(function: _F) -> _F:
    text = "Where in the region it begins."
    return click.option("--offset", type=size, required=True, help=text)(function)


def length_option(function: _F) -> _F:
    return click.option("--length", type=size, required=True, help="How much.")(function)


def complete_regions(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """The names of the regions of the only mount, else paths."""
    if incomplete.startswith((".", "/", "~")):
        return [CompletionItem(incomplete, type="file")]
    there = mounts()
    names: list[str] = []
    for mount in there:
        try:
            found = [region.name for region in mount.regions()]
        except OSError:  # its server has died, or it is closed to us
            continue
        if len(there) > 1:
            found = [os.path.join(mount.path, name) for name in found]  # noqa: PTH118
        names += found
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_mounts(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """The mount points in use, else directories."""
    found = [mount.path for mount in mounts() if mount.path.startswith(incomplete)]
    if found:
        return [CompletionItem(path) for path in found]
    return [CompletionItem(incomplete, type="dir")]


def complete_columns(columns: Sequence[Column[Any]]) -> Callable[..., list[CompletionItem[str]]]:
    """The last name of a list such as ``-o NAME,SI``."""

    def complete(
        _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        done, comma, last = incomplete.rpartition(",")
        plus = "+" if last.startswith("+") else ""
        start = done + comma + plus
        names = [column.name for column in columns]
        taken = set(done.upper().lstrip("+").split(","))
        return [
            CompletionItem(start + name)
            for name in names
            if name.startswith(last.upper().lstrip("+")) and name not in taken
        ]

    return complete
