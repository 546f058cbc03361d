from __future__ import annotations

import json

import pytest

from neuqi_serve.config import WeightSpec
from neuqi_serve.format.manifest import Manifest, PackedModule, TensorRecord
from neuqi_serve.format.safetensors_file import TensorSpec
from neuqi_serve.pipeline.summary import describe_layers, layer_table, summarize

# 3 bits g32 with two float16 per group: 3 + 32/32 = 4 bits; 4 bits, one group of 64: 4 + 32/64 = 4.5.
UP = PackedModule(WeightSpec(3, 32), (8, 64), "BF16", 0.1)
DOWN = PackedModule(WeightSpec(4, -1), (8, 64), "F32", 0.4)


def manifest(**modules: PackedModule) -> Manifest:
    named = {name.replace("__", "."): module for name, module in modules.items()}
    tensors = {
        f"{name}.{part}": TensorRecord("f", s) for name, m in named.items() for part, s in m.tensors.items()
    }
    tensors["norm.weight"] = TensorRecord("f", TensorSpec("F32", (10,)))
    return Manifest({}, tensors, named)


def test_layers_of_one_kind_and_spec_are_grouped() -> None:
    summary = summarize(manifest(a__up=UP, b__up=UP, a__down=DOWN))
    assert [(group.kind, group.layers, group.bits) for group in summary.groups] == [
        ("up", 2, 3),
        ("down", 1, 4),
    ]
    assert summary.groups[0].bits_per_weight == 4.0
    assert summary.groups[1].bits_per_weight == 4.5


def test_totals_count_bytes_and_weigh_every_layer_alike() -> None:
    summary = summarize(manifest(a__up=UP, b__up=UP, a__down=DOWN))
    assert summary.kept_bytes == 40
    assert summary.source_bytes == 2 * 8 * 64 * 2 + 8 * 64 * 4 + 40
    assert summary.packed_bytes == 8 * 64 * (4 + 4 + 4.5) / 8 + 40
    assert summary.total.relative_error == pytest.approx((0.1 + 0.1 + 0.4) / 3)


def test_error_that_was_not_measured_is_left_out() -> None:
    unknown = PackedModule(UP.spec, UP.shape, "BF16")
    assert summarize(manifest(a=unknown)).total.relative_error is None
    assert summarize(manifest(a=unknown, b=DOWN)).total.relative_error == 0.4


def test_checkpoint_without_packed_modules_has_a_summary() -> None:
    summary = summarize(manifest())
    assert summary.packed_bytes == summary.source_bytes == 40
    assert "0.000" in summary.to_table()
    assert layer_table(manifest()).startswith("layer")


def test_json_carries_the_totals_and_what_was_left() -> None:
    made = summarize(manifest(a__up=UP), {"a.gate": "too short"}, 1.5)
    body = json.loads(json.dumps(made.to_dict()))
    assert body["bytes_after"] == made.packed_bytes
    assert body["unfit"] == {"a.gate": "too short"}
    assert body["seconds"] == 1.5
    assert "seconds" not in summarize(manifest(a__up=UP)).to_dict()


def test_table_is_aligned_and_names_kinds_left_unquantized_once() -> None:
    lines = (
        summarize(manifest(a__up=UP, a__down=DOWN), {"a.gate": "odd", "b.gate": "odd"}, 2.0)
        .to_table()
        .split("\n")
    )
    assert lines[-2:] == ["left unquantized: 2 × gate: odd", "2.0 s"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert "row" in lines[2]


def test_every_layer_is_described() -> None:
    described = describe_layers(manifest(a__up=UP, a__down=DOWN))
    assert described["a.down"]["shape"] == [8, 64]
    assert described["a.up"]["bytes_after"] == 8 * 64 * 4 / 8
    table = layer_table(manifest(a__up=UP, a__down=DOWN)).strip().split("\n")
    assert [line.split()[:2] for line in table[1:]] == [["a.up", "8×64"], ["a.down", "8×64"]]
