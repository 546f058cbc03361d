import pytest
import torch

from neuqi_serve.quant.affine import max_code
from neuqi_serve.quant.objective import surrogate_loss, weighted_loss
from neuqi_serve.quant.zero_point import (
    SortedGroups,
    brute_force_zero,
    solve_zero,
    surrogate_slope,
    surrogate_zero,
)

# Both sides sum at most 33 terms in float64 in different orders.
ROUNDING = 1e-11
# The window of one code each way around the surrogate's minimum can miss the global optimum (the paper's Table 1
# reports 0.2 to 0.3 % on some real rows); on these seeds it hardly does.
WINDOW_MISS = 1e-4


def sample(rows=48, size=33, seed=0, spiky=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    weight[: rows // 3] = weight[: rows // 3] * 0.3 + 5.0
    weight[-1] *= torch.linspace(0.1, 8, size).double()
    importance = torch.rand(rows, size, generator=generator, dtype=torch.float64)
    return weight, importance**6 + 1e-3 if spiky else importance


def scales(weight, bits, ratio):
    return (weight.amax(-1) - weight.amin(-1)) / max_code(bits) * ratio


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.2])
def test_solver_reports_the_loss_of_the_definition(bits, ratio):
    weight, importance = sample()
    scale = scales(weight, bits, ratio)
    zero, loss = solve_zero(weight, importance, scale, bits)
    torch.testing.assert_close(
        loss, weighted_loss(weight, importance, scale, zero, bits), rtol=ROUNDING, atol=0
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_solver_finds_what_brute_force_finds(bits, ratio):
    weight, importance = sample()
    scale = scales(weight, bits, ratio)
    _, loss = solve_zero(weight, importance, scale, bits)
    _, best = brute_force_zero(weight, importance, scale, bits)
    assert (loss >= best * (1 - ROUNDING)).all()
    assert (loss / best).mean() <= 1 + WINDOW_MISS


def test_brute_force_is_no_worse_than_any_point_of_a_dense_grid():
    weight, importance = sample(rows=6, size=9)
    scale, bits = scales(weight, 2, 0.7), 2
    zero, best = brute_force_zero(weight, importance, scale, bits)
    direct = weighted_loss(weight, importance, scale, zero, bits)
    torch.testing.assert_close(best, direct, rtol=ROUNDING, atol=0)
    start = -weight.amax(-1) / scale
    for step in torch.linspace(-2, 12, 1401).tolist():
        loss = weighted_loss(weight, importance, scale, start + step, bits)
        assert (best <= loss * (1 + ROUNDING)).all()


def test_elements_on_rounding_boundaries_are_counted_once():
    """Integer weights at scale 1 put all boundaries at half-integers, where the surrogate's minimum lies too."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randint(-6, 7, (200, 12), generator=generator).double()
    importance = torch.rand(200, 12, generator=generator, dtype=torch.float64)
    scale = torch.ones(200, dtype=torch.float64)
    zero, loss = solve_zero(weight, importance, scale, 2)
    torch.testing.assert_close(
        loss, weighted_loss(weight, importance, scale, zero, 2), rtol=ROUNDING, atol=1e-12
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_shift_mirror_scaling_and_permutation_leave_the_loss(bits):
    weight, importance = sample(spiky=False)
    scale = scales(weight, bits, 0.7)
    _, loss = solve_zero(weight, importance, scale, bits)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(5))
    for changed, mass, step, factor in (
        (weight + 0.75, importance, scale, 1.0),
        (-weight, importance, scale, 1.0),
        (weight * 8.0, importance, scale * 8.0, 64.0),
        (weight[:, order], importance[:, order], scale, 1.0),
    ):
        _, same = solve_zero(changed, mass, step, bits)
        # A flat surrogate minimum may be bisected a hair differently, which moves the window's edge.
        torch.testing.assert_close(same, loss * factor, rtol=1e-6, atol=0)


def test_shift_moves_the_zero_point_and_mirror_reflects_it():
    weight, importance = sample(spiky=False)
    bits, scale = 3, scales(weight, 3, 0.8)
    zero, _ = solve_zero(weight, importance, scale, bits)
    shifted, _ = solve_zero(weight + 0.75, importance, scale, bits)
    mirrored, _ = solve_zero(-weight, importance, scale, bits)
    torch.testing.assert_close(shifted, zero - 0.75 / scale, rtol=0, atol=1e-6)
    torch.testing.assert_close(mirrored, max_code(bits) - zero, rtol=0, atol=1e-6)


def test_surrogate_slope_is_the_derivative():
    weight, importance = sample(rows=7)
    bits, scale = 3, scales(weight, 3, 0.4)
    zero, step = torch.linspace(-1, 6, 7).double(), 1e-6
    prepared = SortedGroups.of(weight, importance)
    slope = surrogate_slope(prepared, scale.unsqueeze(-1), zero.unsqueeze(-1), bits).squeeze(-1)
    ahead = surrogate_loss(weight, importance, scale, zero + step, bits)
    behind = surrogate_loss(weight, importance, scale, zero - step, bits)
    numeric = (ahead - behind) / (2 * step) / (2 * scale.square())
    # Central differences of a loss of size 100 in float64: 100·2e-16/1e-6.
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_surrogate_zero_minimises_the_surrogate(ratio):
    weight, importance = sample(rows=12)
    bits, scale = 2, scales(weight, 2, ratio)
    found = surrogate_zero(SortedGroups.of(weight, importance), scale, bits)
    least = surrogate_loss(weight, importance, scale, found, bits)
    for step in torch.linspace(-3, 3, 61).tolist():
        assert (surrogate_loss(weight, importance, scale, found + step, bits) >= least * (1 - 1e-6)).all()
