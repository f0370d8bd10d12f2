"""Imported once by the fork server of the kill test: everything slow, and no thread left running."""

import torch
import transformers.models.llama.modeling_llama

import compressor.model.load
import compressor.runner
from compressor.schemes import parse_scheme

assert transformers.models.llama.modeling_llama
assert compressor.model.load
assert compressor.runner
# Compiles the scale search, which forked children then share.
parse_scheme("nvfp4a16").fit([torch.ones(16, 16)], search="full")
