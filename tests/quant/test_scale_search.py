import pytest
import torch

from neuqi_serve.quant import scale_search
from neuqi_serve.quant.objective import weighted_loss
from neuqi_serve.quant.scale_search import search_scale
from neuqi_serve.quant.zero_point import solve_zero


def sample(rows, size, seed=0):
    weight = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weight - weight.mean(-1, keepdim=True)


def loss(weight, importance, params, bits):
    return weighted_loss(weight, importance, params.scale, params.zero, bits)


@pytest.mark.parametrize("bits", [2, 4])
def test_search_beats_min_max_and_integer_zero_points_on_its_own_scales(bits):
    weight, top = sample(6, 32), 2**bits - 1
    found = loss(weight, None, search_scale(weight, None, bits, torch.float64), bits)
    largest = (weight.amax(-1) - weight.amin(-1)) / top
    rivals = [weighted_loss(weight, None, largest, -weight.amin(-1) / largest, bits)]
    for step in range(4, 65, 4):
        scale = largest * step / 64
        rivals += [
            weighted_loss(weight, None, scale, torch.full_like(scale, z), bits) for z in range(top + 1)
        ]
    assert (found <= torch.stack(rivals).amin(0) * (1 + 1e-11)).all()


def test_search_keeps_the_best_of_the_coarse_scales():
    weight, bits = sample(3, 48), 3
    importance = torch.rand(3, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = loss(weight, importance, search_scale(weight, importance, bits, torch.float64), bits)
    largest = (weight.amax(-1) - weight.amin(-1)) / 7
    coarse = [solve_zero(weight, importance, largest * i / 64, bits)[1] for i in range(8, 65, 7)]
    assert (found <= torch.stack(coarse).amin(0) * (1 + 1e-11)).all()


def test_search_in_float32_is_as_good_as_in_float64():
    weight, bits = sample(16, 64), 4
    single = loss(weight, None, search_scale(weight, None, bits, torch.float32), bits)
    double = loss(weight, None, search_scale(weight, None, bits, torch.float64), bits)
    # float32 ranks candidates with a relative error of about 1e-5, so that is what it can lose.
    torch.testing.assert_close(single, double, rtol=1e-4, atol=0)


def test_search_does_not_depend_on_the_chunks(monkeypatch):
    weight = sample(5, 32)
    whole = search_scale(weight, None, 2, torch.float64)
    monkeypatch.setattr(scale_search, "CHUNK_ELEMENTS", 64)
    parts = search_scale(weight, None, 2, torch.float64)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero, parts.zero)
