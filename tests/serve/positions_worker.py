"""Runs in the engine's environment: the tables of rotary positions that vLLM makes of models' configs.

    python positions_worker.py MODELS.json OUT.safetensors

MODELS.json: name -> ``folder`` with config.json, and ``longest``, tokens of a request, or null for what vLLM
takes by itself. Each model is built as vLLM builds it to serve it; no weights are read. OUT.safetensors: the
tables of cosines before sines, [positions, rotary_dim], as requests index them (``NAME.0`` and, where layers
differ, ``NAME.1``), and the tokens of the longest request (``NAME.longest``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def main(asked_at: str, out_at: str) -> None:
    """Builds, reads, writes."""
    from safetensors.torch import save_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port

    found: dict[str, torch.Tensor] = {}
    for name, asked in json.loads(Path(asked_at).read_text()).items():
        config = EngineArgs(
            model=asked["folder"],
            max_model_len=asked["longest"],
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
        ).create_engine_config()
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                init_distributed_environment(
                    1, 0, get_distributed_init_method("127.0.0.1", get_open_port()), 0, "gloo"
                )
                ensure_model_parallel_initialized(1, 1)
            model = initialize_model(vllm_config=config)
        tables: list[torch.Tensor] = []
        for module in model.modules():
            table = _table(module)
            if table is not None and not any(torch.equal(table, known) for known in tables):
                tables.append(table)
        found |= {f"{name}.{index}": table.float().clone() for index, table in enumerate(tables)}
        found[f"{name}.longest"] = torch.tensor(config.model_config.max_model_len)
    save_file(found, out_at)


def _table(module: torch.nn.Module) -> torch.Tensor | None:
    """What positions index in it, or None where it is no rotary embedding."""
    both: torch.Tensor | None = getattr(module, "long_short_cos_sin_cache", None)
    if both is not None:
        assert module.use_long_rope, "served with the short factors"
        return both[module.original_max_position_embeddings :]
    table: torch.Tensor | None = getattr(module, "cos_sin_cache", None)
    return table


if __name__ == "__main__":
    main(*sys.argv[1:])
