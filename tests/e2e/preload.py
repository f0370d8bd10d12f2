"""Imported once by the fork server of the kill test: everything slow, and no thread left running."""

import torch
import transformers.models.llama.modeling_llama

import compressor.calibration.tokens
import compressor.model.load
import compressor.model.tape
import compressor.runner
from compressor.kernels import columns
from compressor.numerics.grids import E2M1
from compressor.schemes import parse_scheme

assert transformers.models.llama.modeling_llama
assert compressor.model.load
assert compressor.runner
assert compressor.calibration.tokens
assert compressor.model.tape
# Compiles what forked children then share. No linear algebra: its threads would not survive the fork.
parse_scheme("nvfp4a16").fit([torch.ones(16, 16)], search="full")
rows, table = torch.zeros(1, 16, 16), torch.ones(1, 16, 1)
group = torch.zeros(1, 16, dtype=torch.int64)
chosen = columns.sweep(rows, None, rows, table, 0 * table, group, E2M1)
blocks = (torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16))
columns.refit(rows, chosen, rows, *blocks, table[..., None], 0 * table[..., None], E2M1)
