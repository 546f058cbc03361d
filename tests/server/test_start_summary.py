from __future__ import annotations

import pytest

from neuqi_serve.config import WeightSpec
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.server.command_line import OwnOptions
from neuqi_serve.server.served_model import ServedModel
from neuqi_serve.server.start_summary import _weights

VOCABULARY = {"lm_head": WeightSpec(8, 64), "embed_tokens": WeightSpec(4, 64)}


@pytest.mark.parametrize(
    ("exceptions", "begin"),
    [
        ({}, "packed with 3 bits, group size 64;"),
        ({"model.layers.0.mlp.up_proj": WeightSpec(4, 64)}, "packed with 3 to 4 bits, a width"),
        ({"model.layers.0.mlp.up_proj": WeightSpec(3, -1)}, "packed with 3 bits, a width and group size"),
    ],
)
def test_a_packed_model_tells_its_widths(exceptions: dict[str, WeightSpec], begin: str) -> None:
    spec = WeightSpec(3, 64)
    recipe = QuantizationRecipe(spec, {**exceptions, **VOCABULARY})
    told = _weights(ServedModel("m", "m", {}, "packed", spec=spec, recipe=recipe), OwnOptions())
    assert told.startswith(begin)
    assert told.endswith("output head 8 bits, embedding 4 bits")
