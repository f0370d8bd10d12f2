"""Configs of strangers: whatever stands in them, a message or a config comes back, and no other exception."""

from __future__ import annotations

import contextlib
import json
import math
from itertools import product
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import UserError
from compressor.rope.checked import check_positions
from compressor.rope.scaled import scaled_config
from compressor.rope.spec import ContextSpec, Method
from tests.rope.test_refusals import YARN
from tests.rope.test_scaled import LLAMA

_PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**63, 10**400, 8192, 32]),
    st.floats(),
    st.text(max_size=5),
)
_VALUES = st.recursive(
    _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
_FIELDS = st.sampled_from(
    [
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "mrope_section"),
        *(
            "beta_fast",
            "attention_factor",
            "short_factor",
            "long_factor",
            "low_freq_factor",
            "high_freq_factor",
        ),
        *("partial_rotary_factor", "full_attention", "sliding_attention"),
    ]
)
_SECTIONS = st.dictionaries(_FIELDS, _VALUES, max_size=4)
TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "su", "proportional", "other")
_CONFIGS = st.dictionaries(
    st.sampled_from(
        [
            *("model_type", "hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings"),
            *("rope_theta", "rope_scaling", "rope_parameters", "text_config", "partial_rotary_factor"),
            *("kv_lora_rank", "qk_rope_head_dim", "original_max_position_embeddings", "sliding_window"),
        ]
    ),
    _VALUES,
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(
    changed=_CONFIGS,
    section=st.none() | _SECTIONS,
    kind=st.sampled_from(TYPES),
    legacy=st.booleans(),
    spec=st.builds(
        ContextSpec,
        st.sampled_from(["linear", "ntk", "yarn", "longrope", "llama3"]),
        st.sampled_from([16384, 65536]),
        factors=st.none() | st.just((1.5,) * 32),
    ),
)
def test_nothing_but_messages(
    changed: dict[str, Any], section: dict[str, Any] | None, kind: str, legacy: bool, spec: ContextSpec
) -> None:
    """Of ``scaled_config`` and ``check_positions``; what comes back can be written as JSON."""
    config = LLAMA | changed
    if section is not None:
        where = "rope_scaling" if legacy else "rope_parameters"
        config |= {where: YARN | {"rope_type": kind} | section}
    _answers(config, spec)


def _answers(config: dict[str, Any], spec: ContextSpec) -> None:
    """Fails unless there are findings, a message or a config."""
    for finding in check_positions(config):
        assert finding.what
    with contextlib.suppress(UserError):
        json.dumps(scaled_config(config, spec).config)


def test_every_field_for_itself() -> None:
    """Each type with each wrong value in each field, asked to be made longer and to be scaled."""
    values: list[Any] = [None, True, 0, -1, 3, 10**400, 1e308, math.nan, math.inf, "a", "4", [], [1.0], {}]
    whole = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    lists = {"short_factor": [2.0] * 32, "long_factor": [2.0] * 32}
    fields = [*whole, *lists, "mscale", "truncate", "beta_slow", "partial_rotary_factor", "mrope_section"]
    methods: tuple[Method, ...] = ("yarn", "llama3", "ntk")
    for kind, field, value, method in product(TYPES, fields, values, methods):
        section = whole | lists | {"rope_type": kind} | {field: value}
        _answers(LLAMA | {"rope_parameters": section}, ContextSpec(method, 65536))
        _answers(LLAMA | {"rope_parameters": {"full_attention": section}}, ContextSpec(method, 65536))
