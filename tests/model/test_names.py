"""Matrices inside tensors, and lists of modules as engine patterns."""

from __future__ import annotations

import re
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import CheckpointError
from compressor.model.names import extract, insert, module_of, target_patterns
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
    st.sets(st.lists(st.sampled_from(_WORDS), min_size=1, max_size=4).map(".".join), max_size=40), st.data()
)
def test_entries_match_exactly_the_chosen_names(names, data):
    """Whatever the names: characters special to regexes, numbers anywhere, digits that are not decimal."""
    chosen = {name for name in sorted(names) if data.draw(st.booleans())}
    entries = target_patterns(chosen, names)
    assert matches(entries, names) == chosen
    assert len(entries) <= len(chosen)


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
