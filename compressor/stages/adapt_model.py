"""A model with low-rank adapters beside its attention projections, and what of it is trained.

Legend: O output features, I input features, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import torch_dtype
from compressor.errors import CheckpointError, UserError
from compressor.model.attention_targets import attention_targets
from compressor.model.families.naming import leaf
from compressor.model.quiet import quiet
from compressor.model.skeleton import library_faults
from compressor.model.whole import WholeModel

_ADAPTER = "default"
_LISTED = 8


class AdaptedModel:
    """A source's model, frozen but for adapters, and for norms and embeddings where these are trained.

    Attributes:
        whole: the model; adapters are inside it.
        layers: module path -> the projection with its adapter (``peft.tuners.lora.Linear``).
        direct: name -> parameter that is trained as it is; a tied one has one name.
        dtype: of the frozen parameters, and of matrix products; trained ones are fp32.

    Args:
        source: the checkpoint.
        rank: of the adapters.
        alpha: their outputs are multiplied by ``alpha / rank``.
        targets: leaf names of the layers that get one; empty for the projections of attention.
        norms: whether the weights of norms are trained.
        embeddings: whether the input embedding is trained, and with it a tied head.
        seed: of the adapters' first values.
        dtype: see above.
        device: where to compute.

    Raises:
        CheckpointError: the model cannot be loaded, or what is to be trained not be written back.
        UserError: no layer has a name of ``targets``.
    """

    def __init__(
        self,
        source: Source,
        *,
        rank: int,
        alpha: int,
        targets: tuple[str, ...],
        norms: bool,
        embeddings: bool,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._source, self.dtype, self._device = source, dtype, device
        self.whole = WholeModel.load(source, dtype=dtype, device=device)
        self._tie()
        paths = self._targets(targets)
        self.direct = self._direct(norms=norms, embeddings=embeddings)
        self._check_written([f"{path}.weight" for path in paths])
        self._unround()
        self.layers = self._inject(paths, rank, alpha, seed)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)

    @property
    def config(self) -> dict[str, Any]:
        """The source's."""
        return self._source.config

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Name -> every trained parameter, fp32: those of adapters first, then ``direct``."""
        found: dict[str, Any] = {}
        for path, layer in self.layers.items():
            found[f"{path}.lora_A"] = layer.lora_A[_ADAPTER].weight
            found[f"{path}.lora_B"] = layer.lora_B[_ADAPTER].weight
        return found | self.direct

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it products of matrices are of ``dtype``, whatever their operands are."""
        return torch.autocast(self._device.type, self.dtype, enabled=self.dtype != torch.float32)

    def recompute_blocks(self) -> None:
        """From now on blocks forget what they compute and compute it again on the way back.

        What attention put out is kept: of long sequences it costs most. transformers' own checkpointing.

        Raises:
            CheckpointError: the model does not offer it.
        """
        from torch.utils.checkpoint import create_selective_checkpoint_contexts
        from transformers.modeling_layers import GradientCheckpointingLayer

        model = self.whole.model
        kept = partial(create_selective_checkpoint_contexts, _attention_operations())
        with library_faults(self._source.label, "its blocks cannot be recomputed"):
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={
                    "use_reentrant": False,
                    "preserve_rng_state": False,
                    "context_fn": kept,
                }
            )
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # Not ``train()``: it is for the layer's own switch, and dropout inside stays off.
                module.training = True

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(checkpoint name, tensor of the source's dtype) of everything that training changed.

        W + B A alpha / rank in fp32, rounded once.

        Raises:
            UserError: a value is not finite.
        """
        tensors, headers = self.whole.tensors, self._source.headers
        for path, layer in self.layers.items():
            delta = layer.get_delta_weight(_ADAPTER).float().cpu()
            for piece in tensors.pieces[f"{path}.weight"]:
                weight = self._source.read(piece.tensor)
                yield piece.tensor, _finite(piece.tensor, (weight.float() + piece.of(delta)).to(weight.dtype))
        for name, parameter in self._all_names().items():
            for piece in tensors.pieces[name]:
                value = piece.of(parameter.detach()).cpu().to(torch_dtype(headers[piece.tensor].dtype))
                yield piece.tensor, _finite(piece.tensor, value.contiguous())

    @property
    def changed(self) -> list[str]:
        """Checkpoint names of the tensors that ``merged`` gives."""
        names = [*(f"{path}.weight" for path in self.layers), *self._all_names()]
        return [piece.tensor for name in names for piece in self.whole.tensors.pieces[name]]

    def adapters(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module path -> A [R, I] and B [O, R], fp32."""
        return {
            path: (layer.lora_A[_ADAPTER].weight.detach(), layer.lora_B[_ADAPTER].weight.detach())
            for path, layer in self.layers.items()
        }

    def _all_names(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of ``direct``, under one name for each set of source tensors that fills it."""
        mine = {id(parameter) for parameter in self.direct.values()}
        found: dict[tuple[Any, ...], tuple[str, nn.Parameter]] = {}
        for name, parameter in self.whole.model.named_parameters(remove_duplicate=False):
            if id(parameter) in mine:
                found.setdefault(self.whole.tensors.pieces.get(name, ()), (name, parameter))
        return dict(found.values())

    def _tie(self) -> None:
        """Makes parameters that the model ties, and that were read apart, one again."""
        model = self.whole.model
        for pair in model.all_tied_weights_keys.items():
            tied, kept = (model.get_parameter(name) for name in pair)
            if tied is not kept and torch.equal(tied, kept):
                path, _, name = pair[0].rpartition(".")
                model.get_submodule(path).register_parameter(name, kept)

    def _targets(self, chosen: tuple[str, ...]) -> list[str]:
        """Paths of the linear layers in the blocks that get an adapter."""
        from transformers.pytorch_utils import Conv1D

        linear = [
            path
            for path, module in self.whole.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and any(path.startswith(f"{block}.") for block in self.whole.blocks)
            and (type(module) in (nn.Linear, Conv1D) or _is_product(module))
        ]
        found = attention_targets(linear, chosen)
        if not found:
            names = sorted({leaf(path) for path in linear})
            raise UserError(
                f"no layer is called {' or '.join(chosen) or 'as a projection of attention is'}",
                where="adapters.targets",
                fix=f"name some of its layers: {', '.join(names[:_LISTED])}",
            )
        return found

    def _direct(self, *, norms: bool, embeddings: bool) -> dict[str, nn.Parameter]:
        model = self.whole.model
        found: dict[str, nn.Parameter] = {}
        wanted = set()
        if norms:
            decoder = model.get_decoder()
            wanted |= {id(parameter) for module in decoder.modules() for parameter in _norm_weights(module)}
        if embeddings:
            wanted.add(id(model.get_input_embeddings().weight))
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                if id(parameter) in wanted:
                    found.setdefault(name, parameter)
        once: dict[int, str] = {}
        for name, parameter in found.items():
            once.setdefault(id(parameter), name)
        return {name: found[name] for name in once.values()}

    def _check_written(self, weights: list[str]) -> None:
        """Refuses, before anything is trained, what no tensor of the checkpoint could take."""
        for name in [*weights, *self.direct]:
            if name not in self.whole.tensors.pieces:
                raise CheckpointError(
                    f"{name} cannot be trained: how it is made of the checkpoint's tensors cannot be undone",
                    where=self._source.label,
                    fix="leave it out of adapters.targets or adapters.train",
                )

    def _unround(self) -> None:
        """Reads what is trained as it is in fp32; its outputs are still of ``dtype``."""
        for parameter in self.direct.values():
            parameter.data = parameter.data.float()
        if self.dtype == torch.float32:
            return
        self.whole.tensors.fill(self._source, {name: found.data for name, found in self.direct.items()})
        mine = {id(parameter) for parameter in self.direct.values()}
        head = self.whole.model.get_output_embeddings()
        for module in self.whole.model.modules():
            if module is not head and any(id(own) in mine for own in module.parameters(recurse=False)):
                module.register_forward_hook(lambda _module, _inputs, output: output.to(self.dtype))

    def _inject(self, paths: list[str], rank: int, alpha: int, seed: int) -> dict[str, Any]:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths, lora_dropout=0.0, bias="none")
        model = self.whole.model
        with (
            torch.random.fork_rng(devices=[]),
            quiet(),
            library_faults(self._source.label, "peft refuses it"),
        ):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
        layers = {}
        for path in paths:
            layer: Any = model.get_submodule(path)
            # It would make fp32 copies of its inputs; autocast rounds the small matrices instead.
            layer.cast_input_dtype_enabled = self.dtype == torch.float32
            for part in (layer.lora_A, layer.lora_B):
                part[_ADAPTER].weight.data = part[_ADAPTER].weight.data.to(self._device, torch.float32)
            layers[path] = layer
        return layers


@torch.no_grad()
def _is_product(module: Any) -> bool:
    """Whether a subclass of ``Linear`` computes what one does: DeepSeek-V4's takes its inputs in groups."""
    weight_OI = module.weight
    x_1I = torch.linspace(-1, 1, weight_OI.shape[1], device=weight_OI.device, dtype=weight_OI.dtype)[None]
    wanted_1O = nn.functional.linear(x_1I, weight_OI, module.bias)
    try:
        found_1O = module(x_1I)
    except (RuntimeError, ValueError, IndexError):
        return False
    return found_1O.shape == wanted_1O.shape and torch.allclose(found_1O, wanted_1O, rtol=0.02, atol=1e-3)


def _norm_weights(module: nn.Module) -> list[nn.Parameter]:
    """The vectors of a norm; none of another module."""
    own = list(module.parameters(recurse=False))
    called = type(module).__name__.lower()
    is_norm = bool(own) and all(parameter.dim() == 1 for parameter in own)
    return own if is_norm and ("norm" in called) else []


def _attention_operations() -> list[Any]:
    """Fused attention of every kind that ``scaled_dot_product_attention`` calls."""
    aten = torch.ops.aten
    return [
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not bool(tensor.isfinite().all()):
        raise UserError(
            f"{name}: trained values are not finite, or too large for {tensor.dtype}",
            where="adapters.learning_rate",
            fix="lower it",
        )
    return tensor
