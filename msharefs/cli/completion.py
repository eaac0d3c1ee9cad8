"""``mshare completion``."""

from __future__ import annotations

import click

from msharefs.cli.command import define

SHELLS = ("bash", "zsh", "fish")


@define(
    "completion",
    examples=(
        "mshare completion bash > /etc/bash_completion.d/mshare",
        'eval "$(mshare completion zsh)"                          # in ~/.zshrc',
        "mshare completion fish > ~/.config/fish/completions/mshare.fish",
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print what makes a shell complete mshare.

    Commands, options, regions and columns are completed.
    """
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - only here

    from msharefs.cli.main import mshare  # noqa: PLC0415 - it imports this module

    kind = get_completion_class(shell)
    assert kind is not None
    complete = kind(mshare, {}, "mshare", "_MSHARE_COMPLETE")
    # source() of bash also runs bash to see its version; that is the user's affair.
    click.echo(complete.source_template % complete.source_vars())
