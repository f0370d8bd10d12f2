"""Where architectures keep their own prediction layers, and how the layers compute. Importing this is cheap.

From vLLM 0.32 ``model_executor/models/{qwen3_next,qwen3_5,deepseek,glm4_moe,mimo}_mtp.py``, whose proposer
(``v1/spec_decode/llm_base_proposer.py``) applies the first layer again and again: further layers of a
checkpoint are carried, and neither run nor trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compressor.errors import CheckpointError
from compressor.model.families import is_prediction, text_config
from compressor.spec import TensorHeader


@dataclass(frozen=True)
class NativeFamily:
    """The prediction layers of one architecture.

    Attributes:
        model_types: ``model_type`` values, of the whole config or of its text's.
        count_key: key of the config that says how many prediction layers there are.
        assumed: how many where the config lacks the key; None where it must have it.
        block: prefix of a layer's decoder block, with ``{index}`` counted from the first prediction layer or
            ``{behind}`` from the first block of the model.
        embedding_norm: module that norms the token's embedding, as ``block``; likewise the following.
        hidden_norm: that of the hidden state.
        projection: from both to one hidden state.
        last_norm: in front of the output head.
        copies: tensors that repeat the model's own embedding and head; engines share the model's.
        hidden_first: whether the projection reads [hidden, embedding], not [embedding, hidden].
        zeroed: whether the embedding counts as zero at position 0.
        recycled: which hidden state the next step reads: that in front of the last norm, or behind it.
        axes: coordinates of a position, which are equal in texts; 1 where rotary tables take plain positions.
        not_run: why its layers are only carried; "" where they are run.
    """

    model_types: tuple[str, ...]
    count_key: str
    assumed: int | None
    block: str
    embedding_norm: str
    hidden_norm: str
    projection: str
    last_norm: str
    copies: tuple[str, ...] = ()
    hidden_first: bool = False
    zeroed: bool = False
    recycled: Literal["before_norm", "behind_norm"] = "behind_norm"
    axes: int = 1
    not_run: str = ""

    def named(self, pattern: str, config: Mapping[str, Any], index: int = 0) -> str:
        """``block`` or a module's name for layer ``index`` of a config."""
        blocks = text_config(dict(config)).get("num_hidden_layers")
        behind = blocks + index if type(blocks) is int else -1
        return pattern.format(index=index, behind=behind)


def _under_mtp(
    model_types: tuple[str, ...], count_key: str, assumed: int | None, axes: int = 1
) -> NativeFamily:
    return NativeFamily(
        model_types=model_types,
        count_key=count_key,
        assumed=assumed,
        block="mtp.layers.{index}.",
        embedding_norm="mtp.pre_fc_norm_embedding",
        hidden_norm="mtp.pre_fc_norm_hidden",
        projection="mtp.fc",
        last_norm="mtp.norm",
        axes=axes,
    )


def _behind_the_last(
    model_types: tuple[str, ...], recycled: Literal["before_norm", "behind_norm"]
) -> NativeFamily:
    block = "model.layers.{behind}."
    return NativeFamily(
        model_types=model_types,
        count_key="num_nextn_predict_layers",
        assumed=None,
        block=block,
        embedding_norm=f"{block}enorm",
        hidden_norm=f"{block}hnorm",
        projection=f"{block}eh_proj",
        last_norm=f"{block}shared_head.norm",
        copies=(f"{block}embed_tokens.weight", f"{block}shared_head.head.weight"),
        zeroed=True,
        recycled=recycled,
    )


QWEN3_NEXT = _under_mtp(("qwen3_next",), "num_nextn_predict_layers", 1)
# transformers 5.17 modeling_qwen3_5.py: time, height, width.
QWEN3_5 = _under_mtp(
    ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), "mtp_num_hidden_layers", None, axes=3
)
DEEPSEEK_V3 = _behind_the_last(("deepseek_v3",), "behind_norm")
GLM4_MOE = _behind_the_last(("glm4_moe",), "before_norm")
_MIMO_BLOCK = "model.mtp_layers.{index}."
MIMO = NativeFamily(
    model_types=("mimo",),
    count_key="num_nextn_predict_layers",
    assumed=None,
    block=_MIMO_BLOCK,
    embedding_norm=f"{_MIMO_BLOCK}token_layernorm",
    hidden_norm=f"{_MIMO_BLOCK}hidden_layernorm",
    projection=f"{_MIMO_BLOCK}input_proj",
    last_norm=f"{_MIMO_BLOCK}final_layernorm",
    hidden_first=True,
    zeroed=True,
    not_run=(
        "transformers has no MiMo, and vLLM 0.32 asks a quantization config for its prediction layer as a "
        "block behind the last (mimo_mtp.py), a name that the checkpoint does not have"
    ),
)
NATIVE_FAMILIES = (QWEN3_NEXT, QWEN3_5, DEEPSEEK_V3, GLM4_MOE, MIMO)


def native_family(config: Mapping[str, Any]) -> NativeFamily | None:
    """The architecture's entry, by the outer ``model_type`` or the text config's; None without one."""
    types = {config.get("model_type"), text_config(dict(config)).get("model_type")}
    return next((family for family in NATIVE_FAMILIES if types & set(family.model_types)), None)


def prediction_names(headers: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Every tensor of prediction layers, whatever the architecture, in the order of ``headers``."""
    return tuple(name for name in headers if is_prediction(name, dict(config)))


def layer_count(family: NativeFamily, config: Mapping[str, Any]) -> int:
    """How many prediction layers an engine expects.

    Raises:
        CheckpointError: the config does not say, or says nonsense.
    """
    for level in (config, text_config(dict(config))):
        if family.count_key in level:
            count = level[family.count_key]
            if type(count) is not int or count < 0:
                raise CheckpointError(
                    f"{family.count_key} is {str(count)[:40]!r}, not a number of layers", where="config.json"
                )
            return count
    if family.assumed is None:
        raise CheckpointError(
            f"the config has no {family.count_key}, which engines read", where="config.json"
        )
    return family.assumed


def runnable_family(headers: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> NativeFamily:
    """The entry of a checkpoint whose prediction layer can be run.

    Raises:
        CheckpointError: another architecture, one that is only carried, no layer, or none of its tensors.
    """
    family = native_family(config)
    model_type = str(config.get("model_type"))[:40]
    known = sorted({name for known in NATIVE_FAMILIES if not known.not_run for name in known.model_types})
    if family is None or family.not_run:
        raise CheckpointError(
            f"prediction layers of model_type {model_type!r} are not run"
            + (f": {family.not_run}" if family is not None else ""),
            where="drafts.kind",
            fix=f"those of {', '.join(known)} are; eagle3 or draft_model serve other models",
        )
    if layer_count(family, config) < 1 or not prediction_names(headers, config):
        raise CheckpointError(
            "the checkpoint has no prediction layer",
            where="drafts.kind",
            fix="take kind eagle3, or a checkpoint that was saved with its prediction layer",
        )
    return family
