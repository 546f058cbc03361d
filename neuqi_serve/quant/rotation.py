"""Random orthogonal matrices made of a Hadamard matrix: they spread outliers evenly over all dimensions.

``Q = diag(signs)·H_n/√n``. ``n = 2^k·m`` with m odd: ``H_n`` is the Kronecker product of Sylvester's ``H_{2^j}`` with a
Hadamard matrix of order 4m or 2^i·m by Paley, where one exists (12, 20, 28, 36, 44, …). For other m there is no
construction here; a random orthogonal matrix of order m takes its place, which still mixes all n dimensions. Nothing
at inference knows which: rotations are folded into the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError


def random_rotation(size: int, seed: int = 0) -> Tensor:
    """Orthogonal ``Q`` float64 ``[n, n]``; the same for a seed.

    Raises:
        UsageError: a size below 1.
    """
    if size < 1:
        raise UsageError(f"expected a dimension of at least 1 to rotate, got {size}.")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return signs.unsqueeze(1) * _orthogonal(size, generator)


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix float64 ``[n, n]``, entries ±1 and ``H Hᵀ = n·I``; None where no construction is known here.

    Reference: Sylvester (1867) for doubling; Paley (1933), constructions I and II over prime fields.
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4:
        return None
    if size & (size - 1) and _is_prime(size - 1) and (size - 1) % 4 == 3:
        return _paley_first(size - 1)
    if size & (size - 1) and _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        return _paley_second(size // 2 - 1)
    half = hadamard(size // 2)
    return None if half is None else _kronecker(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), half)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    matrix = hadamard(size)
    if matrix is not None:
        return matrix / size**0.5
    odd = size
    while odd % 2 == 0:
        odd //= 2
    mixed = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q
    power = hadamard(size // odd)
    if power is None:
        raise AssertionError("every power of two has a Hadamard matrix")
    return _kronecker(power / (size // odd) ** 0.5, mixed)


def _kronecker(first: Tensor, second: Tensor) -> Tensor:
    return torch.kron(first.contiguous(), second.contiguous())


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _jacobsthal(prime: int) -> Tensor:
    """``Q_ij = χ(i − j)``: 1 for a square modulo the prime, −1 for none, 0 on the diagonal."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(prime).square() % prime] = 1.0
    character[0] = 0.0
    index = torch.arange(prime)
    return character[(index.unsqueeze(1) - index) % prime]


def _paley_first(prime: int) -> Tensor:
    """Order ``q + 1`` for a prime q ≡ 3 (mod 4): ``I + S`` with S skew."""
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = _jacobsthal(prime)
    return skew + torch.eye(prime + 1, dtype=torch.float64)


def _paley_second(prime: int) -> Tensor:
    """Order ``2(q + 1)`` for a prime q ≡ 1 (mod 4): zeros and signs of a symmetric matrix become blocks of two."""
    symmetric = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    symmetric[0, 1:], symmetric[1:, 0] = 1.0, 1.0
    symmetric[1:, 1:] = _jacobsthal(prime)
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    identity = torch.eye(prime + 1, dtype=torch.float64)
    return _kronecker(symmetric, sign) + _kronecker(identity, zero)
