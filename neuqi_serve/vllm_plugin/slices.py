"""How tensor parallelism may cut a packed layer.

The rule: rows (N) may be cut anywhere. A row (K) is cut at the boundaries of groups and of the blocks of 32 codes in
which it is stored, so that every rank holds whole groups and finds the codes, scales and zero-points that one rank
alone would. With one group per row every rank of a packed checkpoint uses the same scale; on the fly a rank would
have to know the others' weights, so such a layer cannot be cut.
"""

from __future__ import annotations

from neuqi_serve.config import SUPPORTED_GROUP_SIZES, WHOLE_ROW, WeightSpec
from neuqi_serve.errors import UsageError

BLOCK = 32
# Beyond what vLLM is run with; keeps the list in a message short.
_LARGEST_SIZE = 64


def check_slice(spec: WeightSpec, name: str, whole: int, part: int, online: bool) -> None:
    """Check that a rank's ``part`` of the ``whole`` input features can be held.

    Raises:
        UsageError: the group size does not divide the whole row, or the cut does not fall between groups.
    """
    try:
        spec.groups(whole)
    except UsageError as error:
        raise UsageError(f"layer {name!r}: {error}") from error
    ranks = whole // part
    if ranks in fitting_sizes(spec, whole, online) and ranks * part == whole:
        return
    if spec.group_size == WHOLE_ROW and online:
        smaller = [g for g in SUPPORTED_GROUP_SIZES if g != WHOLE_ROW and part % g == 0]
        raise UsageError(
            f"layer {name!r}: expected groups that lie within one rank, got one group for the whole row of {whole} "
            f"weights on {ranks} ranks. Use a group size of {smaller}, pack the model ahead of time with "
            "`neuqi quantize`, or use one rank."
        )
    unit = BLOCK if spec.group_size == WHOLE_ROW else spec.group_size
    raise UsageError(
        f"layer {name!r}: expected tensor-parallel slices of whole groups of {unit}, got rows of {whole} weights cut "
        f"into {ranks} slices of {part}. Tensor-parallel sizes that fit this layer: "
        f"{fitting_sizes(spec, whole, online)}. Use one of them, or a smaller group size."
    )


def fitting_sizes(spec: WeightSpec, whole: int, online: bool) -> list[int]:
    """Return the tensor-parallel sizes that cut rows of ``whole`` weights between groups, the small ones."""
    if spec.group_size == WHOLE_ROW and online:
        return [1]
    unit = BLOCK if spec.group_size == WHOLE_ROW else spec.group_size
    return [size for size in range(1, min(whole // unit, _LARGEST_SIZE) + 1) if whole % (size * unit) == 0]
