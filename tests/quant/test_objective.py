import pytest
import torch

from neuqi_serve.quant.objective import surrogate_loss, weighted_loss


def test_weighted_loss_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    groups, importance = torch.randn(3, 7, generator=generator), torch.rand(3, 7, generator=generator)
    scale, zero, bits = torch.tensor([0.3, 0.5, 1.1]), torch.tensor([-0.4, 1.5, 3.2]), 2
    for row, loss in enumerate(weighted_loss(groups, importance, scale, zero, bits).tolist()):
        s, z = scale[row].double().item(), zero[row].double().item()
        expected = sum(
            h * min((s * (q - z) - w) ** 2 for q in range(4))
            for w, h in zip(groups[row].double().tolist(), importance[row].double().tolist(), strict=True)
        )
        assert loss == pytest.approx(expected, rel=1e-12)


def test_weighted_loss_does_not_depend_on_how_ties_fall():
    groups, zero, bits = torch.tensor([[0.5, 1.5, 2.5]]), torch.tensor([0.0]), 2
    loss = weighted_loss(groups, None, torch.tensor([1.0]), zero, bits)
    assert loss.item() == 0.75


def test_weighted_loss_takes_one_importance_for_all_rows():
    groups, importance = torch.randn(4, 6), torch.rand(6)
    scale, zero = torch.full((4,), 0.4), torch.full((4,), 1.3)
    shared = weighted_loss(groups, importance, scale, zero, 3)
    torch.testing.assert_close(shared, weighted_loss(groups, importance.expand(4, 6), scale, zero, 3))


@pytest.mark.parametrize("bits", [2, 4])
def test_surrogate_is_convex_and_within_reach_of_the_loss(bits):
    generator = torch.Generator().manual_seed(3)
    groups, importance = torch.randn(1, 33, generator=generator), torch.rand(1, 33, generator=generator)
    zero = torch.linspace(-8, 2**bits + 8, 2001, dtype=torch.float64)
    many, scale = groups.expand(len(zero), -1), torch.full((len(zero),), 0.21)
    bound = surrogate_loss(many, importance, scale, zero, bits)
    assert (bound[2:] - 2 * bound[1:-1] + bound[:-2] >= -1e-9 * bound.max()).all()
    assert (weighted_loss(many, importance, scale, zero, bits) <= bound * (1 + 1e-12)).all()
