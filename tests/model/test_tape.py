"""The decoder replayed block by block: bit-equal to the ordinary forward pass; inputs heard, weights put."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor.checkpoint.base import Source
from compressor.checkpoint.folder import FolderSource
from compressor.errors import CheckpointError
from compressor.model.blocks import Block, Site
from compressor.model.hidden import HiddenStates
from compressor.model.load import load_source_model
from compressor.model.names import extract
from compressor.model.routed import Share
from compressor.model.tape import Tape, check_walkable

from .published import PUBLISHED
from .zoo import FAMILIES, REFUSED

Open = Callable[[str], FolderSource]
CPU = torch.device("cpu")
# Attention of both kinds, experts of every layout, several matrices on one input.
LISTENED = (
    "llama",
    "phi3",
    "llama4",
    "mixtral",
    "qwen3_next",
    "deepseek_v3",
    "jamba",
    "nemotron_h",
    "falcon",
)
ALL_PUBLISHED = [f"published {name}" for name in PUBLISHED]


def _batches() -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return [torch.randint(0, 250, shape, generator=numbers) for shape in ((2, 24), (1, 33))]


def _record(source: Source, dtype: torch.dtype = torch.float32) -> tuple[Tape, HiddenStates]:
    states = HiddenStates(CPU)
    return Tape.record(source, _batches(), dtype=dtype, device=CPU, states=states), states


def _logits(source: Source, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    tape, states = _record(source, dtype)
    for index in range(len(tape.blocks)):
        block = tape.load(index)
        for batch in range(len(states)):
            out = tape.run(block, states, batch)
            assert out is not None
            states.put(batch, out)
    return [tape.finish(states.get(batch)) for batch in range(len(states))]


@torch.no_grad()
def _ordinary(source: Source, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model = load_source_model(source, dtype)
    for parameter in model.parameters():
        # Files are mapped at any address, and BLAS sums a matrix of one row in another order where it is odd.
        parameter.data = parameter.data.clone()
    return [model(ids, use_cache=False).logits for ids in _batches()]


@pytest.mark.parametrize("name", [*FAMILIES, *ALL_PUBLISHED])
def test_replay_is_the_ordinary_forward_pass(name: str, family: Open) -> None:
    """Embedding, every block and head, bit for bit."""
    source = family(name)
    for replayed, ordinary in zip(_logits(source), _ordinary(source), strict=True):
        assert ordinary.isfinite().all()
        assert torch.equal(replayed, ordinary)


@pytest.mark.parametrize("name", ["llama", "llama4", "qwen3_next", "deepseek_v3", "gpt_oss", "jamba"])
def test_replay_in_bfloat16(name: str, family: Open) -> None:
    """Parameters are cast as the evaluation's loader casts them, so that even this is bit-equal."""
    source = family(name)
    replayed, ordinary = _logits(source, torch.bfloat16), _ordinary(source, torch.bfloat16)
    assert all(map(torch.equal, replayed, ordinary))


def _heard(
    tape: Tape, block: Block, states: HiddenStates, until: int | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor | None]:
    inputs: dict[str, torch.Tensor] = {}
    tokens: dict[str, torch.Tensor] = {}

    def hear(site: Site, x_NI: torch.Tensor, share: Share | None) -> None:
        assert site.name not in inputs
        assert x_NI.shape[1] == site.in_features
        assert site.routed == (share is not None)
        inputs[site.name] = x_NI.clone()
        if share is not None:
            tokens[site.name] = share.tokens_M.clone()

    out = tape.run(block, states, 0, hear=hear, until=until)
    return inputs, tokens, out


@pytest.mark.parametrize("name", LISTENED)
def test_listening_changes_nothing_and_stops_where_asked(name: str, family: Open) -> None:
    """With listeners the output is the same bits; with ``until`` each step hears the same inputs."""
    tape, states = _record(family(name))
    for index in range(len(tape.blocks)):
        block = tape.load(index)
        plain = tape.run(block, states, 0)
        inputs, _, out = _heard(tape, block, states)
        assert plain is not None
        assert out is not None
        assert torch.equal(out, plain)
        known = [site.name for step in block.steps for site in step]
        assert len(set(known)) == len(known)
        assert inputs.keys() <= set(known)
        for number, step in enumerate(block.steps):
            partly, _, nothing = _heard(tape, block, states, until=number)
            assert nothing is None
            for site in step:
                assert (site.name in partly) == (site.name in inputs)
                if site.name in inputs:
                    assert torch.equal(partly[site.name], inputs[site.name])
        states.put(0, plain)


@pytest.mark.parametrize("name", [*LISTENED, *ALL_PUBLISHED])
def test_every_linear_tensor_of_a_block_has_one_site(name: str, family: Open) -> None:
    """The sites of all blocks hold the matrices that the family names, each once."""
    from compressor.model.families import family_for

    source = family(name)
    tape, _ = _record(source)
    found = [
        part.module
        for index in range(len(tape.blocks))
        for step in tape.steps(index)
        for site in step
        for part in site.parts
    ]
    roles = [family_for(source.config).role(header, source.config) for header in source.headers.values()]
    assert sorted(found) == sorted(
        part.module for role in roles if role.kind == "linear" for part in role.parts
    )
    assert tape.unheard == {}


@pytest.mark.parametrize("name", ["llama", "phi3", "deepseek_v3", "jamba", "qwen3_next"])
def test_linear_inputs_are_what_hooks_on_the_whole_model_see(name: str, family: Open) -> None:
    """For every matrix of a linear layer, the site's input is that of the ordinary model's module."""
    source = family(name)
    tape, states = _record(source)
    model = load_source_model(source, torch.float32)
    seen: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[path] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(path))
    with torch.no_grad():
        model(_batches()[0], use_cache=False)
    compared = 0
    for index in range(len(tape.blocks)):
        block = tape.load(index)
        inputs, _, out = _heard(tape, block, states)
        for site in (site for step in block.steps for site in step if not site.routed):
            for part in site.parts:
                assert torch.equal(inputs[site.name], seen[part.module])
                compared += 1
        assert out is not None
        states.put(0, out)
    assert compared >= 4


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "nemotron_h"])
def test_experts_hear_the_tokens_routed_to_them(name: str, family: Open) -> None:
    """Against the router's choice seen at the experts module, and their products computed one by one."""
    source = family(name)
    tape, states = _record(source)
    block, experts = _first_experts(tape, states)
    given: list[torch.Tensor] = []
    handle = experts.register_forward_pre_hook(lambda _, args: given.extend(args))
    inputs, tokens, _ = _heard(tape, block, states)
    handle.remove()
    hidden_NH, chosen_NK = given[0], given[1]
    sites = {site.name: site for step in block.steps for site in step if site.routed}
    assert {int(expert) for expert in chosen_NK.unique()} == {
        int(name.split(".")[-2]) for name in inputs if name in sites
    }
    for name, x_NI in inputs.items():
        if name not in sites:
            continue
        *_, expert, phase = name.split(".")
        routed = (chosen_NK == int(expert)).any(dim=1).nonzero().flatten()
        order = tokens[name].argsort()
        assert torch.equal(tokens[name][order], routed)
        expected = hidden_NH[routed]
        if phase == "down":
            up = sites[name.replace("down", "up")]
            products = [expected @ block.weight(part).T for part in up.parts]
            activated = experts.act_fn(products[0])
            expected = activated * products[1] if len(products) == 2 else activated
        # One product after another or all at once: other order of summation.
        torch.testing.assert_close(x_NI[order], expected, rtol=1e-5, atol=1e-6)


def _first_experts(tape: Tape, states: HiddenStates) -> tuple[Block, nn.Module]:
    """The first block with experts, with ``states`` run up to it, and its experts module."""
    for index in range(len(tape.blocks)):
        block = tape.load(index)
        for path, module in block.module.named_modules():
            if path.endswith("experts"):
                return block, module
        out = tape.run(block, states, 0)
        assert out is not None
        states.put(0, out)
    raise AssertionError("no experts")


def test_llama4_experts_hear_their_tokens_scaled_by_the_router(family: Open) -> None:
    """Every token reaches as many experts as the config says, each expert its own rows only."""
    source = family("llama4")
    tape, states = _record(source)
    block, _ = _first_experts(tape, states)
    inputs, tokens, _ = _heard(tape, block, states)
    ups = {name: rows for name, rows in tokens.items() if name.endswith(".up")}
    assert sum(map(len, ups.values())) == 48 * source.config["num_experts_per_tok"]
    for name in ups:
        down = name.replace(".up", ".down")
        assert torch.equal(tokens[name], tokens[down])
        site = next(site for step in block.steps for site in step if site.name == name)
        gate, up = (inputs[name] @ block.weight(part).T for part in site.parts)
        torch.testing.assert_close(inputs[down], up * nn.functional.silu(gate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama4", "mixtral", "phi3"])
def test_weights_put_back_are_the_checkpoint_s(name: str, family: Open, tmp_path: Path) -> None:
    """Each matrix reads as the source has it, and a changed one acts as if the source had been changed."""
    source = family(name)
    tape, states = _record(source)
    block = tape.load(1)
    for site in (site for step in block.steps for site in step):
        for part, tensor in zip(site.parts, site.tensors, strict=True):
            assert tensor in tape.tensors(1)
            assert torch.equal(block.weight(part), extract(source.read(tensor), part))

    changed = tmp_path / "changed"
    folder = source.model_dir()
    assert folder is not None
    shutil.copytree(folder, changed)
    file = changed / "model.safetensors"
    tensors = load_file(file)
    # The last part of the last site of every step: of experts, the last one's up or down.
    chosen = [(step[-1].parts[-1], step[-1].tensors[-1]) for step in block.steps]
    for part, tensor in chosen:
        block.put(part, (3 * block.weight(part)).double())
        rows = slice(part.row_start, part.row_start + part.out_features)
        where = tensors[tensor] if part.expert is None else tensors[tensor][part.expert]
        (where.T if part.transposed else where)[rows] *= 3
    save_file(tensors, file, metadata={"format": "pt"})
    other, _ = _record(FolderSource(changed))
    assert torch.equal(_must(tape.run(block, states, 0)), _must(other.run(other.load(1), states, 0)))
    assert not torch.equal(_must(tape.run(block, states, 0)), _must(tape.run(tape.load(1), states, 0)))


def _must(out: torch.Tensor | None) -> torch.Tensor:
    assert out is not None
    return out


def test_blocks_load_in_a_thread_beside_the_one_that_computes(family: Open) -> None:
    """The next block is read while the present one runs, with the same result."""
    source = family("mixtral")
    tape, states = _record(source)
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(tape.load, 0)
        for index in range(len(tape.blocks)):
            block = pending.result()
            if index + 1 < len(tape.blocks):
                pending = reader.submit(tape.load, index + 1)
            for batch in range(len(states)):
                states.put(batch, _must(tape.run(block, states, batch)))
    assert torch.equal(tape.finish(states.get(1)), _ordinary(source)[1])


def test_matrices_on_one_input_share_a_site(family: Open) -> None:
    """q, k and v; gate and up; and in MLA the two first projections, though others are called between."""
    tape, _ = _record(family("deepseek_v3"))
    steps = [
        [[part.module.rpartition(".")[2] for part in site.parts] for site in step] for step in tape.steps(0)
    ]
    assert steps == [
        [["q_a_proj", "kv_a_proj_with_mqa"]],
        [["q_b_proj"]],
        [["kv_b_proj"]],
        [["o_proj"]],
        [["gate_proj", "up_proj"]],
        [["down_proj"]],
    ]


def test_shared_arguments_are_kept_once(family: Open) -> None:
    """Rotary tables are equal for every block and batch of one length."""
    source = family("llama")
    states = HiddenStates(CPU)
    batches = [batch[:, :24] for batch in _batches()[:1] * 3]
    tape = Tape.record(source, batches, dtype=torch.float32, device=CPU, states=states)
    head = 8
    assert tape.nbytes == 2 * 24 * head * 4 + 24 * 8  # cosine, sine and positions


def test_the_head_is_freed(family: Open) -> None:
    """After ``close`` the head is loaded anew and gives the same."""
    tape, states = _record(family("llama_tied"))
    first = tape.finish(states.get(0))
    tape.close()
    assert torch.equal(tape.finish(states.get(0)), first)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_replayed_are_refused_from_their_headers(name: str, tmp_path: Path) -> None:
    """Rather than replayed wrongly; no weight is read."""
    make, why = REFUSED[name]
    source = FolderSource(make(tmp_path / name))
    source.read = _no_reading  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=why):
        check_walkable(source)


def _no_reading(name: str, index: int | None = None) -> torch.Tensor:
    raise AssertionError(f"{name} was read")


def test_walkable_models_are_known_from_their_headers(family: Open, tmp_path: Path) -> None:
    """No weight is read, and matrices that cannot be heard are named."""
    for name, unheard in (("llama4", 0), ("granitemoe", 2)):
        source = family(name)
        source.read = _no_reading  # type: ignore[method-assign]
        assert len(check_walkable(source)) == unheard


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("drop", "1 parameters of the blocks have no tensor, the first is model.layers.1.mlp.up_proj.weight"),
        ("norm", "1 parameters have no tensor, the first is model.norm.weight"),
        ("shape", r"the shape \[48, 31\], its config \[48, 32\]"),
        ("type", "does not know model_type 'unknown'"),
        ("t5", "no causal language model of model_type 't5'"),
    ],
)
def test_checkpoints_that_do_not_fit_their_config(
    change: str, why: str, family: Open, tmp_path: Path
) -> None:
    """Each is told from the headers."""
    from compressor.spec import TensorHeader

    source = family("llama")
    headers, name = dict(source.headers), "model.layers.1.mlp.up_proj.weight"
    if change == "drop":
        del headers[name]
    elif change == "norm":
        del headers["model.norm.weight"]
    elif change == "shape":
        headers[name] = TensorHeader(name, "F32", (48, 31))
    else:
        source.config = {**source.config, "model_type": "unknown" if change == "type" else change}
    source.headers = headers
    with pytest.raises(CheckpointError, match=why):
        check_walkable(source)


def test_a_twin_has_its_own_weights_once_they_are_put(family: Open) -> None:
    """Until then both compute with the same memory; of experts in one parameter, all are copied."""
    tape, states = _record(family("llama4"))
    block = tape.load(1)
    before = _must(tape.run(block, states, 0))
    twin = block.twin()
    assert torch.equal(_must(tape.run(twin, states, 0)), before)
    first = {name: parameter.data_ptr() for name, parameter in block.module.named_parameters()}
    assert first == {name: parameter.data_ptr() for name, parameter in twin.module.named_parameters()}
    changed = set()
    for site in (step[0] for step in twin.steps):
        twin.put(site.parts[0], torch.zeros_like(twin.weight(site.parts[0])))
        changed.add(site.parts[0].module)
        assert not torch.equal(block.weight(site.parts[0]), twin.weight(site.parts[0]))
    assert torch.equal(_must(tape.run(block, states, 0)), before)
    assert not torch.equal(_must(tape.run(twin, states, 0)), before)
    for site in (site for step in twin.steps for site in step):
        for part in site.parts:
            assert torch.equal(block.weight(part), twin.weight(part)) == (part.module not in changed)


def test_a_block_drops_what_its_twin_keeps(family: Open) -> None:
    """The matrices asked for stay; the twin computes as before."""
    tape, states = _record(family("llama4"))
    block = tape.load(1)
    before = _must(tape.run(block, states, 0))
    twin = block.twin()
    part = block.steps[-1][0].parts[0]
    kept = block.weight(part).clone()
    block.drop([part])
    assert torch.equal(block.weight(part), kept)
    left = [name for name, parameter in block.module.named_parameters() if not parameter.is_meta]
    assert len(left) == 1
    assert torch.equal(_must(tape.run(twin, states, 0)), before)


# All whose experts can be heard.
ROUTED = (
    "llama4",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "olmoe",
    "phimoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "jamba",
    "nemotron_h",
)


@pytest.mark.parametrize("name", ROUTED)
def test_what_experts_could_have_been_given(name: str, family: Open) -> None:
    """Scores are what the router chooses by; rows on offer, and what comes of them, are as if routed.

    Of tokens that were routed both are known: rows to the rounding of Llama 4's factor, which is divided by
    and multiplied with, and products of rows in groups of another size to the order of their sums.
    """
    tape, states = _record(family(name))
    shares: dict[str, list[tuple[Site, Share]]] = {}

    def hear(site: Site, _: torch.Tensor, share: Share | None) -> None:
        if share is not None:
            shares.setdefault(site.expert.rpartition(".")[0], []).append((site, share))

    for index in range(len(tape.blocks)):
        out = tape.run(tape.load(index), states, 0, hear=hear)
        assert out is not None
        states.put(0, out)
    assert shares
    for heard in shares.values():
        entrances = [share for site, share in heard if site.is_entrance]
        inners = [share for site, share in heard if not site.is_entrance]
        chosen_EN = torch.zeros(len(entrances), entrances[0].batch_tokens, dtype=torch.bool)
        for row, share, inner in zip(chosen_EN, entrances, inners, strict=True):
            row[share.tokens_M] = True
            assert torch.equal(share.tokens_M, inner.tokens_M)
            if len(share.tokens_M) == 0:
                continue
            assert share.offered is not None
            torch.testing.assert_close(share.offered(share.tokens_M), share.x_MI, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(inner.inner(share.x_MI), inner.x_MI, rtol=1e-4, atol=1e-6)
        scores = [share.score_N for share in entrances if share.score_N is not None]
        if name == "phimoe":  # which chooses without topk
            assert not scores
            continue
        score_EN = torch.stack(scores)
        top_k = int(chosen_EN[:, 0].sum())
        assert torch.equal(
            score_EN.topk(top_k, dim=0).indices.sort(dim=0).values, _positions(chosen_EN, top_k)
        )


def _positions(chosen_EN: torch.Tensor, top_k: int) -> torch.Tensor:
    """[K, N]: which experts each token goes to, ascending."""
    return chosen_EN.T.nonzero()[:, 1].view(-1, top_k).T
