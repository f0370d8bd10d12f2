"""Whatever config.json holds: a message, or a source that can be planned; never another exception."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.checkpoint.layout import fingerprint, parse_config
from compressor.dialects import DIALECTS
from compressor.errors import CheckpointError, PlanError
from compressor.model.families import family_for, tied
from compressor.planner.claims import claim_tensors
from compressor.planner.kv_architectures import ARCHITECTURES
from compressor.planner.kv_bytes import full_context, kv_bytes
from compressor.planner.layout import group_units
from compressor.planner.predict import predict
from compressor.recipe.model import WeightsSection

from .fakes import llama_headers

HEADERS = llama_headers(layers=1, hidden=16, wide=32, kv=16, vocab=32)
SECTION = WeightsSection.model_validate({"scheme": "nvfp4a16"})
# Every key that planning looks at.
KEYS = sorted(
    {key for architecture in ARCHITECTURES.values() for key in architecture.defaults}
    | {"model_type", "architectures", "text_config", "llm_config", "tie_word_embeddings", "layer_types"}
    | {"max_position_embeddings", "num_kv_shared_layers", "no_rope_layers", "quantization_config", "a"}
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([0, -1, 1, 3, 2**53 - 1, 2**53, 10**30, -(10**30), "3", "full_attention", "\ud800"]),
    st.sampled_from(sorted(ARCHITECTURES)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=20,
)
ANY = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=12)
# Of a known architecture, which looks at more of what it is given.
KNOWN = st.builds(
    lambda fields, name: fields | {"model_type": name}, ANY, st.sampled_from(sorted(ARCHITECTURES))
)


def plan(config: dict[str, Any]) -> None:
    """What ``compress plan`` does with a config."""
    family = family_for(config)
    assert isinstance(tied(config, HEADERS), bool)
    context = full_context(config)
    known, reason = kv_bytes(config, context or 1)
    assert (known is None) == bool(reason)
    assert len(fingerprint(config, HEADERS, {}, [])) == 64
    try:
        claims = claim_tensors(HEADERS, config, family, SECTION, DIALECTS["compressed-tensors"])
    except PlanError:
        return
    predicted = predict(claims, group_units(claims), config, 0)
    assert min(predicted.gpus_before.values()) >= 1


@settings(max_examples=300, deadline=None)
@given(st.one_of(ANY, KNOWN))
def test_any_object_is_refused_or_planned(config: dict[str, Any]) -> None:
    """As bytes of a file, the way that sources read it."""
    try:
        parsed = parse_config(json.dumps(config).encode(), "config.json")
    except CheckpointError as error:
        str(error).encode()
        return
    plan(parsed)


@settings(max_examples=200, deadline=None)
@given(KNOWN)
def test_large_numbers_of_a_known_architecture_do_not_overflow(config: dict[str, Any]) -> None:
    """Every number as large as a config may have it."""
    largest = dict.fromkeys(KEYS, 2**53 - 1) | config
    for key in ("architectures", "text_config", "llm_config", "quantization_config"):
        del largest[key]
    numbers = {key: value for key, value in largest.items() if isinstance(value, int | str)}
    try:
        parsed = parse_config(json.dumps(numbers).encode(), "config.json")
    except CheckpointError:
        return
    plan(parsed | {"num_hidden_layers": 10_000})
