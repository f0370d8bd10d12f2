"""Matrices inside tensors, and lists of modules as engine patterns."""

from __future__ import annotations

import re
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import CheckpointError
from compressor.model.names import expert_patterns, extract, insert, module_of, target_patterns
from compressor.spec import LinearPart


def matched(entry: str, name: str) -> bool:
    """How compressed-tensors and vLLM read an entry."""
    return bool(re.match(entry.removeprefix("re:"), name)) if entry.startswith("re:") else entry == name


def matches(entries: list[str], names: set[str]) -> set[str]:
    """The names that any entry matches."""
    return {name for name in names if any(matched(entry, name) for entry in entries)}


def moe(layers: int, experts: int) -> set[str]:
    """Module names of a mixture of experts with a shared head."""
    names = {"lm_head"}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        names |= {f"{block}.self_attn.{kind}_proj" for kind in "qkvo"}
        names |= {
            f"{block}.mlp.experts.{expert}.{kind}_proj"
            for expert in range(experts)
            for kind in ("gate", "up", "down")
        }
    return names


def test_module_of_drops_only_the_weight():
    """A bare parameter is its own module."""
    assert module_of("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj"
    assert module_of("model.layers.0.feed_forward.experts.down_proj") == (
        "model.layers.0.feed_forward.experts.down_proj"
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_extract_equals_manual_indexing_and_insert_undoes_it(transposed):
    """Gate and up of three experts in one 3-D tensor, stored either way round."""
    gate_up = torch.randn(3, 8, 10) if transposed else torch.randn(3, 10, 8)
    parts = [
        LinearPart(f"{expert}.{half}", 5, 8, expert=expert, transposed=transposed, row_start=start)
        for expert in range(3)
        for half, start in (("gate", 0), ("up", 5))
    ]
    matrices = [(part, extract(gate_up, part)) for part in parts]
    for part, matrix_OI in matrices:
        assert matrix_OI.is_contiguous()
        for row in range(5):
            for column in range(8):
                index = (column, row + part.row_start) if transposed else (row + part.row_start, column)
                assert matrix_OI[row, column] == gate_up[part.expert][index]
        torch.testing.assert_close(extract(gate_up[part.expert], part), matrix_OI, rtol=0, atol=0)
    rebuilt = insert(reversed(matrices), tuple(gate_up.shape))
    torch.testing.assert_close(rebuilt, gate_up, rtol=0, atol=0)


def test_insert_refuses_a_tensor_that_is_not_full():
    """A forgotten part must not leave uninitialised memory."""
    part = LinearPart("a", 2, 4)
    with pytest.raises(AssertionError, match="8 of 16"):
        insert([(part, torch.zeros(2, 4))], (4, 4))


def test_a_whole_model_needs_one_entry_for_each_parent():
    """Numbers collapse, siblings become alternatives, the head is a plain name."""
    names = moe(4, 8)
    assert target_patterns(names, names) == [
        "lm_head",
        r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.(down_proj|gate_proj|up_proj)$",
        r"re:model\.layers\.\d+\.self_attn\.(k_proj|o_proj|q_proj|v_proj)$",
    ]


def test_layers_left_out_become_alternatives_in_numeric_order():
    """Everything but layer 3 of 12: numbers are listed, experts within stay collapsed."""
    names = moe(12, 4)
    chosen = {name for name in names if name != "lm_head" and ".layers.3." not in name}
    assert target_patterns(chosen, names) == [
        r"re:model\.layers\.(0|1|2|4|5|6|7|8|9|10|11)\.mlp\.experts\.\d+\.(down_proj|gate_proj|up_proj)$",
        r"re:model\.layers\.(0|1|2|4|5|6|7|8|9|10|11)\.self_attn\.(k_proj|o_proj|q_proj|v_proj)$",
    ]


def test_one_module_is_written_by_its_name():
    """So that a person finds it, and engines that rename modules can map it."""
    names = moe(4, 4)
    assert target_patterns({"model.layers.2.self_attn.o_proj"}, names) == ["model.layers.2.self_attn.o_proj"]
    assert target_patterns(set(), names) == []


def test_shards_of_fused_layers_are_matched_alike():
    """vLLM asks for q, k and v of ``qkv_proj``; the fused name itself must match no entry."""
    names = moe(6, 2)
    ignored = {name for name in names if ".layers.5." in name or name == "lm_head"}
    entries = target_patterns(ignored, names)
    for layer in range(6):
        prefix = f"model.layers.{layer}.self_attn"
        assert not any(matched(entry, f"{prefix}.qkv_proj") for entry in entries)
        shards = [any(matched(entry, f"{prefix}.{kind}_proj") for entry in entries) for kind in "qkv"]
        assert shards == [layer == 5] * 3


_WORDS = ["a", "b", "layers", "q_proj", "x+", "(", "[0]", "a$", "0", "1", "2", "10", "01", "٣", "²"]


@given(
    st.sets(st.lists(st.sampled_from(_WORDS), min_size=1, max_size=4).map(".".join), max_size=40),
    st.booleans(),
    st.data(),
)
def test_entries_match_exactly_the_chosen_names(names, exact, data):
    """Whatever the names: characters special to regexes, numbers anywhere, digits that are not decimal."""
    chosen = {name for name in sorted(names) if data.draw(st.booleans())}
    entries = target_patterns(chosen, names, exact=exact)
    assert matches(entries, names) == chosen
    assert len(entries) <= len(chosen)
    if exact:
        assert entries == sorted(chosen)


def mapped(entries: list[str], prefixes: dict[str, str]) -> list[str]:
    """vLLM's ``apply_vllm_mapper``: dotted plain names get the engine's prefix, regexes stay."""

    def one(entry: str) -> str:
        old = next((old for old in prefixes if entry.startswith(old)), None)
        plain = "." in entry and not entry.startswith("re:")
        return prefixes[old] + entry.removeprefix(old) if plain and old else entry

    return [one(entry) for entry in entries]


PREFIXES = {"model.visual.": "visual.", "model.language_model.": "language_model.model."}


def test_exact_entries_survive_an_engine_that_renames_modules():
    """In a model with a vision tower, the engine's names are matched only where entries are plain names."""
    tower = {f"model.visual.blocks.{block}.attn.{leaf}" for block in range(3) for leaf in ("qkv", "proj")}
    text = {f"model.language_model.layers.{layer}.mlp.down_proj" for layer in range(4)}
    for chosen in (tower, text):
        theirs = set(mapped(sorted(chosen), PREFIXES))
        every = set(mapped(sorted(tower | text), PREFIXES))
        assert matches(mapped(target_patterns(chosen, tower | text, exact=True), PREFIXES), every) == theirs
        assert not matches(mapped(target_patterns(chosen, tower | text), PREFIXES), every)


def fused(*layers: int, prefix: str = "model.") -> list[str]:
    """gpt-oss: two weights and two biases of all experts of a layer."""
    return [
        f"{prefix}layers.{layer}.mlp.experts.{leaf}"
        for layer in layers
        for leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    ]


def test_fused_experts_are_ignored_by_the_names_that_engines_ask_for():
    """Every expert of these layers, nothing of others, and one entry however many layers."""
    entries = expert_patterns([*fused(0, 3, 12), "model.conv1d.weight", "model.layers.1.shared_experts.up"])
    assert entries == [r"re:model\.layers\.(0|3|12)\.mlp\.experts\..*$"]
    asked = {
        f"model.layers.{layer}.{part}"
        for layer in (0, 1, 2, 3, 12, 31)
        for part in (
            "mlp.experts.0.gate_proj",
            "mlp.experts.7.w2",
            "mlp.router",
            "mlp.shared_experts.up_proj",
        )
    }
    assert matches(entries, asked) == {
        name for name in asked if ".experts." in name and name.split(".")[2] in ("0", "3", "12")
    }
    assert expert_patterns([]) == expert_patterns(["model.visual.conv.weight"]) == []
    assert expert_patterns(["experts.w"]) == [r"re:experts\..*$"]


def test_fused_experts_by_plain_names():
    """Those of expert 0, which engines ask for, so that they can be renamed."""
    entries = expert_patterns(fused(2, prefix="model.language_model."), exact=True)
    asked = {f"language_model.model.layers.2.mlp.experts.0.{part}_proj" for part in ("gate", "up", "down")}
    assert matches(mapped(entries, PREFIXES), asked) == asked
    assert not matches(mapped(entries, PREFIXES), {name.replace(".2.", ".1.") for name in asked})
    with pytest.raises(CheckpointError, match="quantization config"):
        expert_patterns(["re:.experts.w"], exact=True)


_OWNERS = st.lists(st.sampled_from(["a", "layers", "x+", "0", "1", "10", "2", "experts"]), max_size=4).map(
    lambda words: ".".join([*words, "experts"])
)


@given(st.sets(_OWNERS, max_size=12), st.sets(_OWNERS, max_size=12), st.booleans())
def test_expert_patterns_match_these_owners_only(owners, others, exact):
    """Whatever the names, first experts of the owners are matched and those of other layers are not."""
    entries = expert_patterns([f"{owner}.gate_up_proj" for owner in owners], exact=exact)
    names = {f"{owner}.0.gate_proj" for owner in owners | others}
    nested = {name for name in names if not exact and any(name.startswith(f"{owner}.") for owner in owners)}
    assert matches(entries, names) == {f"{owner}.0.gate_proj" for owner in owners} | nested


def test_names_that_no_entry_can_say_are_refused():
    """``re:`` would be read as a pattern; ``$`` also matches before a line break."""
    with pytest.raises(CheckpointError, match="quantization config"):
        target_patterns({"re:a"}, {"re:a", "b"})
    with pytest.raises(CheckpointError, match="quantization config"):
        target_patterns({"m.0.a", "m.0.b"}, {"m.0.a", "m.0.b", "m.0.a\n"})


def test_fifty_thousand_modules_take_less_than_a_second():
    """A plan of a large mixture of experts stays quick; measured in processor time of this process."""
    names = moe(65, 256)
    assert len(names) > 50_000
    start = time.process_time()
    target_patterns({name for name in names if ".layers.3." not in name}, names)
    assert time.process_time() - start < 1.0
