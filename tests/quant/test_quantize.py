import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuqi_kernels.layout import pack
from neuqi_serve.config import PRESETS, WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.quant.affine import AffineParams, dequantize, quantize
from neuqi_serve.quant.quantize import quantize_packed, quantize_weight

# The winner is picked by losses summed in float32; the test sums in float64.
FLOAT32_SUMS = 1e-5


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def losses(weight, quantized, importance=None):
    """Loss of each group by the dequantized weights, that is with the float32 arithmetic of inference."""
    error = (dequantize(quantized).double() - weight.double()).square()
    error *= 1.0 if importance is None else importance.double()
    return error.view(*quantized.scale.shape, -1).sum(-1)


def same(ours, theirs):
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in vars(ours))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "spec", [WeightSpec(3, 32), WeightSpec(2, -1, "bfloat16"), WeightSpec(8, 64, "float32")]
)
def test_codes_are_those_of_the_stored_parameters(preset, spec):
    weight = normal(3, 192)
    found = quantize_weight(weight, spec, preset=preset)
    assert found.scale.shape == found.zero.shape == (3, spec.groups(192))
    assert found.scale.dtype == found.zero.dtype == getattr(torch, spec.scale_dtype)
    assert torch.equal(found.codes, quantize(weight, AffineParams(found.scale, found.zero), spec.bits))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fast_is_never_worse_than_min_max(bits, dtype):
    weight = normal(24, 128)
    weight[:8] = 5 + 0.001 * weight[:8]
    weight[8:12] *= 1e-6
    weight[12:14] = weight[12:14].sign()
    weight[14:16, 1:] = 0
    importance = normal(128, seed=1).square()
    spec = WeightSpec(bits, 64, dtype)
    for mass in (None, importance):
        best = losses(weight, quantize_weight(weight, spec, mass), mass)
        plain = losses(weight, quantize_weight(weight, spec, mass, "minmax"), mass)
        assert (best <= plain * (1 + FLOAT32_SUMS)).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=32, max_size=32),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_any_group_is_stored_finite_and_no_worse_than_min_max(values, bits, dtype):
    weight, spec = torch.tensor([values]), WeightSpec(bits, 32, dtype)
    found = quantize_weight(weight, spec)
    assert torch.isfinite(dequantize(found)).all()
    assert (found.scale > 0).all()
    best, plain = (
        losses(weight, found),
        losses(weight, quantize_weight(weight, spec, preset="minmax")),
    )
    # Squares below float32's range vanish in the choice.
    assert (best <= plain * (1 + FLOAT32_SUMS) + 1e-36).all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_constant_groups_are_exact(preset, group_size):
    weight = torch.tensor([3.0, -0.02, 0.0, 1e-3]).half().unsqueeze(1).repeat(1, 320)
    found = quantize_weight(weight, WeightSpec(2, group_size), preset=preset)
    assert torch.equal(dequantize(found).half(), weight)
    assert found.scale[2].unique().tolist() == [1.0]
    assert found.zero[2].unique().tolist() == [0.0]
    assert found.codes[:, 0].tolist() == [1, 0, 0, 1]


def test_a_near_constant_group_far_from_zero_is_no_worse_than_a_constant():
    weight = 5 + 0.001 * normal(16, 128)
    found = quantize_weight(weight, WeightSpec(4, 128))
    constant = (weight - 5.0).double().square().sum(-1)
    assert (losses(weight, found) <= constant * (1 + FLOAT32_SUMS)).all()


def test_a_group_without_importance_is_quantized_as_if_all_mattered_alike():
    weight, importance = normal(4, 128), torch.rand(128, generator=torch.Generator().manual_seed(2)) + 0.5
    importance[32:64] = 0
    spec = WeightSpec(2, 32)
    found = quantize_weight(weight, spec, importance)
    ones = quantize_weight(weight, spec, torch.ones(128))
    assert torch.equal(found.codes[:, 32:64], ones.codes[:, 32:64])
    assert torch.equal(found.scale[:, 1], ones.scale[:, 1])
    assert not torch.equal(found.scale[:, 0], ones.scale[:, 0])


def test_importance_lowers_the_loss_it_weighs():
    weight, importance = normal(16, 64), normal(64, seed=3).exp().square()
    spec = WeightSpec(2, 64)
    heeded = losses(weight, quantize_weight(weight, spec, importance), importance).sum()
    ignored = losses(weight, quantize_weight(weight, spec), importance).sum()
    assert heeded < 0.95 * ignored


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, -1), (4, 64), (8, 128)])
def test_packed_is_the_packed_form_of_the_codes(bits, group_size):
    weight, spec = normal(5, 384), WeightSpec(bits, group_size)
    codes, packed = quantize_weight(weight, spec), quantize_packed(weight, spec)
    assert torch.equal(packed.qweight, pack(codes.codes, bits))
    assert torch.equal(packed.scale, codes.scale)
    assert torch.equal(packed.zero, codes.zero)


@pytest.mark.parametrize("group_size", [32, -1])
def test_chunks_threads_and_strides_do_not_change_the_result(group_size):
    weight, spec = normal(67, 320), WeightSpec(3, group_size)
    importance = torch.rand(320, generator=torch.Generator().manual_seed(4))
    whole = quantize_packed(weight, spec, importance)
    assert same(whole, quantize_packed(weight, spec, importance, chunk_elements=1))
    assert same(whole, quantize_packed(weight, spec, importance, chunk_elements=7 * 320))
    assert same(whole, quantize_packed(weight.t().contiguous().t(), spec, importance, chunk_elements=5 * 320))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert same(whole, quantize_packed(weight, spec, importance))
    finally:
        torch.set_num_threads(threads)


def test_slices_of_a_matrix_get_the_codes_of_the_whole():
    weight, spec = normal(40, 256), WeightSpec(4, 64)
    whole = quantize_weight(weight, spec)
    rows = quantize_weight(weight[13:31], spec)
    assert torch.equal(rows.codes, whole.codes[13:31])
    half = quantize_weight(weight[:, 128:], spec)
    assert torch.equal(half.codes, whole.codes[:, 128:])
    assert torch.equal(half.zero, whole.zero[:, 2:])


def test_modes_of_the_calling_thread_do_not_change_the_result():
    weight, spec = normal(9, 128), WeightSpec(4, 64)
    plain = quantize_packed(weight, spec)
    with torch.inference_mode():
        assert same(plain, quantize_packed(weight.clone(), spec))
    of_parameter = quantize_packed(torch.nn.Parameter(weight), spec)
    assert same(plain, of_parameter)
    assert not of_parameter.scale.requires_grad
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert same(plain, quantize_packed(weight, spec))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_floating_dtype_are_quantized_as_float32(dtype):
    weight, spec = normal(4, 96).to(dtype), WeightSpec(3, 32)
    assert same(quantize_weight(weight, spec), quantize_weight(weight.float(), spec))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_weights_that_are_not_finite_are_refused_with_their_place(value):
    weight = normal(6, 64)
    weight[4, 3] = weight[5, 60] = value
    with pytest.raises(UsageError, match="2 non-finite or larger values, the first in row 4"):
        quantize_weight(weight, WeightSpec(4, 32))


@pytest.mark.parametrize(
    "weight", [torch.zeros(64), torch.zeros(2, 64, dtype=torch.int32), torch.zeros(0, 64)]
)
def test_something_else_than_a_weight_matrix_is_refused(weight):
    with pytest.raises(UsageError, match=r"floating-point weight \[N, K\]"):
        quantize_weight(weight, WeightSpec(4, 32))


def test_an_unknown_preset_is_refused():
    with pytest.raises(UsageError, match="preset must be one of"):
        quantize_packed(normal(1, 64), WeightSpec(4, 32), preset="best")


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(32), r"importance \[K\] with K = 64"),
        (torch.full((64,), -1.0), "finite importance of at least 0, got 64"),
        (torch.full((64,), float("nan")), "finite importance of at least 0, got 64"),
    ],
)
def test_an_importance_that_does_not_fit_is_refused(importance, message):
    with pytest.raises(UsageError, match=message):
        quantize_weight(normal(2, 64), WeightSpec(4, 32), importance)


def test_a_row_that_groups_do_not_divide_is_refused():
    with pytest.raises(UsageError, match="does not divide"):
        quantize_weight(normal(2, 96), WeightSpec(4, 64))


def test_chunks_of_nothing_are_refused():
    with pytest.raises(UsageError, match="chunk_elements"):
        quantize_packed(normal(2, 64), WeightSpec(4, 32), chunk_elements=0)
