"""``compress inspect``."""

from __future__ import annotations

import json

import click


@click.command(name="inspect")
@click.argument("checkpoint")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
def command(checkpoint: str, revision: str | None, as_json: bool) -> None:
    """Show what CHECKPOINT holds: a folder, a .gguf file, or a Hub id (org/name).

    Weights by part of the model and by how they are stored (compressed-tensors, ModelOpt, AWQ, GPTQ,
    bitsandbytes, FP8, MXFP4, GGUF or plain), bits per weight, KV cache, how far it reads and what is wrong
    with its positions, experts, prediction layers and draft heads, adapters, and which engines read it.
    Reads configs and headers only, and asks the Hub for no more than these.
    """
    from compressor.checkpoint.opened import open_any
    from compressor.errors import UserError
    from compressor.report.contents import contents_of

    opened = open_any(checkpoint, revision=revision)
    if revision is not None and opened.form != "hub":
        raise UserError("--revision goes with a Hub id, not with what lies here", where=checkpoint)
    contents = contents_of(opened)
    if as_json:
        click.echo(json.dumps(contents.to_json(), indent=2))
        return
    from compressor.cli.inspect_view import print_contents

    print_contents(contents, opened.facts)
