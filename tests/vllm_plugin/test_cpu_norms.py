"""The compiled norms against vLLM's own definition, and that vLLM takes them when asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

ir = pytest.importorskip("vllm.ir", reason="needs a vLLM whose operations take implementations")

from vllm.platforms import current_platform  # noqa: E402

from neuqi_serve.server.defaults import NORM_OPERATIONS, NORM_PROVIDER  # noqa: E402
from neuqi_serve.vllm_plugin.cpu_norms import OPERATIONS, PROVIDER, register_cpu_norms  # noqa: E402

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's build for CPUs")

EPSILON = 1e-5


@pytest.fixture(autouse=True)
def registered() -> None:
    register_cpu_norms()
    # A second time must not be an error: vLLM calls plugins several times.
    register_cpu_norms()


def random(rows: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def implementation(name: str, provider: str) -> Any:
    return getattr(ir.ops, name).impls[provider]


def test_names_are_those_of_the_servers_default() -> None:
    assert (PROVIDER, OPERATIONS) == (NORM_PROVIDER, NORM_OPERATIONS)
    assert all(implementation(name, PROVIDER).supported for name in OPERATIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "size"), [(1, 256), (7, 2048), (130, 320)])
def test_norms_are_those_of_the_definition(dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual, weight = (
        random(rows, size, dtype, 0),
        random(rows, size, dtype, 1),
        random(1, size, dtype, 2)[0],
    )
    expected = implementation("rms_norm", "native").impl_fn(x, weight, EPSILON)
    # Both round to the dtype before the weight and after it, at sums that were added in another order.
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    found = implementation("rms_norm", PROVIDER).impl_fn(x, weight, EPSILON)
    torch.testing.assert_close(found, expected, **tolerance)
    expected = implementation("fused_add_rms_norm", "native").impl_fn(x, residual, weight, EPSILON)
    # In place: the inputs become the outputs.
    found = implementation("fused_add_rms_norm", PROVIDER).impl_fn(
        x.clone(), residual.clone(), weight, EPSILON
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_what_the_kernels_cannot_read_is_refused() -> None:
    x, weight = random(4, 64, torch.bfloat16, 0), torch.ones(64, dtype=torch.bfloat16)
    takes = implementation("rms_norm", PROVIDER)._supports_args
    assert takes(x, weight, EPSILON)
    assert not takes(x, None, EPSILON)
    assert not takes(x, weight.float(), EPSILON)
    assert not takes(x, weight, EPSILON, 32)
    assert not takes(random(4, 128, torch.bfloat16, 0)[:, :64], weight, EPSILON)
    takes = implementation("fused_add_rms_norm", PROVIDER)._supports_args
    assert takes(x, x.clone(), weight, EPSILON)
    assert not takes(x, x.float(), weight, EPSILON)


def test_vllm_dispatches_to_them_when_asked() -> None:
    x, weight = random(2, 64, torch.bfloat16, 0), torch.ones(64, dtype=torch.bfloat16)
    operation = ir.ops.rms_norm
    with operation.set_priority([PROVIDER, "native"]):
        assert operation.dispatch(x, weight, EPSILON).provider == PROVIDER
        assert operation.dispatch(x, None, EPSILON).provider == "native"
