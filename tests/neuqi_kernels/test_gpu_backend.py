"""What the backend takes and refuses, and the layout that it prepares."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys

import pytest
import torch

from neuqi_kernels import dispatch, layout, reference
from neuqi_kernels.backend import REFERENCE, CompilesWhenRun
from neuqi_kernels.gpu.backend import TRITON
from neuqi_kernels.spec import GemmSpec

LAYER = GemmSpec(70, 160, 4, 32, "cuda", torch.bfloat16, torch.float16)


def change(**fields: object) -> GemmSpec:
    return dataclasses.replace(LAYER, **fields)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (change(device_type="cpu"), "the weights are on cpu"),
        (change(dtype=torch.float32), r"the activations are torch\.float32"),
        (change(scale_dtype=torch.float32), r"in 16 bits, they are torch\.float32"),
        (change(bits=5), "the layer has 5"),
        (change(k=100, group_size=-1), "the row has 100"),
        (change(group_size=160 // 2), "its tile of 128 codes, the group size is 80"),
    ],
)
def test_refuse_names_what_does_not_fit(spec: GemmSpec, reason: str) -> None:
    refusal = TRITON.refuse(spec)
    assert refusal is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refusal)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuse_without_a_gpu() -> None:
    assert TRITON.refuse(LAYER) == "needs a CUDA GPU, torch sees none"


def test_refuse_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton, which is not installed" in (TRITON.refuse(LAYER) or "")


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_refuse_old_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], taken: bool) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert (TRITON.refuse(LAYER) is None) == taken


def test_only_backends_that_compile_when_run_are_warmed_up() -> None:
    assert isinstance(TRITON, CompilesWhenRun)
    assert not isinstance(REFERENCE, CompilesWhenRun)
    assert not isinstance(dispatch.find("cpu_blocks"), CompilesWhenRun)


def test_importing_the_backend_does_not_import_triton() -> None:
    code = "import sys, neuqi_kernels.gpu.backend; sys.exit('neuqi_kernels.gpu.launch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_prepared_weights_dequantize_to_the_same_numbers(bits: int, group_size: int) -> None:
    spec = change(bits=bits, k=320, group_size=group_size)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (spec.n, spec.k), generator=generator, dtype=torch.uint8)
    scale, zero = torch.randn(2, spec.n, spec.groups, generator=generator).to(torch.float16)
    qweight = layout.pack(codes, bits)
    prepared = TRITON.prepare(qweight, scale, zero, spec)
    expected = reference.dequantize(qweight, scale, zero, bits, group_size)
    assert torch.equal(TRITON.dequantize(*prepared, spec), expected)
    assert not prepared[2].any()


def test_prepare_refuses_what_the_kernels_cannot_read() -> None:
    scale, zero = torch.ones(2, 70, 5)
    qweight = torch.zeros(70, 20, dtype=torch.int32)
    with pytest.raises(ValueError, match="the dtypes differ"):
        TRITON.prepare(qweight, scale, zero, LAYER)
    with pytest.raises(ValueError, match=r"in 16 bits.*dispatch\.choose"):
        TRITON.prepare(qweight, scale, zero, change(scale_dtype=torch.float32))


def test_no_tokens_give_no_rows() -> None:
    x = torch.empty(2, 0, 160, dtype=torch.bfloat16)
    words = torch.empty(2, 2, 1, 64, 32, dtype=torch.int16)
    y = TRITON.gemm(x, words, torch.empty(0), torch.empty(0), None, 70, 4, 32)
    assert y.shape == (2, 0, 70)
    assert y.dtype == x.dtype
