"""The polish: what it may change, that it helps, that it resumes bit by bit, and when it is not kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import softmax
from transformers import AutoModelForCausalLM

from compressor.checkpoint.folder import FolderSource
from compressor.dialects import DIALECTS
from compressor.model.load import load_source_model
from compressor.model.whole import WholeModel
from compressor.planner.layout import group_units, pack_shards
from compressor.progress import Silent
from compressor.schemes.base import Scheme
from compressor.stages import polish as stage
from compressor.stages.base import Claim
from compressor.stages.polish import PolishSpec, divergence, learning_rate, polish
from compressor.stages.polish_model import PolishedModel
from compressor.stages.receipts import all_receipts
from compressor.stages.stream import stream
from compressor.stages.training import row_order
from compressor.stages.walk import walk
from compressor.stages.walked import WalkedTensors
from compressor.workspace import file_sha256
from tests.tiny import tiny_llama, tiny_llama4, tiny_model, tokens_of_bytes

from .walking import SPEC as WALK
from .walking import claims_of, some_tokens

CPU = torch.device("cpu")
SPEC = PolishSpec(steps=20, learning_rate=0.005, tokens=256, seed=0, batch_tokens=128, dtype="float32")
# A language of four words: what is learned of some rows holds for others, on random models too.
IDS = some_tokens(24, 32) % 4
HELD = 3
SCHEMES: list[object] = [
    "nvfp4a16",
    {"kind": "int4", "group_size": 32},
    {"kind": "int4", "group_size": 32, "symmetric": False},
    "fp8_dynamic",
    "fp8_block",
    "int8",
    "nvfp4",
]
# Powers of two, and one scale for fused matrices: only norms move.
FIXED: list[object] = ["mxfp4", "fp8_static"]


class _Stopping(Silent):
    """Interrupts after so many steps."""

    def __init__(self, after: int) -> None:
        self._left = after
        self.done: list[int] = []

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.done.append(done)

    def advance(self, amount: int, note: str = "") -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose widths suit every scheme."""
    folder = tmp_path_factory.mktemp("polish") / "model"
    return tiny_llama(folder, layers=1, hidden=128, intermediate=128, heads=2, kv_heads=2)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama 4 with experts in both blocks."""
    return tiny_llama4(tmp_path_factory.mktemp("polish-moe") / "model", experts=2)


def _walked(folder: Path, scheme: object, target: Path) -> tuple[FolderSource, list[Claim]]:
    source = FolderSource(folder)
    claims = claims_of(source, {"scheme": scheme})
    target.mkdir()
    walk(source, claims, IDS, WALK, target, Silent())
    return source, claims


def _polished(
    source: FolderSource,
    claims: list[Claim],
    tmp_path: Path,
    name: str = "polish",
    spec: PolishSpec = SPEC,
    progress: Silent | None = None,
) -> dict[str, object]:
    (tmp_path / name).mkdir(exist_ok=True)
    facts = polish(source, claims, IDS, spec, tmp_path / "walk", tmp_path / name, progress or Silent())
    found: dict[str, object] = facts["polish"]
    return found


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("layer-*.safetensors"), *folder.glob("rest-*.safetensors")]
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def _decoded(folder: Path, source: FolderSource, claims: list[Claim], made: WalkedTensors) -> torch.Tensor:
    """Logits of the calibration rows by a model whose parameters are the decoded ones, with hooks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for claim in claims:
        name = claim.tensor.name
        changed = made.changed(name) if claim.scheme is None else None
        if changed is not None:
            model.get_parameter(name).data = changed.float()
        if claim.scheme is None:
            continue
        scheme, (part,) = claim.scheme, claim.role.parts
        tensors = made.local(part.module)
        weight_OI = scheme.decode(tensors, part.out_features, part.in_features)
        module = model.get_submodule(part.module)
        module.weight.data = weight_OI

        def rounded(_, args, scheme=scheme, tensors=tensors):  # type: ignore[no-untyped-def]
            return (scheme.round_inputs(args[0].flatten(0, -2), tensors).view(args[0].shape),)

        module.register_forward_pre_hook(rounded)
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def _slow_kl(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean KL(wanted || logits) in fp64, by its definition."""
    p, q = softmax(wanted.double(), -1), softmax(logits.double(), -1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("scheme", [*SCHEMES, *FIXED], ids=str)
def test_nearer_on_rows_never_seen(dense: Path, tmp_path: Path, scheme: object) -> None:
    """The stored result, decoded in the ordinary way, diverges less; only scales and norms are others."""
    source, claims = _walked(dense, scheme, tmp_path / "walk")
    facts = _polished(source, claims, tmp_path)
    assert facts["kept"]
    before, after = _tensors(tmp_path / "walk"), _tensors(tmp_path / "polish")
    norms = {claim.tensor.name for claim in claims if claim.tensor.name.endswith("norm.weight")}
    assert after.keys() - before.keys() <= norms
    different = {n for n in before if not torch.equal(_bytes(before[n]), _bytes(after[n]))}
    assert all(name.endswith(".weight_scale") for name in different)
    assert bool(different) == (scheme not in FIXED)
    assert after.keys() & norms
    for name in after.keys() & norms:
        moved = (after[name].float() - source.read(name).float()).abs()
        assert 0 < float(moved.max()) < 0.2
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(IDS).logits
    kl = [
        _slow_kl(_decoded(dense, source, claims, WalkedTensors(tmp_path / name))[-HELD:], exact[-HELD:])
        for name in ("walk", "polish")
    ]
    # fp32 sums of logarithms against fp64
    assert kl == pytest.approx([facts["kl_before"], facts["kl_after"]], rel=1e-3)
    assert kl[1] < 0.8 * kl[0]


@pytest.mark.parametrize("scheme", [*SCHEMES, *FIXED], ids=str)
def test_starts_from_the_walk(dense: Path, moe: Path, tmp_path: Path, scheme: object) -> None:
    """Before the first step the model gives bit for bit the logits of the decoded weights."""
    source, claims = _walked(dense, scheme, tmp_path / "walk")
    walked = WalkedTensors(tmp_path / "walk")
    whole = WholeModel.load(source, dtype=torch.float32, device=CPU)
    result = PolishedModel(source, whole, claims, walked, torch.float32, CPU)
    with torch.no_grad():
        logits = result.logits(IDS)
    assert torch.equal(logits, _decoded(dense, source, claims, walked))
    assert not torch.equal(logits, whole.model(IDS, use_cache=False).logits)


def test_inputs_in_common_are_rounded_once(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times in a Llama block of seven matrices, and again on the way back."""
    source, claims = _walked(dense, "nvfp4", tmp_path / "walk")
    whole = WholeModel.load(source, dtype=torch.float32, device=CPU)
    result = PolishedModel(source, whole, claims, WalkedTensors(tmp_path / "walk"), torch.float32, CPU)
    shapes = []
    round_inputs = Scheme.round_inputs

    def counted(self: Scheme, x_NI: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        shapes.append(x_NI.shape)
        return round_inputs(self, x_NI, tensors)

    monkeypatch.setattr(Scheme, "round_inputs", counted)
    logits = result.logits(IDS[:1])
    assert len(shapes) == 4
    logits.sum().backward()
    assert len(shapes) == 8


@pytest.mark.parametrize("scheme", ["nvfp4a16", "nvfp4", "fp8_dynamic"])
def test_experts_are_polished(moe: Path, tmp_path: Path, scheme: str) -> None:
    """Matrices inside fused 3-D parameters move as well, codes stay."""
    source, claims = _walked(moe, scheme, tmp_path / "walk")
    # E4M3 scales are 6 percent apart and more: short steps never reach the next.
    facts = _polished(source, claims, tmp_path, spec=replace(SPEC, learning_rate=0.01))
    assert facts["kept"]
    before, after = _tensors(tmp_path / "walk"), _tensors(tmp_path / "polish")
    different = {n for n in before if not torch.equal(_bytes(before[n]), _bytes(after[n]))}
    assert all(name.endswith(".weight_scale") for name in different)
    assert any(".experts.1.down_proj." in name for name in different)
    assert any(".experts.0.gate_proj." in name for name in different)


def test_gradients_of_experts(moe: Path, tmp_path: Path) -> None:
    """A scale in a fused parameter has the gradient that a finite difference of the loss has."""
    source, claims = _walked(moe, {"kind": "int8"}, tmp_path / "walk")
    whole = WholeModel.load(source, dtype=torch.float32, device=CPU)
    result = PolishedModel(source, whole, claims, WalkedTensors(tmp_path / "walk"), torch.float32, CPU)
    knobs = result.knobs
    knobs._dtypes = {torch.float32: slice(None)}  # what is rounded has no finite difference
    wanted = whole.model(IDS[:4], use_cache=False).logits + torch.randn(256)
    divergence(result.logits(IDS[:4]), wanted).backward()
    gradients = knobs.gradients()
    (knob,) = [k for k in knobs._knobs if "layers.1.feed_forward.experts.1.up_proj" in k.name]
    part = knobs._part([knob])
    index = part.start + int(gradients[part].abs().argmax())
    assert gradients[index] != 0
    losses = []
    with torch.no_grad():
        for step in (0.01, -0.01):
            knobs.put(torch.zeros_like(gradients).index_fill(0, torch.tensor(index), step))
            losses.append(float(divergence(result.logits(IDS[:4]), wanted)))
    slope = (losses[0] - losses[1]) / 0.02
    # second order of the difference, and fp32 losses
    assert float(gradients[index]) == pytest.approx(slope, rel=0.03, abs=0.02)


@pytest.mark.parametrize("after", [1, 7, 19])
def test_resumes_bit_by_bit(dense: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted anywhere, the next run goes on at the last saved step and ends with the same bytes."""
    monkeypatch.setattr(stage, "_SAVE_S", 0.0)
    monkeypatch.setattr(stage, "_WORTH", 0.0)
    source, claims = _walked(dense, "nvfp4a16", tmp_path / "walk")
    whole = _polished(source, claims, tmp_path, "whole")
    with pytest.raises(KeyboardInterrupt):
        _polished(source, claims, tmp_path, "part", progress=_Stopping(after))
    again = _Stopping(100)
    part = _polished(source, claims, tmp_path, "part", progress=again)
    assert again.done == [after - 1]
    assert whole | {"seconds": 0} == part | {"seconds": 0}
    assert _hashes(tmp_path / "whole") == _hashes(tmp_path / "part")


def test_not_kept_where_it_does_not_help(dense: Path, tmp_path: Path) -> None:
    """Steps that are far too long leave every byte of the walk, and say so."""
    source, claims = _walked(dense, "fp8_dynamic", tmp_path / "walk")
    facts = _polished(source, claims, tmp_path, spec=replace(SPEC, steps=4, learning_rate=1.0))
    assert not facts["kept"]
    assert facts["kl_after"] == facts["kl_before"]
    assert _hashes(tmp_path / "walk") == _hashes(tmp_path / "polish")


def test_best_step_is_kept(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all the times that the held-out rows are measured, the least divergence is the one stored."""
    source, claims = _walked(dense, "nvfp4a16", tmp_path / "walk")
    seen: list[float] = []
    measure = stage._Polish._measure

    def noted(self: stage._Polish) -> float:
        seen.append(measure(self) if len(seen) != 3 else 0.001)
        return seen[-1]

    monkeypatch.setattr(stage._Polish, "_measure", noted)
    facts = _polished(source, claims, tmp_path)
    assert len(seen) == 11
    assert facts["kl_after"] == 0.001
    whole = _tensors(tmp_path / "polish")
    monkeypatch.undo()
    # Steps 1 to 6 of the same schedule: stopped there, the values are those that were best above.
    monkeypatch.setattr(stage, "learning_rate", lambda step, _, highest: learning_rate(step, 20, highest))
    _polished(source, claims, tmp_path, "six", spec=replace(SPEC, steps=6))
    six = _tensors(tmp_path / "six")
    assert all(torch.equal(_bytes(whole[name]), _bytes(six[name])) for name in whole)


def test_biases_move_and_stream(tmp_path: Path) -> None:
    """Qwen2's biases lie beside quantized matrices: they are polished, and written once, by name."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(**tokens_of_bytes(), **sizes, num_key_value_heads=2)
    folder = tiny_model(tmp_path / "model", Qwen2ForCausalLM, config, torch.bfloat16)
    source, claims = _walked(folder, "nvfp4a16", tmp_path / "walk")
    _polished(source, claims, tmp_path)
    made = WalkedTensors(tmp_path / "polish")
    bias = "model.layers.0.self_attn.q_proj.bias"
    changed, norm = made.changed(bias), made.changed("model.norm.weight")
    assert changed is not None
    assert norm is not None
    assert not torch.equal(changed, source.read(bias))
    shards = pack_shards(group_units(claims), 1 << 40)
    (tmp_path / "out").mkdir()
    stream(source, shards, DIALECTS["compressed-tensors"], tmp_path / "out", Silent(), made)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored[bias], changed)
    assert torch.equal(stored["model.norm.weight"], norm)
    for local, tensor in made.local("model.layers.0.self_attn.q_proj").items():
        assert torch.equal(_bytes(stored[f"model.layers.0.self_attn.q_proj.{local}"]), _bytes(tensor))
    (receipt,) = all_receipts(tmp_path / "out")
    assert len(receipt["errors"]) == 7


def test_offsets_of_norms(tmp_path: Path) -> None:
    """Gemma stores its norms less one: what multiplies moves by a share of itself, not what is stored."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(**tokens_of_bytes(), **sizes, num_key_value_heads=2, head_dim=16)
    folder = tiny_model(tmp_path / "model", Gemma2ForCausalLM, config, torch.float32)
    source, claims = _walked(folder, "fp8_dynamic", tmp_path / "walk")
    whole = WholeModel.load(source, dtype=torch.float32, device=CPU)
    result = PolishedModel(source, whole, claims, WalkedTensors(tmp_path / "walk"), torch.float32, CPU)
    (knob,) = [k for k in result.knobs._knobs if k.name == "model.norm.weight"]
    result.knobs.put(torch.full_like(result.knobs.exponents, 0.1))
    expected = (source.read("model.norm.weight").float() + 1) * torch.tensor(0.1).exp() - 1
    # rounded to the 16 bit that are stored
    assert torch.allclose(knob.value, expected, rtol=2**-8)


def test_whole_model_is_the_ordinary_one(dense: Path, moe: Path) -> None:
    """Bit-equal logits; the twin has the very same parameters."""
    for folder in (dense, moe):
        source = FolderSource(folder)
        whole = WholeModel.load(source, dtype=torch.float32, device=CPU)
        with torch.no_grad():
            expected = load_source_model(source, torch.float32)(IDS, use_cache=False).logits
            assert torch.equal(whole.model(IDS, use_cache=False).logits, expected)
            assert torch.equal(whole.twin()(IDS, use_cache=False).logits, expected)
        pairs = zip(whole.model.parameters(), whole.twin().parameters(), strict=True)
        assert all(one is other for one, other in pairs)


def test_divergence_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over tokens, in chunks, with the gradient q - p; fp32 rounding apart."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 11, generator=generator, requires_grad=True)
    wanted = torch.randn(2, 5, 11, generator=generator)
    monkeypatch.setitem(stage.CHUNK_VALUES, "cpu", 33)
    total = divergence(logits, wanted)
    assert total.item() == pytest.approx(10 * _slow_kl(logits.detach(), wanted), rel=1e-5)
    total.backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, softmax(logits, -1) - softmax(wanted, -1), atol=1e-6)
    with torch.no_grad():
        assert float(divergence(logits, wanted)) == pytest.approx(total.item(), rel=1e-6)


def test_schedule_and_order() -> None:
    """The rate rises, falls to almost nothing, and never is above the highest; every row comes as often."""
    rates = [learning_rate(step, 100, 0.5) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[4] == 0.5
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(0, 1, 0.5) == 0.5
    order = row_order(7, 17, seed=2)
    assert sorted(order[:7].tolist()) == sorted(order[7:14].tolist()) == list(range(7))
    assert order[:7].tolist() != order[7:14].tolist()
    assert torch.equal(order, row_order(7, 17, seed=2))
    assert not torch.equal(order, row_order(7, 17, seed=3))
