"""Hears keys, values and queries of calibration texts: of a whole model with gradients, or block by block.

Legend: N sequences, T tokens, B sequences of a batch (one), Q query heads, H KV heads, D head_dim, E = H * D.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.errors import CheckpointError
from compressor.kv.base import KvCodec
from compressor.kv.fit_statistics import LayerStatistics, SideStatistics
from compressor.model.attention_heard import HeardAttention, heard_attention
from compressor.model.hidden import HiddenStates
from compressor.model.tape import Tape
from compressor.model.whole import WholeModel
from compressor.progress import Progress

_SEED = 0
_OUTPUTS = ("o_proj", "out_proj", "dense")


@dataclass
class Gathered:
    """What was heard.

    Attributes:
        layers: of each layer.
        tokens: heard in all.
        tried_tokens: on which codecs were measured.
        gradients: whether ``errors`` and metrics are of the loss; else errors are those of the attention's
            output relative to itself, and metrics what queries do to keys and the projection to values.
    """

    gradients: bool
    layers: dict[int, LayerStatistics] = field(default_factory=dict)
    tokens: int = 0
    tried_tokens: int = 0


@dataclass(frozen=True)
class Wanted:
    """What to listen for.

    Attributes:
        layers: indices of the layers of full attention.
        sink: first tokens of a sequence that are stored in 16 bit.
        most_rows: tokens of a layer kept.
        codecs: of keys and of values, by name, whose errors are measured.
        tried: sequences on which they are.
        frequencies_P: of rotary pairs, fp32; None where they are not known.
    """

    layers: Collection[int]
    sink: int
    most_rows: int
    codecs: tuple[Mapping[str, KvCodec], Mapping[str, KvCodec]]
    tried: int
    frequencies_P: torch.Tensor | None = None


def gather_whole(
    source: Source, ids_NT: torch.Tensor, wanted: Wanted, device: torch.device, progress: Progress
) -> Gathered:
    """One pass forth and back for each sequence, with labels that the model itself draws.

    So the gradients' second moments are its Fisher information, which for small changes is twice what they do
    to the mean KL divergence; labels of the text would add how wrong the model is.

    Raises:
        CheckpointError: the model cannot be loaded, or its attention cannot be heard.
    """
    model = WholeModel.load(source, dtype=torch.float32, device=device).model
    gathered = Gathered(gradients=True, tried_tokens=ids_NT[: wanted.tried].numel())
    drawn = torch.Generator(device).manual_seed(_SEED)
    calls: dict[int, tuple[HeardAttention, torch.Tensor, torch.Tensor]] = {}

    def hear(call: HeardAttention) -> tuple[torch.Tensor, torch.Tensor] | None:
        if call.layer not in wanted.layers:
            return None
        key, value = _leading(call.key_BHTD), _leading(call.value_BHTD)
        calls[call.layer] = (call, key, value)
        return key, value

    progress.start("kv statistics", ids_NT.numel(), "tokens")
    for number, ids_T in enumerate(ids_NT):
        calls.clear()
        with torch.enable_grad(), heard_attention(model, hear):
            logits_TV = model(ids_T[None].to(device), use_cache=False).logits[0].float()
            labels_T = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=drawn)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
            _check_all_heard(calls, wanted, source)
            torch.autograd.backward(loss)
        for index, (call, key, value) in calls.items():
            layer = _layer_of(gathered, index, call, wanted)
            sides = ((layer.keys, key), (layer.values, value))
            for (side, x), codecs in zip(sides, wanted.codecs, strict=True):
                assert x.grad is not None
                side.add(x.detach(), x.grad, wanted.sink, _stride(ids_NT, wanted))
                if number < wanted.tried:
                    side.try_codecs(x.detach(), x.grad, codecs)
            if wanted.frequencies_P is not None:
                told = (wanted.frequencies_P, wanted.most_rows, wanted.sink, _stride(ids_NT, wanted))
                layer.add_turned_keys(key.detach(), key.grad, *told)
        gathered.tokens += len(ids_T)
        progress.advance(len(ids_T))
    progress.finish()
    return gathered


def gather_blocks(
    source: Source, ids_NT: torch.Tensor, wanted: Wanted, device: torch.device, progress: Progress
) -> Gathered:
    """Block by block, so that no more than a block and the hidden states are in memory; without gradients.

    Errors of codecs are measured at the output of the attention, through its projection where it has one,
    relative to that output.

    Raises:
        CheckpointError: the model cannot be walked, or its attention cannot be heard.
    """
    states = HiddenStates(device)
    batches = [ids_T[None] for ids_T in ids_NT]
    tape = Tape.record(source, batches, dtype=torch.float32, device=device, states=states)
    gathered = Gathered(gradients=False, tokens=ids_NT.numel(), tried_tokens=ids_NT[: wanted.tried].numel())
    progress.start("kv statistics", len(tape.blocks) * ids_NT.numel(), "tokens")
    for index in range(len(tape.blocks)):
        block = tape.place(tape.load(index))
        for batch in range(len(batches)):
            calls: list[HeardAttention] = []
            hear = _keep(calls, wanted)
            with heard_attention(block.module, hear):
                made = tape.run(block, states, batch)
            assert made is not None
            states.put(batch, made)
            for call in calls:
                _hear_plainly(gathered, call, wanted, _stride(ids_NT, wanted), measured=batch < wanted.tried)
            progress.advance(ids_NT.shape[1], tape.blocks[index])
    progress.finish()
    _check_all_heard(gathered.layers, wanted, source)
    return gathered


def _keep(calls: list[HeardAttention], wanted: Wanted) -> Callable[[HeardAttention], None]:
    def hear(call: HeardAttention) -> None:
        if call.layer in wanted.layers:
            calls.append(call)

    return hear


def _hear_plainly(
    gathered: Gathered, call: HeardAttention, wanted: Wanted, stride: int, *, measured: bool
) -> None:
    """Statistics of one call without gradients; ``measured``: the codecs' errors, too."""
    layer = _layer_of(gathered, call.layer, call, wanted)
    weight = _projection(call.module, call.query_BQTD.shape[1] * call.query_BQTD.shape[3])
    for side, x in ((layer.keys, call.key_BHTD), (layer.values, call.value_BHTD)):
        side.add(x, None, wanted.sink, stride)
        side.tokens += x.shape[0] * x.shape[2]
    # What queries do to errors of keys; every token's are multiplied by all later queries.
    layer.keys.metric_EE = call.scaling**2 * _block_diagonal(layer.query_HDD)
    if wanted.frequencies_P is not None:
        told = (wanted.frequencies_P, wanted.most_rows, wanted.sink, stride)
        side = layer.add_turned_keys(call.key_BHTD, None, *told)
        side.tokens = layer.keys.tokens
        side.metric_EE = call.scaling**2 * _block_diagonal(layer.turned_query_HDD)
    if weight is not None:
        parts = weight.double().cpu().reshape(len(weight), layer.heads, -1, layer.head_dim)
        gram_HDD = torch.einsum("ohqd,ohqe->hde", parts, parts)
        layer.values.metric_EE = layer.values.tokens * _block_diagonal(gram_HDD)
    else:
        layer.values.metric_EE = layer.values.tokens * torch.eye(layer.heads * layer.head_dim).double()
    if not measured:
        return

    def output(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads = call.attend(key, value).flatten(2)
        return heads if weight is None else heads @ weight.T

    plain = output(call.key_BHTD, call.value_BHTD)
    scale = float(plain.double().square().sum()) / plain.shape[1]
    for name, codec in wanted.codecs[0].items():
        moved = output(through(codec, call.key_BHTD), call.value_BHTD) - plain
        _add_error(layer.keys, name, moved, scale)
    for name, codec in wanted.codecs[1].items():
        moved = output(call.key_BHTD, through(codec, call.value_BHTD)) - plain
        _add_error(layer.values, name, moved, scale)


def _add_error(side: SideStatistics, name: str, moved: torch.Tensor, scale: float) -> None:
    side.errors[name] = side.errors.get(name, 0.0) + float(moved.double().square().sum()) / max(scale, 1e-30)


def through(codec: KvCodec, x: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., D] as a codec gives them back."""
    return codec.decode(codec.encode(x), x.shape[-1], x.dtype)


def _projection(attention: nn.Module, width: int) -> torch.Tensor | None:
    """[O, Q * D]: the weight that reads the attention's output, where it is called as usual."""
    for name in _OUTPUTS:
        found = getattr(attention, name, None)
        if isinstance(found, nn.Linear) and found.weight.shape[1] == width:
            return found.weight.detach()
    return None


def _block_diagonal(blocks_HDD: torch.Tensor) -> torch.Tensor:
    """[E, E] of the heads' own blocks."""
    heads, head_dim, _ = blocks_HDD.shape
    made = blocks_HDD.new_zeros(heads, head_dim, heads, head_dim)
    made[range(heads), :, range(heads)] = blocks_HDD
    return made.reshape(heads * head_dim, heads * head_dim)


def _leading(x: torch.Tensor) -> torch.Tensor:
    """The same, with a gradient to come."""
    if not x.requires_grad:
        return x.detach().requires_grad_()
    x.retain_grad()
    return x


def _layer_of(gathered: Gathered, index: int, call: HeardAttention, wanted: Wanted) -> LayerStatistics:
    """The layer's statistics, which hear the call's queries."""
    _, heads, _, head_dim = call.key_BHTD.shape
    layer = gathered.layers.setdefault(index, LayerStatistics(heads, head_dim, wanted.most_rows))
    layer.add_queries(call.query_BQTD, wanted.frequencies_P)
    return layer


def _stride(ids_NT: torch.Tensor, wanted: Wanted) -> int:
    return max(1, -(-ids_NT.numel() // wanted.most_rows))


def _check_all_heard(heard: Collection[int], wanted: Wanted, source: Source) -> None:
    missing = sorted(set(wanted.layers) - set(heard))
    if missing:
        raise CheckpointError(
            f"the attention of layer {missing[0]} does not go through transformers' table of attention "
            "functions, so its keys and values cannot be heard",
            where=source.label,
            fix="set kv_cache.calibrate: false, or leave the cache of this model in 16 bit",
        )
