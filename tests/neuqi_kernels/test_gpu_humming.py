"""The optional Humming backend: what it refuses; with the package its layout; with a GPU its product."""

from __future__ import annotations

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neuqi_kernels import dispatch, layout, reference
from neuqi_kernels.gpu import humming
from neuqi_kernels.gpu.humming import HUMMING
from neuqi_kernels.spec import GemmSpec

LAYER = GemmSpec(96, 320, 3, 64, "cuda", torch.float16, torch.float16)
INSTALLED = importlib.util.find_spec("humming") is not None
needs_package = pytest.mark.skipif(not INSTALLED, reason="humming-kernels is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
# Scale, zero-point and the weights that are made of them are rounded to the dtype of the activations.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def change(**fields: Any) -> GemmSpec:
    return dataclasses.replace(LAYER, **fields)


def random_layer(spec: GemmSpec, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Canonical words, scale and zero-point, the latter also outside the range of the codes."""
    generator = torch.Generator().manual_seed(spec.bits)
    codes = torch.randint(0, 1 << spec.bits, (spec.n, spec.k), generator=generator, dtype=torch.uint8)
    scale, zero = torch.rand(2, spec.n, spec.groups, generator=generator) + 0.1
    zero = zero * (1 << spec.bits) - 1
    words = layout.pack(codes, spec.bits).to(device)
    return words, scale.to(device, spec.scale_dtype), zero.to(device, spec.scale_dtype)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the package and a GPU of sm_90, as far as the backend asks."""
    monkeypatch.delenv("NEUQI_KERNEL_BACKEND", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(humming, "_refuse_package", lambda: None)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (change(device_type="cpu"), "the weights are on cpu"),
        (change(dtype=torch.float32), r"the activations are torch\.float32"),
        (change(bits=8), "the layer has 8"),
        (change(n=100), "the layer is 100 by 320"),
        (change(group_size=160), "the group size is 160"),
        (change(group_size=16), "the group size is 16"),
    ],
)
def test_refuse_names_what_does_not_fit(spec: GemmSpec, reason: str) -> None:
    refusal = HUMMING.refuse(spec)
    assert refusal is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refusal)


def test_refuse_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install humming-kernels" in (HUMMING.refuse(LAYER) or "")


def test_refuse_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert HUMMING.refuse(LAYER) == "needs an NVIDIA GPU, torch sees none"


def test_refuse_old_gpus(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert HUMMING.refuse_to_run(LAYER) is None
    refusal = HUMMING.refuse_to_run(change(dtype=torch.bfloat16))
    assert refusal == "needs compute capability 8.0 for torch.bfloat16, the GPU has 7.5"


def test_by_default_it_refuses(machine: None) -> None:
    assert HUMMING.refuse_to_run(LAYER) is None
    assert HUMMING.refuse(LAYER) == (
        "no measured table prefers it here; NEUQI_KERNEL_BACKEND=humming takes it"
    )
    assert dispatch.choose(LAYER).name != "humming"


def test_a_measured_table_takes_it(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humming, "preferred_backend", lambda spec: "humming")
    assert HUMMING.refuse(LAYER) is None
    assert dispatch.choose(LAYER).name == "humming"


def test_a_table_alone_does_not_round_the_weights(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humming, "preferred_backend", lambda spec: "humming")
    refusal = HUMMING.refuse(change(dtype=torch.bfloat16))
    assert refusal is not None
    assert "as torch.bfloat16, the layer has them as torch.float16" in refusal
    assert HUMMING.refuse(change(dtype=torch.bfloat16, scale_dtype=torch.bfloat16)) is None


def test_the_environment_forces_it(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "humming")
    assert HUMMING.refuse(change(dtype=torch.bfloat16)) is None
    assert dispatch.choose(change(dtype=torch.bfloat16)).name == "humming"


def test_a_package_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    humming._refuse_package.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    assert "does not import: OSError: libcuda.so.1" in (humming._refuse_package() or "")
    humming._refuse_package.cache_clear()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real package where there is no GPU: what it asks of one is answered, its unpacking kernel stood in for."""
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    import humming.device
    import humming.ops
    import humming.transform

    info = SimpleNamespace(sm_version=90, sm_major=9, is_ppu=False, name="NVIDIA H100", index=0)
    extension = SimpleNamespace(_DeviceInfo=lambda index: info)
    monkeypatch.setattr(humming.device, "_get_device_info_extension", lambda: extension)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(humming.ops, "unpack_weight", lambda words, bits: layout.unpack(words, bits).int())
    return humming


@needs_package
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_canonical_layout_is_its_checkpoint_layout(package: Any, bits: int, group_size: int) -> None:
    """What Humming's own de-quantization makes of our tensors is what the definition makes of them."""
    from humming.schema import HummingWeightSchema

    spec = change(bits=bits, group_size=group_size)
    words, scale, zero = random_layer(spec)
    schema = HummingWeightSchema(
        b_dtype=f"uint{bits}",
        weight_scale_group_size=0 if group_size == -1 else group_size,
        has_zero_point=True,
        is_fp_zero_point=True,
    )
    tensors = {"weight": words, "weight_scale": scale, "zero_point": zero}
    schema.validate_tensors(tensors, spec.n, spec.k, torch.float16)
    expected = reference.dequantize(words, scale, zero, bits, group_size)
    assert torch.equal(schema.dequant_tensors(tensors), expected)


@needs_package
@pytest.mark.parametrize("group_size", [64, -1])
def test_prepare_hands_over_the_filled_layer(
    package: Any, monkeypatch: pytest.MonkeyPatch, group_size: int
) -> None:
    given: dict[str, Any] = {}

    def repack(inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        given.update(options, inputs=inputs)
        return inputs

    monkeypatch.setattr(package.ops, "repack_weight", repack)
    spec = change(group_size=group_size)
    words, scale, zero = random_layer(spec)
    _, pair, locks = HUMMING.prepare(words, scale, zero, spec)
    # Humming takes a stack of matrices, one for a layer without experts.
    assert given["inputs"].shape == (1, 256, 384 * 3 // 32)
    assert torch.equal(given["inputs"][0, :96, :30], words)
    assert not given["inputs"][0, 96:].any()
    assert not given["inputs"][0, :, 30:].any()
    assert (given["weight_bits"], given["activation_bits"], given["is_weight_packed"]) == (3, 16, True)
    assert not given["should_preprocess_for_int2fp"]
    assert pair.shape == (2, 6 if group_size == 64 else 1, 256)
    assert pair.dtype == torch.float16
    for row in range(spec.groups):
        assert torch.equal(
            pair[0, row].sort().values, torch.cat((scale[:, row], torch.zeros(160))).sort().values
        )
        assert torch.equal(
            pair[1, row].sort().values, torch.cat((zero[:, row], torch.zeros(160))).sort().values
        )
    assert locks.dtype == torch.int32
    assert not locks.any()


def test_prepare_refuses_what_the_kernels_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"the layer has 8.*dispatch\.choose"):
        HUMMING.prepare(*random_layer(change(bits=4)), change(bits=8))


@pytest.mark.gpu
@needs_package
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 5, 17, 300])
@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_is_the_definition(dtype: torch.dtype, bits: int, group_size: int, tokens: int) -> None:
    spec = change(dtype=dtype, bits=bits, group_size=group_size)
    words, scale, zero = random_layer(spec, "cuda")
    prepared = HUMMING.prepare(words, scale, zero, spec)
    x = torch.randn(tokens, spec.k, device="cuda", dtype=dtype)
    bias = torch.randn(spec.n, device="cuda", dtype=dtype)
    weight = reference.dequantize(words, scale, zero, bits, group_size, torch.float64)
    expected = x.double() @ weight.t() + bias.double()
    y = HUMMING.gemm(x, *prepared, bias, spec.n, bits, group_size)
    assert y.shape == (tokens, spec.n)
    assert (y.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]
    read = HUMMING.dequantize(*prepared, spec).double()
    assert (read - weight).norm() / weight.norm() < TOLERANCE[dtype]
    assert not prepared[2].any()


@pytest.mark.gpu
@needs_package
@needs_gpu
def test_a_graph_replays_with_other_activations() -> None:
    prepared = HUMMING.prepare(*random_layer(LAYER, "cuda"), LAYER)
    x = torch.randn(3, LAYER.k, device="cuda", dtype=torch.float16)
    HUMMING.gemm(x, *prepared, None, LAYER.n, 3, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = HUMMING.gemm(x, *prepared, None, LAYER.n, 3, 64)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, HUMMING.gemm(x, *prepared, None, LAYER.n, 3, 64))
