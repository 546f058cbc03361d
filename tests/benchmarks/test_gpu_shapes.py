from __future__ import annotations

import pytest


def test_the_first_shapes_come_first_at_the_first_group_size(load):
    shapes = load("gpu_shapes")
    order = list(shapes.blocks(list(shapes.SHAPES), [4, 3], [128, 64]))
    assert [(case.bits, case.group_size) for case in order[:10]] == [(4, 128), (3, 128)] * 5
    assert (order[0].n, order[0].k) == (28672, 4096)
    assert {case.group_size for case in order[10:20]} == {64}
    assert (order[20].n, order[20].group_size) == (57344, 128)
    assert len({str(case) for case in order}) == len(order) == 2 * 2 * len(shapes.SHAPES)


def test_a_group_size_that_does_not_divide_the_row_is_left_out(load):
    order = list(load("gpu_shapes").blocks([(64, 96)], [3], [64, 32, -1]))
    assert [case.group_size for case in order] == [32, -1]


def test_a_shape_is_two_numbers(load):
    parse = load("gpu_shapes").parse_shape
    assert parse("4096x14336") == (4096, 14336)
    with pytest.raises(ValueError, match="expected a shape N x K as 4096x14336, got '4096'"):
        parse("4096")
