"""Frozen configuration, checked once at the border."""

from __future__ import annotations

from dataclasses import dataclass

from neuqi_serve.errors import UsageError

SUPPORTED_BITS = (2, 3, 4, 8)
SUPPORTED_GROUP_SIZES = (32, 64, 128, -1)
SCALE_DTYPES = ("float16", "bfloat16", "float32")
WHOLE_ROW = -1
# Grows with every change after which the same weights give other codes, scales or zero-points: cached weights made
# with another number are not used.
ALGORITHM_VERSION = 1
# How thorough the search is: near the paper's at a fraction of its cost; faster still; the paper's; the baseline.
PRESETS = ("balanced", "fast", "reference", "minmax")
DEFAULT_PRESET = PRESETS[0]


@dataclass(frozen=True)
class WeightSpec:
    """How one weight matrix ``[N, K]`` is stored: ``w ≈ (q − zero)·scale``.

    ``bits`` b: codes ``q`` are integers ``0 … 2^b − 1``. ``group_size`` g: input features that share one scale
    and zero-point; −1 is the whole row. ``scale_dtype``: storage of ``scale`` and ``zero``.

    Raises:
        UsageError: a value outside the supported set.
    """

    bits: int = 4
    group_size: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise UsageError(f"bits must be one of {SUPPORTED_BITS}, got {self.bits!r}. Try 4 (or 3, or 2).")
        if self.group_size not in SUPPORTED_GROUP_SIZES:
            raise UsageError(
                f"group size must be one of {SUPPORTED_GROUP_SIZES} (-1 is the whole row), got {self.group_size!r}. "
                "Try 128."
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise UsageError(f"scale dtype must be one of {SCALE_DTYPES}, got {self.scale_dtype!r}.")

    def groups(self, in_features: int) -> int:
        """Number of groups G in a row of ``in_features`` weights.

        Raises:
            UsageError: the group size does not divide the row, or the row is no multiple of 32.
        """
        if in_features % 32:
            raise UsageError(
                f"rows must be a multiple of 32 weights long, got {in_features}. Leave this layer unquantized."
            )
        if self.group_size == WHOLE_ROW:
            return 1
        if in_features % self.group_size:
            fits = [g for g in (128, 64, 32) if in_features % g == 0]
            raise UsageError(
                f"group size {self.group_size} does not divide the row of {in_features} weights. "
                f"Sizes that do: {fits} or -1 (whole row)."
            )
        return in_features // self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight of a row, scale and zero-point included (e.g. 3.25 at 3 bits, group 128)."""
        scale_bits = 32 if self.scale_dtype == "float32" else 16
        return self.bits + 2 * scale_bits * self.groups(in_features) / in_features


# Names of the layers that stay in the checkpoint's own precision when a model is quantized without a recipe.
# Routers choose experts by small differences; embeddings and the output head are not linear layers of a block.
DEFAULT_SKIP = ("lm_head", "embed_tokens", "gate", "router", "shared_expert_gate")
