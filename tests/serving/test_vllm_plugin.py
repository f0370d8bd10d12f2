"""The plug-in on a stand-in for vLLM: which layers it changes, and that it leaves the others alone."""

from __future__ import annotations

import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from compressor.errors import UserError
from compressor.kv.plan import KvPlan, LayerPlan
from compressor.serving import vllm_plugin
from compressor.serving.served_plan import PLAN_VARIABLE
from tests.serving.plans import layer_plan

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32


class FakeVllm:
    """The names that the plug-in takes from vLLM; ``made`` are the arguments that ``Attention`` was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: str, layers: int = 4) -> None:
        made: list[dict[str, Any]] = []

        class Attention:
            def __init__(
                self,
                num_heads: int,
                head_size: int,
                scale: float,
                num_kv_heads: int | None = None,
                logits_soft_cap: float | None = None,
                per_layer_sliding_window: int | None = None,
                prefix: str = "",
                attn_type: str = "decoder",
                kv_sharing_target_layer_name: str | None = None,
                attn_backend: type | None = None,
                **extra_impl_args: Any,
            ) -> None:
                made.append({"prefix": prefix, "attn_backend": attn_backend, **extra_impl_args})

            def get_kv_cache_spec(self, vllm_config: object) -> str:
                return "spec"

        class AttentionType(StrEnum):
            DECODER = "decoder"
            ENCODER = "encoder"

        self.made, self.attention = made, Attention
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                model=model, hf_text_config=SimpleNamespace(num_hidden_layers=layers)
            ),
            cache_config=SimpleNamespace(cache_dtype="auto", sliding_window=None),
        )
        backend = SimpleNamespace(customize_spec=None)
        for name, content in {
            "vllm.config": {"get_current_vllm_config": lambda: config},
            "vllm.model_executor.models.utils": {"extract_layer_index": lambda name: int(name.split(".")[2])},
            "vllm.model_executor.layers.attention.attention": {"Attention": Attention},
            "vllm.v1.attention.backend": {"AttentionType": AttentionType, "AttentionBackend": backend},
            "compressor.serving.vllm_backend": {"backend_of": lambda size: f"slots of {size}"},
        }.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delenv(PLAN_VARIABLE, raising=False)
        vllm_plugin.register()

    def layer(self, index: int, **changes: Any) -> dict[str, Any]:
        """What ``Attention`` got for one layer of a model."""
        asked = {"num_kv_heads": KV_HEADS, "prefix": f"model.layers.{index}.self_attn.attn", **changes}
        self.attention(HEADS, HEAD_DIM, 0.1, **asked)
        return self.made[-1]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    """A model whose plan packs layers 0 and 1, keeps 2 and does not list 3."""
    layers = {
        0: layer_plan("turboquant_3.5bit", KV_HEADS, HEAD_DIM),
        1: layer_plan("turboquant_2.5bit", KV_HEADS, HEAD_DIM),
        2: LayerPlan("bf16", KV_HEADS, HEAD_DIM),
    }
    KvPlan(layers).write(tmp_path)
    return FakeVllm(monkeypatch, str(tmp_path))


def test_without_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument arrives as it was given, and nothing is added."""
    fake = FakeVllm(monkeypatch, str(tmp_path))
    assert fake.layer(0, sinks="theirs") == {
        "prefix": "model.layers.0.self_attn.attn",
        "attn_backend": None,
        "sinks": "theirs",
    }


def test_layers_of_the_plan(planned: FakeVllm) -> None:
    """Packed layers get the backend of their slots' size and their codecs; the others what vLLM chooses."""
    made = [planned.layer(index) for index in range(4)]
    sizes = [made[index]["codecs"].slot_bytes for index in (0, 1)]
    assert [layer["attn_backend"] for layer in made] == [*(f"slots of {size}" for size in sizes), None, None]
    assert sizes[0] > sizes[1]
    assert "codecs" not in made[2]
    assert "codecs" not in made[3]


def test_encoders_and_shared_layers(planned: FakeVllm) -> None:
    """Encoders have no cache; a layer that reads another's cache reads it with the other's codecs."""
    assert planned.layer(0, attn_type="encoder")["attn_backend"] is None
    shared = planned.layer(3, kv_sharing_target_layer_name="model.layers.1.self_attn.attn")
    assert shared["codecs"].slot_bytes == planned.layer(1)["codecs"].slot_bytes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_kv_heads": 1}, "1 KV heads of 32 here, 2 of 32 in the plan .tensor parallelism"),
        ({"per_layer_sliding_window": 128}, "sliding window"),
        ({"logits_soft_cap": 30.0}, "soft caps"),
        ({"sinks": object()}, "does not know sinks"),
        ({"attn_backend": int}, "backend of its own, int"),
        ({"head_size_v": 16}, "head_size_v"),
    ],
)
def test_what_cannot_be_packed(planned: FakeVllm, changes: dict[str, Any], reason: str) -> None:
    """A layer of the plan is packed or refused, never left in 16 bit in silence."""
    with pytest.raises(UserError, match=f"packs model.layers.0.self_attn.attn, but .*{reason}"):
        planned.layer(0, **changes)


def test_a_plan_of_a_longer_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of another model."""
    KvPlan({7: layer_plan("turboquant_2.5bit", KV_HEADS, HEAD_DIM)}).write(tmp_path)
    with pytest.raises(UserError, match="layer 7, the model 4 layers"):
        FakeVllm(monkeypatch, str(tmp_path)).layer(0)


def test_registered_twice(planned: FakeVllm) -> None:
    """vLLM calls plug-ins in each process, some of them twice."""
    vllm_plugin.register()
    assert "codecs" in planned.layer(0)


def test_imports_nothing_of_the_engine() -> None:
    """The module is imported wherever the entry point is looked at."""
    code = "import sys, compressor.serving.vllm_plugin; print({'vllm', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
