"""A command whose help has sections beside the options: tables of terms, and examples.

They are kept as data, so that ``--help`` and the manual page print the same ones, and a test can
check that every example is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

Rows: TypeAlias = "Iterable[tuple[str, str]]"


class Command(click.Command):
    """``tables`` are read only when help is printed: what they describe may be slow to import."""

    def __init__(
        self,
        *args: Any,
        tables: Mapping[str, Callable[[], Rows]] | None = None,
        examples: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tables: Mapping[str, Callable[[], Rows]] = tables or {}
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        write_sections(formatter, self.tables, self.examples)


def write_sections(
    formatter: click.HelpFormatter,
    tables: Mapping[str, Callable[[], Rows]],
    examples: tuple[str, ...],
) -> None:
    """The tables as lists of definitions, the examples as they are."""
    for title, rows in tables.items():
        with formatter.section(title):
            formatter.write_dl(list(rows()))
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


def define(
    name: str, *, examples: tuple[str, ...], **attributes: Any
) -> Callable[[Callable[..., Any]], Command]:
    """As click.command, for a :class:`Command`."""
    return click.command(name, cls=Command, examples=examples, **attributes)
