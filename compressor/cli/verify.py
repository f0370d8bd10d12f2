"""``compress verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from compressor.cli.options import DEFAULT_WORKSPACE, from_option, log_json_option, quiet_option

# However short the windows are, enough of them are scored for a verdict (compressor/verify/judge.py).
LEAST_TOKENS = 256


@click.command(name="verify")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--source", help="What it was made from.  [default: the local source that its recipe names]")
@click.option("--revision", help="Commit, tag or branch of a Hub source.")
@from_option
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "none"]),
    default="auto",
    show_default=True,
    help="vllm: fail unless vLLM agrees; auto: ask it where an environment is found; none: do not.",
)
@click.option(
    "--engine-python",
    type=click.Path(path_type=Path),
    help="Interpreter of vLLM's environment.  [default: $COMPRESS_ENGINE_PYTHON, .venv-serve, this one]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="What the engine computes in; auto: bfloat16, or float32 for an unquantized model on a CPU.",
)
@click.option("--text", default="calibration/heldout.jsonl", show_default=True, help="Text to score.")
@click.option(
    "--tokens", type=click.IntRange(min=LEAST_TOKENS), default=512, show_default=True, help="Tokens of it."
)
@click.option("--server/--no-server", default=True, help="Start the OpenAI-compatible server and ask it too.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
@quiet_option
@log_json_option
def command(
    checkpoint: Path,
    source: str | None,
    revision: str | None,
    from_: Literal["dequantize"] | None,
    engine: Literal["auto", "vllm", "none"],
    engine_python: Path | None,
    dtype: Literal["auto", "float32", "float16", "bfloat16"],
    text: str,
    tokens: int,
    server: bool,
    as_json: bool,
    quiet: bool,
    log_json: bool,
) -> None:
    """Prove that the folder CHECKPOINT is whole, means what its source means, and is served so.

    Checks files, config, tensors and scales; compares every weight with the source; loads it with
    transformers and scores a text; then does the same with vLLM in an environment of its own
    (scripts/serve_env.sh) and compares the log-probabilities. The result goes into the folder's report too.
    Exit status 1 if a check failed, or if vLLM was insisted on and does not agree.
    """
    if revision is not None and source is None:
        raise click.UsageError("--revision is of a Hub source: name that with --source")
    if from_ is not None and source is None:
        raise click.UsageError(
            "--from goes with --source: without it, the recipe says how its source is read"
        )
    from compressor.cli.progress import reporter
    from compressor.errors import EXIT_GATE
    from compressor.report.terminal import print_verification, report_console
    from compressor.verify.run import verify
    from compressor.verify.spec import VerifySpec

    spec = VerifySpec(
        checkpoint=checkpoint,
        cache=DEFAULT_WORKSPACE.absolute() / "hub",
        source=source,
        revision=revision,
        from_=from_,
        engine=engine,
        engine_python=engine_python,
        dtype=dtype,
        text=text,
        tokens=tokens,
        server=server,
    )
    with reporter(quiet=quiet, log_json=log_json) as progress:
        found = verify(spec, progress)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        print_verification(found, report_console(sys.stdout))
    if not found.passed:
        click.get_current_context().exit(EXIT_GATE)
