import pytest
import torch

from neuqi_serve.errors import UsageError
from neuqi_serve.quant.rotation import hadamard, random_rotation


@pytest.mark.parametrize("size", [1, 2, 4, 12, 16, 20, 24, 28, 36, 40, 44, 60, 96, 192, 896, 1536])
def test_hadamard_matrices_are_signs_with_orthogonal_rows(size):
    matrix = hadamard(size)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 10, 17, 92])
def test_there_is_none_of_other_orders_or_none_constructed(size):
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [1, 17, 48, 63, 64, 92, 192, 320])
def test_rotations_are_orthogonal_at_every_size_and_spread_an_outlier(size):
    rotation = random_rotation(size, seed=1)
    torch.testing.assert_close(
        rotation @ rotation.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
    )
    if hadamard(size) is not None:
        torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, size**-0.5))


def test_a_seed_decides():
    assert torch.equal(random_rotation(64, 3), random_rotation(64, 3))
    assert not torch.equal(random_rotation(64, 3), random_rotation(64, 4))


def test_no_dimension_is_refused():
    with pytest.raises(UsageError):
        random_rotation(0)
