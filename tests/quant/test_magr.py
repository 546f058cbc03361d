import pytest
import torch
from torch import Tensor

from neuqi_serve.errors import UsageError
from neuqi_serve.quant.hessian import damped, proxy_loss
from neuqi_serve.quant.magr import largest_eigenvalue, reduce_magnitude, shrink_largest


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    # Few directions carry the inputs: most of a weight is free to move.
    seen = torch.randn(400, 9, generator=generator) @ torch.randn(9, columns, generator=generator)
    weight = torch.distributions.StudentT(4.0)
    torch.manual_seed(3)
    return weight.sample((rows, columns)) * 0.05, damped(seen.T @ seen / len(seen), 1e-4)


def test_shrinking_is_the_proximal_map():
    values, alpha = torch.randn(5, 17, dtype=torch.float64), 0.7
    shrunk = shrink_largest(values, alpha)
    torch.testing.assert_close((values - shrunk).abs().sum(1), torch.full((5,), alpha, dtype=torch.float64))

    def objective(candidate: Tensor) -> Tensor:
        return 0.5 * (candidate - values).square().sum(1) + alpha * candidate.abs().amax(1)

    best = objective(shrunk)
    for step in (1e-3, 1e-1):
        for _ in range(50):
            assert (objective(shrunk + step * torch.randn_like(values)) >= best - 1e-12).all()


def test_shrinking_by_more_than_there_is_gives_zeros():
    assert torch.equal(shrink_largest(torch.tensor([[0.2, -0.3]]), 0.6), torch.zeros(1, 2))


def test_largest_eigenvalue_is_bounded_tightly_from_above():
    _, hessian = layer(1, 64)
    exact = float(torch.linalg.eigvalsh(hessian)[-1])
    assert exact <= largest_eigenvalue(hessian) <= 1.05 * exact


@pytest.mark.parametrize("group_size", [32, -1])
def test_range_falls_and_outputs_hardly_move(group_size):
    weight, hessian = layer(24, 96)
    reduced = reduce_magnitude(weight, hessian, group_size)
    size = 96 if group_size == -1 else group_size
    before, after = (one.view(24, -1, size).abs().amax(2).mean() for one in (weight, reduced))
    assert after < 0.8 * before
    assert proxy_loss(reduced - weight, hessian).sum() < 0.01 * proxy_loss(weight, hessian).sum()


def test_no_strength_leaves_the_weight_and_scaling_scales():
    weight, hessian = layer(4, 64)
    assert torch.equal(reduce_magnitude(weight, hessian, strength=0.0), weight)
    torch.testing.assert_close(reduce_magnitude(4 * weight, hessian), 4 * reduce_magnitude(weight, hessian))


def test_bad_options_are_refused():
    weight, hessian = layer(4, 64)
    with pytest.raises(UsageError):
        reduce_magnitude(weight, hessian, strength=-1.0)
    with pytest.raises(UsageError):
        reduce_magnitude(weight, hessian, group_size=48)
