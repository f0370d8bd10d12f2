"""``weights.scheme: auto`` from end to end: within its budget, resumed, refused where nothing fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.errors import PlanError
from compressor.numerics.paired import FEWEST_UNITS
from compressor.planner.compounding import compounding_facts
from compressor.progress import Silent
from compressor.verify.models import check_source_values
from compressor.verify.structure import check_structure
from tests.tiny import tiny_llama, tiny_llama4

from .cases import content, write_recipe

TEXT = "Five wizards quickly jump over my boxed vintage, and {} foxes sleep. "
AUTO = "{{scheme: auto, budget: {{{}}}, solver: rtn}}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose widths suit every candidate."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_llama(folder, hidden=64, intermediate=128)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Calibration on eight short rows; little is measured."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "shown.txt").write_text("".join(TEXT.format(n) for n in range(60)))
    (folder / "measured.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    shown, measured = (json.dumps(str(folder / f"{name}.txt")) for name in ("shown", "measured"))
    return (
        f"calibration: {{datasets: [{{path: {shown}}}], num_samples: 8, sequence_length: 32}}\n"
        f"evaluate: {{text: {measured}, tokens: 256, context: 64}}"
    )


def test_within_bits(tmp_path: Path, source: Path, rest: str) -> None:
    """The result keeps to its bits, fused matrices are stored alike, and the report says what was chosen."""
    recipe = write_recipe(tmp_path / "recipe.yaml", source, AUTO.format("bits_per_target_weight: 6.0"), rest)
    result = compressor.run(recipe, output=tmp_path / "out" / "result")
    report = json.loads((result.output / "report.json").read_text())
    assert 5.0 < report["result"]["bits_per_target_weight"] <= 6.0
    told = report["budget"]
    assert [stage["name"] for stage in report["stages"]][:2] == ["sensitivity", "budget"]
    assert {group["name"] for group in told["groups"]} == {
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert len({group["chosen"] for group in told["groups"]}) > 1
    for group in told["groups"]:
        costs = {option["scheme"]: option["cost"] for option in group["options"]}
        assert costs["copy"] == 0
        assert costs["nvfp4a16"] > costs["int8"] > 0
    chosen = next(point for point in told["points"] if point["kind"] == "chosen")
    assert chosen["bytes"] == report["result"]["bytes"]
    assert chosen["bits_per_target_weight"] == pytest.approx(report["result"]["bits_per_target_weight"])
    kinds = [point["kind"] for point in told["points"]]
    assert kinds.count("uniform") == 3
    assert all(point["bytes"] <= chosen["bytes"] for point in told["points"] if point["kind"] == "random")
    sizes = [(point["bytes"], point["predicted_kl"]) for point in told["frontier"]]
    assert sizes == sorted(sizes)
    assert [cost for _, cost in sizes] == sorted((cost for _, cost in sizes), reverse=True)
    checks = [
        *check_structure(result.output, Silent()),
        *check_source_values(result.output, FolderSource(source), Silent()),
    ]
    assert [check.name for check in checks if check.status == "failed"] == []


def test_runs_again_with_the_same_bits(tmp_path: Path, source: Path, rest: str) -> None:
    """Another workspace ends with the same bytes; another budget measures nothing anew."""
    weights = AUTO.format("bits_per_target_weight: 6.0")
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
    first = compressor.run(recipe, output=tmp_path / "out" / "result")
    other = compressor.run(recipe, output=tmp_path / "other" / "result")
    assert content(first.output) == content(other.output)
    smaller = write_recipe(
        tmp_path / "smaller.yaml", source, AUTO.format("bits_per_target_weight: 5.0"), rest
    )
    result = compressor.run(smaller, output=tmp_path / "out" / "smaller")
    resumed = {stage.name: stage.resumed for stage in result.report.stages}
    assert resumed["sensitivity"]
    assert not resumed["budget"]
    assert result.report.result.bits_per_target_weight <= 5.0


class _Interrupting(Silent):
    """Stops the run when a stage of that name begins."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def start(self, stage: str, total: int, unit: object, done: int = 0) -> None:
        if stage == self._stage:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["options", "judge int8", "weights"])
def test_a_stopped_run_ends_with_the_same_bits(stage: str, tmp_path: Path, source: Path, rest: str) -> None:
    """Whether it was measuring, judging or writing; what was judged before is not judged again."""
    weights = AUTO.format("bits_per_target_weight: 6.0")
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
    whole = compressor.run(recipe, output=tmp_path / "whole" / "result")
    output = tmp_path / "out" / "result"
    with pytest.raises(KeyboardInterrupt):
        compressor.run(recipe, output=output, progress=_Interrupting(stage))
    judged = list((output.parent / ".compress-workspace").rglob("judged-*.json"))
    assert bool(judged) == (stage != "options")
    kept = {path.name: path.read_bytes() for path in judged}
    again = compressor.run(recipe, output=output)
    assert content(again.output) == content(whole.output)
    assert again.report.budget == whole.report.budget
    for path in (output.parent / ".compress-workspace").rglob("judged-*.json"):
        assert kept.get(path.name, path.read_bytes()) == path.read_bytes()


def test_values_are_those_of_rules_that_say_the_same(tmp_path: Path, source: Path, rest: str) -> None:
    """What was solved while choosing is written as it is: the bytes that rules would have made."""
    weights = AUTO.format("bits_per_target_weight: 6.0")
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
    result = compressor.run(recipe, output=tmp_path / "out" / "result")
    assert result.report.budget is not None
    chosen = {group.name: group.chosen for group in result.report.budget.groups}
    parts = {"qkv_proj": "re:{}[qkv]_proj", "gate_up_proj": "re:{}(gate|up)_proj"}
    rules = []
    for name, scheme in chosen.items():
        before, _, leaf = name.rpartition(".")
        pattern = parts[leaf].format(before.replace(".", "[.]") + "[.]") if leaf in parts else name
        rules.append(f"{{match: {json.dumps(pattern)}, scheme: {scheme}}}")
    weights = f"{{scheme: nvfp4a16, solver: rtn, rules: [{', '.join(rules)}]}}"
    ruled = write_recipe(tmp_path / "ruled.yaml", source, weights, rest)
    other = compressor.run(ruled, output=tmp_path / "other" / "result")
    names = [path.name for path in sorted(result.output.glob("*.safetensors"))]
    assert names
    for name in names:
        assert (result.output / name).read_bytes() == (other.output / name).read_bytes()
    assert result.report.weights == other.report.weights


def test_within_a_loss(tmp_path: Path, source: Path, rest: str) -> None:
    """The smallest mix that was judged good enough is chosen, and smaller ones that were judged are not."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", source, AUTO.format("max_perplexity_increase: 0.5%"), rest
    )
    report = compressor.run(recipe, output=tmp_path / "out" / "result").report
    assert report.budget is not None
    (chosen,) = [point for point in report.budget.points if point.kind == "chosen"]
    assert chosen.increase_ci95 is not None
    assert chosen.increase_ci95[1] <= 0.005
    tried = [point for point in report.budget.points if point.kind == "tried"]
    for point in tried:
        assert point.increase_ci95 is not None
        if point.bytes < chosen.bytes:
            assert point.increase_ci95[1] > 0.005
    assert chosen.bytes == report.result.bytes


@pytest.mark.slow
def test_gptq_solves_what_was_chosen(tmp_path: Path, source: Path, rest: str) -> None:
    """Schemes are chosen on rounded values; the walk then solves the mix."""
    weights = "{scheme: auto, budget: {bits_per_target_weight: 5.5}, solver: gptq}"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
    report = compressor.run(recipe, output=tmp_path / "out" / "result").report
    assert [stage.name for stage in report.stages] == [
        *("sensitivity", "budget", "walk", "stream", "assemble", "evaluate")
    ]
    assert report.calibration is not None
    assert any(matrix.solver == "gptq" for matrix in report.calibration.matrices)
    assert report.result.bits_per_target_weight <= 5.5


def test_experts_of_a_layer_are_stored_alike(tmp_path: Path, rest: str) -> None:
    """Fused experts are one group; what the family leaves in 16 bit is none."""
    source = tiny_llama4(tmp_path / "model", layers=2, moe_step=2)
    recipe = write_recipe(tmp_path / "recipe.yaml", source, AUTO.format("bits_per_target_weight: 7"), rest)
    report = compressor.run(recipe, output=tmp_path / "out" / "result").report
    assert report.budget is not None
    names = [group.name for group in report.budget.groups]
    assert sum(name.endswith(".experts.") for name in names) == 1
    assert all(option.cost is not None for group in report.budget.groups for option in group.options)


def test_the_plan_counts_what_the_budget_allows(tmp_path: Path, source: Path, rest: str) -> None:
    """The table that people read has the bytes that the plan foretells, not those of the smallest options."""
    speeds = []
    for bits in (5, 15):
        weights = AUTO.format(f"bits_per_target_weight: {bits}")
        recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
        plan = compressor.plan(recipe, output=tmp_path / "out")
        facts, reason = compounding_facts(plan)
        assert facts is not None, reason
        cells = {row.key: row.optimized.value for row in facts.rows}
        assert cells["weights"] == plan.prediction.result_bytes
        assert any("all that the budget allows" in note for note in facts.notes)
        assert cells["speed"] is not None
        speeds.append(cells["speed"])
    assert speeds[0] > 1.3 * speeds[1]
    weights = AUTO.format("max_perplexity_increase: 1%")
    plan = compressor.plan(write_recipe(tmp_path / "recipe.yaml", source, weights, rest))
    facts, _ = compounding_facts(plan)
    assert facts is not None
    assert any("the smallest candidates" in note for note in facts.notes)


def test_another_export_format_chooses_anew(tmp_path: Path, source: Path, rest: str) -> None:
    """It stores some options in other bytes; what was measured of them stays."""
    keys = set()
    for name in ("compressed-tensors", "modelopt"):
        weights = (
            "{scheme: auto, candidates: [nvfp4a16, fp8_dynamic, copy], budget: {bytes: 150KB}, solver: rtn}"
        )
        form = f"{rest}\nexport: {{format: {name}}}"
        plan = compressor.plan(write_recipe(tmp_path / "recipe.yaml", source, weights, form))
        assert plan.budget is not None
        keys.add((plan.budget.sensitivity_key("of the source"), plan.budget.key("of the source")))
    first, second = keys
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_rows_too_few_for_an_interval_are_refused(tmp_path: Path, source: Path, rest: str) -> None:
    """A loss is held against the upper end of an interval, which takes four rows to judge on."""
    weights = AUTO.format("max_perplexity_increase: 1%")
    for rows, enough in ((4, False), (5, True)):
        few = rest.replace("num_samples: 8", f"num_samples: {rows}")
        recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, few)
        if enough:
            plan = compressor.plan(recipe)
            assert plan.budget is not None
            assert rows - plan.budget.job.heard >= FEWEST_UNITS
        else:
            with pytest.raises(PlanError, match="too few to judge"):
                compressor.plan(recipe)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (AUTO.format("bits_per_target_weight: 4.2"), "smallest candidates"),
        (AUTO.format("bytes: 1000"), "smallest candidates"),
        (AUTO.format("bytes: 1000, bits_per_weight: 4"), "must be one of"),
        ("{scheme: auto}", "auto needs a budget"),
        ("{scheme: int8, budget: {bytes: 10MB}}", "goes with `scheme: auto` only"),
        (AUTO.format("gpu_memory: 24GB"), "needs a context"),
        (AUTO.format("max_perplexity_increase: true"), "must be a number"),
        ("{scheme: auto, budget: {bytes: 1MB}, candidates: [int8, int8]}", "listed twice"),
    ],
)
def test_refused_before_anything_is_spent(
    weights: str, words: str, tmp_path: Path, source: Path, rest: str
) -> None:
    """Budgets that nothing keeps to, and ones that contradict themselves."""
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
    with pytest.raises(Exception, match=words) as raised:
        compressor.plan(recipe, output=tmp_path / "out")
    assert isinstance(raised.value, PlanError) or "recipe.yaml" in str(raised.value)


def test_weights_and_cache_share_a_gpu(tmp_path: Path, source: Path, rest: str) -> None:
    """The cache is compressed so that weights fit; the report says what other formats would have left."""
    # 512 tokens x 64 users of 2 layers, 2 KV heads of 16: 8.4 MB in 16 bit, beside 0.3 MB of weights.
    formats = "[bf16, fp8_per_token_head, int4_per_token_head]"
    told = f"gpu_memory: 7MB, context: 512, users: 64, kv_formats: {formats}"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, AUTO.format(told), rest)
    result = compressor.run(recipe, output=tmp_path / "out" / "result")
    report = result.report
    assert report.budget is not None
    assert report.kv is not None
    assert report.budget.kv_format == report.kv.format == "fp8_per_token_head"
    assert [(size.context, size.users) for size in report.kv.sizes] == [(512, 1), (512, 64)]
    trades = {trade.format: trade for trade in report.budget.caches}
    assert "bf16" not in trades  # it leaves no room for any weights
    assert trades["int4_per_token_head"].cache_kl > trades["fp8_per_token_head"].cache_kl > 0
    for trade in trades.values():
        assert trade.bytes + trade.cache_bytes <= 0.9 * 7e6
    total = {name: trade.cache_kl + trade.predicted_kl for name, trade in trades.items()}
    assert min(total, key=lambda name: total[name]) == "fp8_per_token_head"
    assert (result.output / "kv_plan.json").is_file()
