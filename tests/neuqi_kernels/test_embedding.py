"""``neuqi::embedding``: every backend against the definition, to the bit."""

from __future__ import annotations

import pytest
import torch

from neuqi_kernels import dispatch, ops, reference
from neuqi_kernels.gpu import planar
from neuqi_kernels.gpu.backend import TRITON
from neuqi_kernels.layout import pack
from neuqi_kernels.spec import GemmSpec

ops.register()

N, K = 147, 384
CPU_BACKENDS = ("cpu_native", "cpu_blocks", "reference")


def weights(
    bits: int, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    groups = 1 if group_size == -1 else K // group_size
    scale = torch.rand(N, groups, generator=generator) * 0.1
    # Far outside the range of the codes too.
    zero = torch.randn(N, groups, generator=generator) * (4 << bits)
    return pack(codes, bits), scale.to(dtype), zero.to(dtype)


def spec_of(bits: int, group_size: int, dtype: torch.dtype, scale_dtype: torch.dtype) -> GemmSpec:
    return GemmSpec(N, K, bits, group_size, "cpu", dtype, scale_dtype)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "scale_dtype"), [(32, torch.float16), (128, torch.bfloat16), (-1, torch.float32)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_those_of_the_dequantized_matrix(
    backend: str, bits: int, group_size: int, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    spec = spec_of(bits, group_size, dtype, scale_dtype)
    reason = dispatch.refusal(backend, spec)
    if reason is not None:
        pytest.skip(reason)
    canonical = weights(bits, group_size, scale_dtype)
    prepared = dispatch.choose(spec, only=backend).prepare(*canonical, spec)
    ids = torch.tensor([[0, N - 1, 16], [17, 15, 17], [144, 64, 3]])
    found = torch.ops.neuqi.embedding(ids, *prepared, N, K, bits, group_size, dtype, backend)
    expected = reference.dequantize(*canonical, bits, group_size).to(dtype)[ids]
    assert found.shape == (3, 3, K)
    assert torch.equal(found, expected)


def test_many_rows_on_several_threads() -> None:
    spec = spec_of(8, 128, torch.bfloat16, torch.float16)
    canonical = weights(8, 128, torch.float16)
    chosen = dispatch.choose(spec)
    ids = torch.randint(0, N, (999,), generator=torch.Generator().manual_seed(1))
    found = chosen.embedding(ids, *chosen.prepare(*canonical, spec), N, K, 8, 128, torch.bfloat16)
    assert torch.equal(found, reference.embedding(ids, *canonical, 8, 128, torch.bfloat16))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("ids", [[0, N], [-1 - N, 0]])
def test_an_id_outside_the_vocabulary_is_an_error(backend: str, ids: list[int]) -> None:
    spec = spec_of(4, 128, torch.float32, torch.float16)
    reason = dispatch.refusal(backend, spec)
    if reason is not None:
        pytest.skip(reason)
    prepared = dispatch.choose(spec, only=backend).prepare(*weights(4, 128, torch.float16), spec)
    with pytest.raises(IndexError):
        torch.ops.neuqi.embedding(torch.tensor(ids), *prepared, N, K, 4, 128, torch.float32, backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_ids_give_no_rows(backend: str) -> None:
    spec = spec_of(4, 128, torch.float32, torch.float16)
    reason = dispatch.refusal(backend, spec)
    if reason is not None:
        pytest.skip(reason)
    prepared = dispatch.choose(spec, only=backend).prepare(*weights(4, 128, torch.float16), spec)
    ids = torch.empty(0, dtype=torch.int64)
    found = torch.ops.neuqi.embedding(ids, *prepared, N, K, 4, 128, torch.float32, backend)
    assert found.shape == (0, K)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [64, -1])
def test_gpu_layout_gives_the_same_rows(bits: int, group_size: int) -> None:
    """The gather of the GPU backend is plain torch, and so runs anywhere."""
    canonical = weights(bits, group_size, torch.float16)
    prepared = TRITON.prepare(*canonical, spec_of(bits, group_size, torch.float16, torch.float16))
    ids = torch.tensor([[N - 1, 0, 63], [64, 65, 64]])
    found = TRITON.embedding(ids, *prepared, N, K, bits, group_size, torch.bfloat16)
    assert torch.equal(found, reference.embedding(ids, *canonical, bits, group_size, torch.bfloat16))
    rows = planar.rows_from_planar(prepared[0], ids.reshape(-1), K, bits)
    assert torch.equal(rows, canonical[0][ids.reshape(-1)])


def test_traced_shape_and_dtype_are_those_of_the_result() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        ids, empty = torch.empty(2, 3, dtype=torch.int64), torch.empty(1)
        traced = torch.ops.neuqi.embedding(
            ids, empty, empty, empty, N, K, 4, 128, torch.bfloat16, "reference"
        )
    assert (traced.shape, traced.dtype) == ((2, 3, K), torch.bfloat16)
