"""What the weights may take: a mean width, or a number of bytes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from neuqi_serve.config import SUPPORTED_BITS
from neuqi_serve.errors import UsageError


@dataclass(frozen=True)
class Budget:
    """Either ``bits``, the mean over the linear layers, or ``nbytes``, of all tensors.

    Raises:
        UsageError: both or neither, or fewer or more bits than there are widths for.
    """

    bits: float | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.nbytes is None):
            raise UsageError(
                "expected either bits or bytes as a budget, got both or neither. Give one of them."
            )
        low, high = SUPPORTED_BITS[0], SUPPORTED_BITS[-1]
        if self.bits is not None and not low <= self.bits <= high:
            raise UsageError(
                f"expected a decimal number from {low} to {high} as bits, got {self.bits}. Try 2.5."
            )

    def option(self) -> str:
        """Return the option of the command line that says the same."""
        return f"--bits {self.bits}" if self.bits is not None else f"--fit {self.nbytes}"


def parse_bits(text: str) -> int | float:
    """Read ``--bits``: a whole number is one width for all layers, a decimal one the mean of several.

    Raises:
        ArgumentTypeError: it is no number.
    """
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected one of {SUPPORTED_BITS}, or a decimal number such as 2.5, got {text!r}"
        ) from None


def budget_of(bits: int | float | None, fit: str | None) -> Budget | None:
    """Return the budget that ``--bits`` and ``--fit`` mean together, None for one width.

    Raises:
        UsageError: both were given, or a value outside what is possible.
    """
    from neuqi_serve.budget.byte_count import parse_bytes

    if fit is not None:
        if bits is not None:
            raise UsageError(f"expected --bits or --fit, got both ({bits} and {fit}). Leave one out.")
        return Budget(nbytes=parse_bytes(fit))
    return Budget(bits=bits) if isinstance(bits, float) else None
