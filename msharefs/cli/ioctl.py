"""``mshare ioctl``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import attrs
import click

from msharefs.abi import (
    ARGS_OF,
    Command,
    MapFlag,
    NotifyEvent,
    NotifyMode,
    OnTimeout,
    Prot,
    QueryFlag,
)
from msharefs.cli.command import define
from msharefs.cli.targets import open_region, refusing_as, resolve
from msharefs.cli.types import complete_regions
from msharefs.units import parse_size

if TYPE_CHECKING:
    from enum import IntEnum, IntFlag

    from msharefs.abi import Args

COMMANDS = {
    "map": Command.CREATE_MAPPING,
    **{
        command.name.lower().replace("_", "-"): command
        for command in Command
        if command is not Command.CREATE_MAPPING_I386
    },
}
_READ_ONLY = {Command.QUERY, Command.INFO, Command.SYNC}
_WORDS: dict[str, type[IntEnum | IntFlag]] = {
    "flags": MapFlag,
    "query_flags": QueryFlag,
    "events": NotifyEvent,
    "mode": NotifyMode,
    "on_timeout": OnTimeout,
}
_PREFIXES = ("MAP_", "MSHAREFS_")


@define(
    "ioctl",
    examples=(
        "mshare ioctl pool protect region_offset=0 size=4K prot=r--",
        "mshare ioctl pool map size=1M prot=rw- flags=MAP_SHARED|MAP_FIXED|MAP_ANONYMOUS",
        "mshare ioctl pool query region_offset=0x1000 query_flags=next",
    ),
)
@click.argument("file", metavar="FILE", shell_complete=complete_regions)
@click.argument("name", metavar="COMMAND", type=click.Choice(list(COMMANDS)))
@click.argument("fields", metavar="[FIELD=VALUE]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(file: str, name: str, fields: tuple[str, ...], as_json: bool) -> None:
    """Send one command to a region, field by field.

    What comes back is printed. The fields are those of the struct in msharefs.h; what is not given is zero (fd: -1). Values are
    sizes, numbers, protections, or names joined by |. fd is a descriptor that the shell opened.
    """
    number = COMMANDS[name]
    kind = ARGS_OF[number]
    args = kind(**dict(_field(kind, word) for word in fields))
    region = resolve(file)
    with (
        refusing_as(name, region),
        open_region(region, writable=number not in _READ_ONLY) as opened,
    ):
        answer = opened.ioctl(number, args)
    if number not in {Command.QUERY, Command.INFO}:
        return
    values = {key: int(value) for key, value in attrs.asdict(answer).items()}
    if as_json:
        click.echo(json.dumps(values))
        return
    for key, value in values.items():
        click.echo(f"{key}={value:#x}" if value > 9 else f"{key}={value}")


def _field(kind: type[Args], word: str) -> tuple[str, int]:
    key, equals, text = word.partition("=")
    names = kind.field_names()
    if not equals or key not in names:
        raise click.UsageError(f"{word!r} is none of {', '.join(f'{n}=' for n in names)}")
    try:
        return key, _value(key, text)
    except ValueError as error:
        raise click.UsageError(f"{key}: {error}") from None


def _value(key: str, text: str) -> int:
    if key == "prot" and not text[:1].isdigit():
        return int(Prot.parse(text))
    if text == "-1":
        return 0xFFFF_FFFF
    if text[:1].isdigit():
        return parse_size(text)
    words = _WORDS.get(key)
    if words is None:
        raise ValueError(f"not a number: {text!r}")
    value = 0
    for part in text.split("|"):
        name = part.strip().upper()
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name not in words.__members__:
            raise ValueError(f"{part!r} is none of {', '.join(words.__members__)}")
        value |= int(words[name])
    return value
