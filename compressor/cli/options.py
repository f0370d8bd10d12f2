"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from compressor.cli import complete

DEFAULT_WORKSPACE = Path("out") / ".compress-workspace"

recipe_argument = click.argument("recipe", metavar="RECIPE", shell_complete=complete.recipes)

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete.settings,
    help="Override one key of the recipe, e.g. --set weights.scheme=fp8_dynamic; may be repeated.",
)

output_option = click.option(
    "--output", type=click.Path(path_type=Path), help="The output folder.  [default: out/NAME]"
)

workspace_option = click.option(
    "--workspace",
    type=click.Path(path_type=Path),
    help="The workspace folder.  [default: .compress-workspace beside the output folder]",
)

from_option = click.option(
    "--from",
    "from_",
    type=click.Choice(["dequantize"]),
    help="Read a source whose weights are stored quantized as bfloat16, as model.from in recipes.",
)

quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress; warnings and the result only.")

log_json_option = click.option("--log-json", is_flag=True, help="Progress as JSON lines on stderr.")
