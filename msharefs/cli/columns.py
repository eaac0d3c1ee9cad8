"""Columns of ``ls`` and ``query``: defined once each, printed as a table or as JSON.

A column is a name, a line of help and how to get its value from a row; output, ``--help``, ``-o``
and completion all read the same table, in the manner of lsipc(1). Values are numbers and strings
as JSON has them; only the table shows sizes for people. JSON keys are the names in lower case and
never change; the default columns of the table may.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

import attrs
import click

from msharefs.cli.types import complete_columns
from msharefs.units import format_size, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Value: TypeAlias = int | str | None
Row = TypeVar("Row")
_F = TypeVar("_F", bound="Callable[..., Any]")

SIZE: Final = "size"
HEX: Final = "hex"
PLAIN: Final = "plain"


@attrs.frozen
class Column(Generic[Row]):
    """``form``: SIZE in bytes, HEX for an offset, PLAIN for anything else. None prints as ``-``."""

    name: str
    help: str
    get: Callable[[Row], Value]
    form: str = PLAIN
    right: bool = False
    default: bool = True

    @property
    def key(self) -> str:
        return self.name.lower()

    def text(self, value: Value, *, as_bytes: bool) -> str:
        if value is None:
            return "-"
        if isinstance(value, str):
            return one_line(value)  # of a table a row
        if self.form == HEX:
            return f"{value:012x}"
        return format_size(value) if self.form == SIZE and not as_bytes else str(value)


@attrs.frozen
class Layout:
    """What the output options ask for."""

    columns: Sequence[Column[Any]]
    as_json: bool
    headings: bool
    as_bytes: bool

    def show(self, rows: Iterable[Any], key: str) -> None:
        """Print all rows: a table, or ``{"key": [...]}``."""
        if self.as_json:
            objects = [{column.key: column.get(row) for column in self.columns} for row in rows]
            click.echo(json.dumps({key: objects}, indent=3))
            return
        lines = [[c.name for c in self.columns]] if self.headings else []
        lines += [
            [c.text(c.get(row), as_bytes=self.as_bytes) for c in self.columns] for row in rows
        ]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        for line in lines:
            cells = [
                cell.rjust(width) if column.right else cell.ljust(width)
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            ]
            click.echo(" ".join(cells).rstrip())


def choose(columns: Sequence[Column[Row]], wanted: str | None) -> list[Column[Row]]:
    """The columns of a list such as ``NAME,SIZE``, or ``+USED`` beside the default ones.

    Raises click.BadParameter for a name that is none.
    """
    default = [column for column in columns if column.default]
    if wanted is None:
        return default
    names = wanted.upper()
    chosen = default if names.startswith("+") else []
    by_name = {column.name: column for column in columns}
    for name in names.removeprefix("+").split(","):
        if name.strip() not in by_name:
            known = ", ".join(by_name)
            raise click.BadParameter(f"no column {name.strip()!r} (columns: {known})")
        chosen = [*chosen, by_name[name.strip()]]
    return chosen


def help_rows(columns: Sequence[Column[Any]]) -> list[tuple[str, str]]:
    """The columns for ``--help``; the default ones are marked."""
    return [(f"{c.name} *" if c.default else c.name, c.help) for c in columns]


def output_options(columns: Sequence[Column[Any]]) -> Callable[[_F], _F]:
    """``-o --json --noheadings --bytes``, which arrive under the names of Layout's fields."""

    def choice(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
        return choose(columns, value)

    options = [
        click.option(
            "-o",
            "--output",
            "columns",
            metavar="COLUMNS",
            callback=choice,
            shell_complete=complete_columns(columns),
            help="Which columns: NAME,SIZE or +MODE beside the default ones.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON, all sizes in bytes."),
        click.option(
            "--noheadings",
            "headings",
            is_flag=True,
            default=True,
            flag_value=False,
            help="Print no line of headings.",
        ),
        click.option("--bytes", "as_bytes", is_flag=True, help="Print sizes in bytes."),
    ]

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
