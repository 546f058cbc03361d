import pytest
import torch

from neuqi_serve.errors import UsageError
from neuqi_serve.quant.hessian import HessianSum, activation_order, damped, feedback_factor, proxy_loss

SIZE = 63
# Float32 products of some hundred terms, relative to the diagonal: 2^-24 times a small factor.
FLOAT32_PRODUCTS = 1e-5


def inputs(tokens: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    return torch.randn(tokens, size, generator=generator) @ mixing


def test_sum_over_parts_is_the_mean_of_outer_products():
    seen = inputs(4197)
    total = HessianSum(SIZE)
    for part in seen.split(17):
        total.add(part.unsqueeze(0))
    expected = seen.double().T @ seen.double() / len(seen)
    assert total.tokens == len(seen)
    torch.testing.assert_close(
        total.mean(), expected, rtol=0, atol=FLOAT32_PRODUCTS * float(expected.diagonal().max())
    )


def test_a_small_input_counts_after_large_ones():
    total = HessianSum(1)
    total.add(torch.full((1, 1), 2.0**13))
    for _ in range(64):
        total.add(torch.ones(1, 1))
    # 2^26 + 1 is no float32.
    assert total.total.item() == 2.0**26 + 64


def test_half_precision_inputs_are_multiplied_in_float32():
    total = HessianSum(1)
    total.add(torch.full((3, 1), 300.0, dtype=torch.float16))
    assert total.mean().item() == 90000.0


def test_no_input_gives_zeros_and_damping_makes_them_the_identity():
    assert torch.equal(HessianSum(3).mean(), torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(damped(HessianSum(3).mean()), torch.eye(3, dtype=torch.float64))


def test_damping_raises_the_diagonal_by_a_share_of_its_mean():
    hessian = torch.tensor([[1.0, 0.5], [0.5, 3.0]])
    assert torch.allclose(damped(hessian, 0.1), torch.tensor([[1.2, 0.5], [0.5, 3.2]], dtype=torch.float64))
    assert hessian[0, 0] == 1.0


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("tokens", [500, 20])
def test_factor_is_the_hessian_in_order(act_order, tokens):
    seen = inputs(tokens)
    hessian = damped(seen.T.double() @ seen.double() / tokens)
    factor = feedback_factor(hessian, act_order)
    product = factor.upper * factor.pivots @ factor.upper.T
    torch.testing.assert_close(product, hessian[factor.order][:, factor.order], rtol=0, atol=1e-12)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.equal(factor.upper.diagonal(), torch.ones(SIZE, dtype=torch.float64))
    diagonal = hessian.diagonal()[factor.order]
    assert act_order == bool((diagonal[1:] <= diagonal[:-1]).all())


def test_a_singular_hessian_is_raised_until_it_factors():
    vector = torch.arange(1.0, 6.0, dtype=torch.float64)
    factor = feedback_factor(vector.outer(vector))
    assert factor.upper.isfinite().all()
    assert (factor.pivots > 0).all()


def test_equal_diagonals_keep_their_order():
    assert activation_order(torch.eye(40)).tolist() == list(range(40))


def test_proxy_loss_is_the_quadratic_form():
    error, hessian = torch.randn(3, SIZE), damped(inputs(99).T @ inputs(99))
    expected = torch.stack([row @ hessian @ row for row in error.double()])
    torch.testing.assert_close(proxy_loss(error, hessian), expected)


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(2, 3),
        torch.tensor([[float("nan")]]),
        torch.tensor([[-1.0]]),
        torch.tensor([[float("inf")]]),
    ],
)
def test_what_is_no_hessian_is_refused(bad):
    with pytest.raises(UsageError):
        damped(bad)
