"""``mshare check``."""

from __future__ import annotations

import json

import attrs
import click

from msharefs.cli.command import define
from msharefs.cli.exits import Exit


@define(
    "check",
    examples=("mshare check",),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Try out what a mount needs of this machine.

    Says how to mend each lack. Exit status 1 if a mount would not work.
    """
    from msharefs.service.probe import probe_all  # noqa: PLC0415 - heavy

    findings = probe_all()
    if as_json:
        click.echo(json.dumps({"checks": [attrs.asdict(found) for found in findings]}, indent=3))
    else:
        width = max(len(found.name) for found in findings)
        for found in findings:
            word = "ok" if found.ok else "MISSING" if found.required else "missing"
            click.echo(f"{found.name.ljust(width)}  {word.ljust(7)}  {found.found}")
            if not found.ok:
                click.echo(f"{' ' * width}           {found.mend}")
    if any(found.required and not found.ok for found in findings):
        ctx.exit(int(Exit.FAILED))
