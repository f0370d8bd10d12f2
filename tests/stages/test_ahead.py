"""Solvers that try themselves on a small matrix while the walk begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor import kernels
from compressor.checkpoint.folder import FolderSource
from compressor.schemes.base import Scheme
from compressor.solvers.base import Solved
from compressor.solvers.gptq import Gptq
from compressor.solvers.statistics import Moments
from compressor.stages import ahead
from compressor.stages.base import Claim
from tests.stages.walking import claims_of
from tests.tiny import tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> list[Claim]:
    """Two schemes under GPTQ, one under plain rounding, and tensors left alone."""
    folder = tiny_llama(tmp_path_factory.mktemp("ahead"))
    rules = [
        {"match": "*.o_proj.weight", "scheme": "int8"},
        {"match": "*.down_proj.weight", "scheme": "fp8_dynamic", "solver": "rtn"},
    ]
    return claims_of(FolderSource(Path(folder)), {"scheme": "nvfp4a16", "solver": "gptq", "rules": rules})


def test_each_scheme_and_solver_once(claims: list[Claim], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that need moments; what one raises does not keep the others from their turn."""
    seen: list[str] = []

    def solve_heard(
        self: Gptq, weights_OI: Sequence[torch.Tensor], scheme: Scheme, moments: Moments
    ) -> list[Solved]:
        seen.append(scheme.kind)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Gptq, "solve_heard", solve_heard)
    ahead.solve_small(claims, CPU)
    assert sorted(seen) == ["int8", "nvfp4a16"]


def test_the_small_matrix_is_solved(claims: list[Claim], monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ takes it, without a word of why it could not: all its kernels are called."""
    found: list[Solved] = []
    solve_heard = Gptq.solve_heard

    def keep(
        self: Gptq, weights_OI: Sequence[torch.Tensor], scheme: Scheme, moments: Moments
    ) -> list[Solved]:
        found.extend(solve_heard(self, weights_OI, scheme, moments))
        return found

    monkeypatch.setattr(Gptq, "solve_heard", keep)
    ahead.solve_small([replace(claim) for claim in claims], CPU)
    assert len(found) == 2
    assert all(solved.output_error is not None for solved in found)


def test_only_for_accelerators(claims: list[Claim], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started on a CPU."""
    started: list[Callable[[], object]] = []
    monkeypatch.setattr(kernels, "compile_ahead", started.append)
    for name, count in (("cpu", 0), ("cuda", 1)):
        monkeypatch.setattr(ahead, "pick_device", lambda name=name: torch.device(name))
        ahead.compile_ahead(claims)
        assert len(started) == count
