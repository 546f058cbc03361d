import pytest

from neuqi_serve.errors import UnsupportedModelError
from neuqi_serve.vllm_plugin.layer_names import is_skipped, shard_names

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def test_shard_names_are_those_of_the_checkpoint() -> None:
    assert shard_names("model.layers.3.self_attn.qkv_proj", FUSED) == [
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.self_attn.k_proj",
        "model.layers.3.self_attn.v_proj",
    ]
    assert shard_names("model.layers.3.mlp.down_proj", FUSED) == ["model.layers.3.mlp.down_proj"]
    assert shard_names("qkv_proj", FUSED) == ["q_proj", "k_proj", "v_proj"]


def test_skipped_needs_all_shards_of_a_fused_layer() -> None:
    prefix = "model.layers.0.mlp.gate_up_proj"
    assert not is_skipped(prefix, ["down_proj"], FUSED)
    assert is_skipped(prefix, ["gate_proj", "up_proj"], FUSED)
    assert is_skipped(prefix, ["gate_up_proj"], FUSED)
    with pytest.raises(
        UnsupportedModelError, match=r"all or none .* names only \['model.layers.0.mlp.up_proj'\]"
    ):
        is_skipped(prefix, ["up_proj"], FUSED)
