"""The C++ quantizer against its twin in torch, and against itself in other instruction sets."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from neuqi_kernels.cpu import quantize as native
from neuqi_kernels.cpu.library import INSTRUCTION_SETS, choose_instruction_set, load
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.quant import quantize as entry
from neuqi_serve.quant.affine import QuantizedWeight, dequantize
from neuqi_serve.quant.presets import search_plan
from neuqi_serve.quant.quantize import PackedWeight, quantize_in_torch, quantize_packed, quantize_weight
from neuqi_serve.quant.storage import normalized_importance, storage_dtype

LIBRARY = load()
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason="the C++ library is not built")

# Mean over the groups of the loss of one form ÷ that of the other. Their sums differ in order, so that a few groups
# end in another minimum nearby; the presets' own distance to the reference bounds by how much.
TWIN_MEAN = {"balanced": 1.001, "fast": 1.01}
# Where weights differ in importance, minima are many and single groups differ more.
TWIN_MEAN_WEIGHTED = {"balanced": 1.005, "fast": 1.05}


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn((4, rows, columns), generator=generator).square().sum(0)
    return torch.randn(rows, columns, generator=generator) * (4.0 / chi).sqrt()


def spiky(columns: int) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 8


def same(ours: PackedWeight, theirs: PackedWeight) -> bool:
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in vars(ours))


def losses(
    weight: torch.Tensor, packed: PackedWeight, bits: int, importance: torch.Tensor | None
) -> torch.Tensor:
    codes = entry.layout.unpack(packed.qweight, bits)
    error = (
        dequantize(QuantizedWeight(codes, packed.scale, packed.zero)).double() - weight.double()
    ).square()
    error *= 1.0 if importance is None else importance.double()
    return error.view(*packed.scale.shape, -1).sum(-1)


def twin(
    weight: torch.Tensor, spec: WeightSpec, importance: torch.Tensor | None, preset: str
) -> PackedWeight:
    mass = None
    if importance is not None:
        mass = normalized_importance(importance.view(spec.groups(weight.shape[1]), -1), -1).view(-1)
    return quantize_in_torch(weight, spec, mass, preset)


@pytest.mark.parametrize("preset", TWIN_MEAN)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_quantizer_is_as_good_as_its_twin(bits: int, group_size: int, preset: str) -> None:
    weight, spec = heavy_tailed(12, 640), WeightSpec(bits, group_size)
    ours = losses(weight, quantize_packed(weight, spec, preset=preset), bits, None)
    ratio = ours / losses(weight, twin(weight, spec, None, preset), bits, None)
    assert 2 - TWIN_MEAN[preset] <= ratio.mean() <= TWIN_MEAN[preset]


@pytest.mark.parametrize("preset", TWIN_MEAN)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 128), (4, 32), (3, -1)])
def test_the_quantizer_is_as_good_as_its_twin_under_importance(
    bits: int, group_size: int, preset: str
) -> None:
    weight, importance, spec = heavy_tailed(12, 640), spiky(640), WeightSpec(bits, group_size)
    ours = losses(weight, quantize_packed(weight, spec, importance, preset), bits, importance)
    ratio = ours / losses(weight, twin(weight, spec, importance, preset), bits, importance)
    assert 2 - TWIN_MEAN_WEIGHTED[preset] <= ratio.mean() <= TWIN_MEAN_WEIGHTED[preset]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (3, -1), (8, 64)])
def test_every_instruction_set_gives_the_same_bits(
    bits: int, group_size: int, storage: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 17 and 3 groups per row leave tiles of every width unfilled.
    columns = 17 * 64 if group_size in (32, 64, -1) else 3 * 128
    weight, spec = heavy_tailed(3, columns), WeightSpec(bits, group_size, storage)
    weight[1] = 5 + 0.001 * weight[1]
    importance = spiky(columns) if weighted else None
    found = {}
    assert isinstance(LIBRARY, ctypes.CDLL)
    for name in INSTRUCTION_SETS:
        if isinstance(choose_instruction_set(LIBRARY, name), int):
            monkeypatch.setenv("NEUQI_CPU_ISA", name)
            found[name] = quantize_packed(weight, spec, importance, "fast")
    assert len(found) > 1 or list(found) == ["portable"]
    assert all(same(found["portable"], other) for other in found.values())


@pytest.mark.parametrize("preset", TWIN_MEAN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_read_in_place_in_their_own_dtype(
    dtype: torch.dtype, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.cat((heavy_tailed(9, 96), torch.full((9, 32), float("nan"))), 1).to(dtype)[:, :96]
    spec = WeightSpec(4, 32)
    expected = quantize_packed(weight.float().contiguous(), spec, preset=preset)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: pytest.fail("a copy was made"))
    assert same(quantize_packed(weight, spec, preset=preset), expected)


def test_fast_takes_fewer_sweeps_than_balanced() -> None:
    for bits in (2, 3, 4):
        for weighted in (False, True):
            assert (
                search_plan("fast", bits, weighted).sweeps
                < search_plan("balanced", bits, weighted).sweeps / 2
            )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_a_weight_that_is_not_finite_is_refused_by_its_row(value: float) -> None:
    weight = heavy_tailed(40, 64).to(torch.bfloat16)
    weight[33, 50] = value
    with pytest.raises(UsageError, match="1 non-finite or larger values, the first in row 33"):
        quantize_weight(weight, WeightSpec(3, 64))


def test_what_the_library_does_not_read_is_refused_with_a_reason() -> None:
    weight = heavy_tailed(4, 64)
    storage = storage_dtype(WeightSpec())
    assert native.refuse(weight, 4, 64, storage) is None
    assert "not torch.float64" in (native.refuse(weight.double(), 4, 64, storage) or "")
    assert "side by side" in (native.refuse(weight.t().contiguous().t(), 4, 64, storage) or "")
    assert "not 5 and 64" in (native.refuse(weight, 5, 64, storage) or "")
    assert "not 4 and 48" in (native.refuse(weight, 4, 48, storage) or "")
    with pytest.raises(ValueError, match="it refuses: takes"):
        native.quantize(weight, None, 5, 64, storage, search_plan("fast", 4, weighted=False))
    with pytest.raises(ValueError, match=r"importance as float32 \[64\]"):
        native.quantize(weight, torch.ones(32), 4, 64, storage, search_plan("fast", 4, weighted=True))


def test_without_a_library_torch_works(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = heavy_tailed(5, 64), WeightSpec(2, 32)
    monkeypatch.setattr(native, "_loaded", lambda forced: "built without a C++ compiler")
    assert same(quantize_packed(weight, spec, preset="fast"), twin(weight, spec, None, "fast"))
    assert native.instruction_set() is None


def test_on_a_gpu_the_triton_quantizer_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice alone, on the device of shapes without data; the kernel is tested in tests/neuqi_kernels."""
    pytest.importorskip("triton")
    from neuqi_kernels.gpu import quantize_launch

    weight, spec = heavy_tailed(5, 64), WeightSpec(2, 32)
    expected = quantize_packed(weight, spec, preset="fast")
    asked = []

    def quantize(rows: torch.Tensor, *rest: object) -> tuple[torch.Tensor, ...]:
        asked.append(rest)
        return expected.qweight, expected.scale, expected.zero, torch.ones(()) * (len(asked) == 2)

    monkeypatch.setattr(quantize_launch, "quantize", quantize)
    monkeypatch.setattr(entry.cpu, "refuse", lambda *_: pytest.fail("the CPU was asked"))
    real = entry._kernel
    monkeypatch.setattr(entry, "_kernel", lambda rows, *rest: real(OnGpu(rows), *rest))
    assert same(quantize_packed(weight, spec, preset="fast"), expected)
    assert asked[0][1:3] == (2, 32)
    weight[2, 1] = float("nan")
    with pytest.raises(UsageError, match="the first in row 2"):
        quantize_packed(weight, spec, preset="fast")


class OnGpu:
    """A weight that says it lies on a GPU."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.shape = weight.shape

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.weight)


def test_a_library_without_the_quantizer_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        pass

    monkeypatch.setattr(native, "load", Older)
    native._loaded.cache_clear()
    try:
        reason = native.refuse(heavy_tailed(4, 64), 4, 64, torch.float16)
    finally:
        native._loaded.cache_clear()
    assert reason == "the library was built without the quantizer; install the package again"
