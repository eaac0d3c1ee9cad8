"""``mshare ioctl``: every command as it is, for shell scripts and for trying things out."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from msharefs.abi import (
    ARGS_OF,
    Args,
    Command,
    Feature,
    Gate,
    Kind,
    MapFlag,
    NotifyEvent,
    NotifyMode,
    OnTimeout,
    Prot,
    QueryFlag,
)
from msharefs.cli.command import define
from msharefs.cli.targets import open_region, refusing_as, resolve_place
from msharefs.cli.types import complete_regions
from msharefs.client import Region
from msharefs.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.shell_completion import CompletionItem

    from msharefs.client import RegionFile

COMMANDS: Final = {
    "map": Command.CREATE_MAPPING,
    **{
        command.name.lower().replace("_", "-"): command
        for command in Command
        if command is not Command.CREATE_MAPPING_I386
    },
}
_READ_ONLY: Final = {Command.QUERY, Command.INFO, Command.SYNC}
_IOC_READ: Final = 1 << 31
_IOC_SIZE: Final = 0x3FFF

WORDS: Final[dict[str, type[IntEnum | IntFlag]]] = {
    "flags": MapFlag,
    "map_flags": MapFlag,
    "query_flags": QueryFlag,
    "events": NotifyEvent,
    "mode": NotifyMode,
    "on_timeout": OnTimeout,
    "signo": signal.Signals,
    "kind": Kind,
    "gate": Gate,
    "features": Feature,
}
"""Fields whose values have names; ``prot`` has a spelling of its own."""
_HEXADECIMAL: Final = {"region_offset", "start", "object_offset", "offset"}


def _field_rows() -> Iterator[tuple[str, str]]:
    for name, number in COMMANDS.items():
        if name != "create-mapping":
            yield name, " ".join(ARGS_OF[number].field_names())


@define(
    "ioctl",
    tables={"Commands and their fields": _field_rows},
    examples=(
        "mshare ioctl pool protect region_offset=0 size=4K prot=r--",
        "mshare ioctl pool map size=1M prot=rw- flags='SHARED|FIXED|ANONYMOUS'",
        "mshare ioctl pool map size=4K prot=r-- flags='SHARED|FIXED' fd=3 3</etc/fstab",
        "mshare ioctl pool query region_offset=0x1000 query_flags=next",
        "mshare ioctl pool 0x40047899 00112233",
    ),
)
@click.argument("file", metavar="FILE|DIR", shell_complete=complete_regions)
@click.argument(
    "name", metavar="COMMAND", shell_complete=lambda *words: complete_words(COMMANDS, words[-1])
)
@click.argument("fields", metavar="[FIELD=VALUE]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print what comes back as JSON, in numbers.")
@click.option("--read-only", is_flag=True, help="Open FILE for reading only.")
def command(file: str, name: str, fields: tuple[str, ...], as_json: bool, read_only: bool) -> None:
    """Send one command to a region, field by field.

    What comes back is printed. The fields are those of the struct in msharefs.h; what is not given
    is zero (fd: -1). A value is a number or size, a protection, or names joined by |. fd is a
    descriptor that the shell has opened. COMMAND may also be a number, and its argument then bytes
    in hexadecimal. Of a directory, info can be asked.
    """
    number = _number(name)
    known = Command(number) if number in set(Command) else None
    argument = bytearray(
        _struct(known, fields) if known is not None else _raw(number, name, fields)
    )
    mount, below = resolve_place(file)
    place = mount.region(below)
    with refusing_as(name, place), _opened(place, known, read_only=read_only) as opened:
        try:
            # Some old commands of the kernel's write more than their number says.
            fcntl.ioctl(opened.fd, number, argument or bytearray(64))
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0)) from None
    if number & _IOC_READ:
        _show(known, bytes(argument), as_json=as_json)


def complete_words(words: dict[str, Any], incomplete: str) -> list[CompletionItem[str]]:
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - only in completion

    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _opened(place: RegionFile, known: Command | None, *, read_only: bool) -> Region:
    if os.path.isdir(place.path):  # noqa: PTH112 - a string is at hand
        return Region(os.open(place.path, os.O_RDONLY | os.O_CLOEXEC), place.path)
    if read_only:
        return Region.open(place.path, writable=False)
    return open_region(place, writable=known not in _READ_ONLY)


def _number(name: str) -> int:
    if name in COMMANDS:
        return int(COMMANDS[name])
    try:
        number = int(name, 0)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 32:
        raise click.UsageError(f"{name!r} is neither a number nor one of {', '.join(COMMANDS)}")
    return number


def _raw(number: int, name: str, words: tuple[str, ...]) -> bytes:
    """The argument of a command that we do not know, as long as its number says at least."""
    size = number >> 16 & _IOC_SIZE
    try:
        data = bytes.fromhex("".join(words))
    except ValueError:
        message = f"{name} is none of msharefs.h's: give its argument as bytes in hexadecimal"
        raise click.UsageError(message) from None
    if len(data) > size:
        raise click.UsageError(f"{len(data)} bytes, but {name} says that it takes {size}")
    return data.ljust(size, b"\0")


def _struct(known: Command, words: tuple[str, ...]) -> bytes:
    kind = ARGS_OF[known]
    widths = dict(zip(kind.field_names(), _widths(kind), strict=True))
    args = kind(**dict(_field(widths, word) for word in words))
    data = args.pack()
    return data[: known >> 16 & _IOC_SIZE]  # i386's mshare_create has no padding


def _widths(kind: type[Args]) -> list[int]:
    """Bytes of each field."""
    codes = kind.LAYOUT.format.lstrip("=").rstrip("x0123456789")
    return [struct.calcsize(f"={code}") for code in codes]


def _field(widths: dict[str, int], word: str) -> tuple[str, int]:
    key, equals, text = word.partition("=")
    if not equals or key not in widths:
        raise click.UsageError(f"{word!r} is none of {', '.join(f'{name}=' for name in widths)}")
    bits = widths[key] * 8
    try:
        value = _value(key, text)
    except ValueError as error:
        raise click.UsageError(f"{key}: {error}") from None
    if not -(1 << bits - 1) <= value < 1 << bits:
        raise click.UsageError(f"{key}: {text} does not fit {bits} bits")
    return key, value % (1 << bits)


def _value(key: str, text: str) -> int:
    digits = text.removeprefix("-")
    if digits[:1].isdigit():
        return -parse_size(digits) if digits != text else parse_size(text)
    if key == "prot":
        return int(Prot.parse(text))
    if key not in WORDS:
        raise ValueError(f"not a number: {text!r}")
    value = 0
    for part in text.split("|"):
        value |= _word(WORDS[key], part.strip())
    return value


def _word(words: type[IntEnum | IntFlag], text: str) -> int:
    """A name with or without what C puts before it: MAP_SHARED, SHARED, SIGUSR1."""
    names = words.__members__
    for name in names:
        if text.upper() == name or text.upper().endswith(f"_{name}"):
            return int(names[name])
    raise ValueError(f"{text!r} is none of {', '.join(names)}")


def _show(known: Command | None, data: bytes, *, as_json: bool) -> None:
    if known is None:
        click.echo(json.dumps({"data": data.hex()}) if as_json else f"data={data.hex()}")
        return
    values: dict[str, int] = attrs.asdict(ARGS_OF[known].unpack(data))
    if as_json:
        click.echo(json.dumps(values))
        return
    for key, value in values.items():
        click.echo(f"{key}={_text(key, value)}")


def _text(key: str, value: int) -> str:
    if key == "prot":
        return Prot(value).text() if value <= 7 else f"{value:#x}"
    words = WORDS.get(key)
    if words is None:
        return f"{value:#x}" if key in _HEXADECIMAL else str(value)
    if not issubclass(words, IntFlag):
        return str(words(value).name) if value in set(words) else str(value)
    names = [name for name, bit in words.__members__.items() if bit and not int(bit) & ~value]
    return "|".join(names) or "0"
