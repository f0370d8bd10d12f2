"""``compress completion``."""

from __future__ import annotations

import click

from compressor.cli.complete import VARIABLE

SHELLS = ("bash", "zsh", "fish")


@click.command(name="completion")
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print what makes SHELL complete commands, options, recipes and the keys of --set.

    \b
    bash  eval "$(compress completion bash)"                 in ~/.bashrc
    zsh   eval "$(compress completion zsh)"                  in ~/.zshrc, behind compinit
    fish  compress completion fish > ~/.config/fish/completions/compress.fish
    """
    from click.shell_completion import get_completion_class

    from compressor.cli.complete import Bash
    from compressor.cli.main import cli

    kind = Bash if shell == "bash" else get_completion_class(shell)
    assert kind is not None, "click knows all of them"
    click.echo(kind(cli, {}, "compress", VARIABLE).source())
