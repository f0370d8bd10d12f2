"""``compress``: the group of commands, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from importlib.metadata import version
from types import FrameType
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem, add_completion_class

from compressor.cli.complete import VARIABLE, Bash
from compressor.cli.options import DEFAULT_WORKSPACE
from compressor.errors import EXIT_GATE, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USER, GateError, UserError

# name -> (module, help line); modules are imported only when their command runs, so that help is instant.
COMMANDS = {
    "init": ("compressor.cli.init", "Write a commented starter recipe for a model."),
    "run": ("compressor.cli.run", "Run a recipe: plan, compress, evaluate, export."),
    "plan": ("compressor.cli.plan", "Show what a recipe will do and cost, from headers alone."),
    "eval": ("compressor.cli.evaluate", "Measure a checkpoint against its source on any text."),
    "verify": ("compressor.cli.verify", "Prove that a checkpoint is whole and that vLLM serves it rightly."),
    "inspect": ("compressor.cli.inspect", "Show what a checkpoint holds."),
    "report": ("compressor.cli.report", "Show the report of a finished run again, or compare several runs."),
    "recipes": ("compressor.cli.recipes", "List the shipped recipes."),
    "schema": ("compressor.cli.schema", "Print the JSON Schema of recipes."),
    "doctor": ("compressor.cli.doctor", "Look at this machine: packages, devices, disks, Hub, engine."),
    "completion": ("compressor.cli.completion", "Print the completion of bash, zsh or fish."),
    "clean": ("compressor.cli.clean", "Show or free workspace space."),
}


_SYSTEM_REFUSALS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
)


class _Commands(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[Any]]:
        """The commands, without importing any of them."""
        named = {name: text for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)}
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [CompletionItem(name, help=text) for name, text in named.items()]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("compressor"), prog_name="compress", message="%(prog)s %(version)s")
def cli() -> None:
    """Compress a language model as one recipe file says, and measure what it gained and lost.

    \b
    compress run recipes/smollm2-nvfp4.yaml
    compress plan recipes/scout-nvfp4.yaml

    Exit status: 0 done, 1 a quality gate or a verification failed, 2 bad input, 3 internal error,
    130 interrupted (run the same command again to go on).
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM: handled like Ctrl-C, so that the workspace stays resumable."""


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def main() -> None:
    """Entry point: runs the command line and exits with the contract's status."""
    # GNU OpenMP's waiting threads spin: beside other work on few cores that costs ten times what it saves.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Tensors in pages of 2 MB where the system has them: a third less of its time in a walk.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGTERM, _terminate)
    if VARIABLE in os.environ:
        add_completion_class(Bash)
    code = _run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code == EXIT_INTERRUPTED:
        # A read that is under way would be waited for; nothing that matters is left to do.
        os._exit(code)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        # What a command gave to ctx.exit; None where it simply returned.
        code: int | None = cli.main(arguments, prog_name="compress", standalone_mode=False)
        return code or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except SystemExit:
        return 0  # click's answer to a reader of stdout that went away (`| head`)
    except click.ClickException as error:
        error.show()
        return EXIT_USER
    except GateError as error:
        _say(f"gate failed: {error}", arguments)
        return EXIT_GATE
    except UserError as error:
        _say(f"error: {error}", arguments)
        return EXIT_USER
    except (KeyboardInterrupt, click.exceptions.Abort) as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        word = "terminated" if isinstance(stop, Terminated) else "interrupted"
        _say(f"{word}: finished work is kept; run the same command again to go on", arguments)
        return EXIT_INTERRUPTED
    except OSError as error:
        return _system_error(error, arguments)
    except Exception as error:
        return _unexpected(error, arguments)


def _system_error(error: OSError, arguments: list[str]) -> int:
    """The system's refusals are not this program's faults: a full disk, a read-only or vanished place."""
    if error.errno not in _SYSTEM_REFUSALS or not error.strerror:
        return _unexpected(error, arguments)
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free some space" if full else "mend it"
    _say(
        f"error: {where}{error.strerror.lower()}\n  -> {fix} and run the same command again; work is kept",
        arguments,
    )
    return EXIT_USER


def _unexpected(error: Exception, arguments: list[str]) -> int:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        _say(
            "error: out of memory\n  -> lower evaluate.tokens or evaluate.context, switch evaluation off "
            "(--set evaluate=null), or use a machine with more memory; finished work is kept",
            arguments,
        )
        return EXIT_USER
    log = DEFAULT_WORKSPACE.absolute() / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = f"compress {' '.join(arguments)}\n\n{traceback.format_exc()}"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text)
    except OSError:
        _say(text, arguments)
        return EXIT_INTERNAL
    _say(
        f"internal error: {type(error).__name__}: {error}\n  -> this is a fault of compressor; log: {log}",
        arguments,
    )
    return EXIT_INTERNAL


def _say(text: str, arguments: list[str]) -> None:
    """The last word on stderr; a JSON line where the user asked for these."""
    click.echo(json.dumps({"event": "error", "text": text}) if "--log-json" in arguments else text, err=True)
