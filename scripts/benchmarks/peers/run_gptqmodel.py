"""GPT-QModel: GPTQ with its default activation-aware group order, symmetric, in its own format."""

from __future__ import annotations

from gptqmodel import BACKEND, GPTQConfig, GPTQModel
from shared import Job


def main() -> None:
    """Runs one job."""
    job = Job.from_command_line()
    assert job.scheme == "int4g64", "the only one of the schemes that its formats hold"
    config = GPTQConfig(bits=4, group_size=64, sym=True, **job.options)
    model = GPTQModel.load(str(job.source), config)
    records = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.ids_NT.tolist()]
    with job.timed("quantize"):
        model.quantize(records, batch_size=1, backend=BACKEND.AUTO)
    with job.timed("save"):
        model.save(str(job.target))
        job.tokenizer().save_pretrained(job.target)
    job.report(["gptqmodel"])


if __name__ == "__main__":
    main()
