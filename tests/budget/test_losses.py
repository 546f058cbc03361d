from __future__ import annotations

from typing import Any

import pytest
import torch

from neuqi_serve.budget.divergence_loss import divergence_losses, own_samples, reference_spec, weight_of
from neuqi_serve.budget.weight_loss import weight_loss
from neuqi_serve.budget.width_group import Choice, WidthGroup
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UnsupportedModelError
from neuqi_serve.quant.affine import dequantize
from neuqi_serve.quant.quantize import quantize_weight

transformers = pytest.importorskip("transformers", reason="needs transformers")

SPECS = [WeightSpec(bits, 32) for bits in (2, 3, 4, 8)]


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(17, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighed", [False, True])
def test_weight_losses_are_the_squared_errors(weighed: bool) -> None:
    importance = torch.linspace(0.1, 3, 96) if weighed else None
    mass = torch.ones(96) if importance is None else importance
    found = weight_loss(weight(), [*SPECS, None], importance, "fast")
    for spec in SPECS[:3]:
        error = dequantize(quantize_weight(weight(), spec, importance, "fast"), torch.float32) - weight()
        assert found.squared[spec] == pytest.approx(float((error.square() * mass).sum()), rel=1e-5)
    assert found.norm == pytest.approx(float((weight().square() * mass).sum()), rel=1e-5)
    assert found.squared[None] == 0.0
    assert found.weights == 17 * 96


def test_the_loss_at_8_bits_follows_from_that_at_4() -> None:
    found = weight_loss(weight(), SPECS, None, "balanced")
    error = dequantize(quantize_weight(weight(), SPECS[3]), torch.float32) - weight()
    # NeUQI gains less over the uniform grid the finer it is: a few tens of percent between 4 and 8 bits.
    assert found.squared[SPECS[3]] == pytest.approx(float(error.square().sum()), rel=0.4)


def test_losses_of_a_group_add_up() -> None:
    first, second = (weight_loss(weight(seed), SPECS, None, "fast") for seed in (0, 1))
    total = first + second
    two = SPECS[0]
    assert total.squared[two] == first.squared[two] + second.squared[two]
    assert total.relative(two) == pytest.approx(total.squared[two] / (first.norm + second.norm))


def test_rows_of_a_large_matrix_tell_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    whole = weight_loss(large, SPECS, None, "fast")
    monkeypatch.setattr("neuqi_serve.budget.weight_loss._SAMPLED_WEIGHTS", 512 * 16)
    sampled = weight_loss(large, SPECS, None, "fast")
    assert sampled.weights == whole.weights
    # Of 128 rows instead of 512: a few percent, as the sums of 64 squares vary from row to row.
    assert sampled.norm == pytest.approx(whole.norm, rel=0.05)
    assert sampled.norm != whole.norm
    assert sampled.squared[SPECS[0]] == pytest.approx(whole.squared[SPECS[0]], rel=0.05)


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, bos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def group(*modules: str) -> WidthGroup:
    choices = tuple(Choice(spec, spec.bits) for spec in SPECS)
    return WidthGroup(modules[0], modules, choices)


@torch.no_grad()
def test_divergences_are_those_of_a_model_with_one_group_quantized(model: Any) -> None:
    tokens = torch.randint(67, (3, 20), generator=torch.Generator().manual_seed(0))
    names = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    groups = [group(*names), group("model.layers.1.mlp.down_proj")]
    references = {one.name: SPECS[0] for one in groups}
    found = divergence_losses(model, groups, references, tokens, {}, "fast")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    original = model(tokens).logits.double().log_softmax(-1)
    for name in names:
        layer = model.get_submodule(name)
        layer.weight.copy_(dequantize(quantize_weight(layer.weight, SPECS[0], None, "fast"), torch.float32))
    changed = model(tokens).logits.double().log_softmax(-1)
    for name in names:
        model.get_submodule(name).weight.copy_(before[f"{name}.weight"])
    expected = float((original.exp() * (original - changed)).sum(-1).mean())
    # Logits and their softmax in float32 there, in float64 here.
    assert found[names[0]] == pytest.approx(expected, rel=1e-3)
    assert found["model.layers.1.mlp.down_proj"] > 0


def test_samples_are_the_models_own_and_always_alike(model: Any) -> None:
    first, second = own_samples(model, 4, 30), own_samples(model, 4, 30)
    assert torch.equal(first, second)
    assert first.shape == (4, 30)
    assert set(first[:, 0].tolist()) == {3}
    with torch.no_grad():
        shares = model(first).logits.log_softmax(-1)[:, :-1].gather(-1, first[:, 1:, None])
        other = torch.randint(67, first.shape, generator=torch.Generator().manual_seed(0))
        random = model(other).logits.log_softmax(-1)[:, :-1].gather(-1, other[:, 1:, None])
    assert shares.mean() > random.mean() + 0.5


def test_a_layer_that_transformers_does_not_have_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="--sensitivity weights"):
        weight_of(model, "model.layers.0.mlp.experts.0.w1")


def test_experts_are_found_in_their_stacked_tensors() -> None:
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    stacked = model.model.layers[0].mlp.experts
    name = "model.layers.0.block_sparse_moe.experts.2"
    for part, expected in (
        ("w1", stacked.gate_up_proj[2, :64]),
        ("w3", stacked.gate_up_proj[2, 64:]),
        ("w2", stacked.down_proj[2]),
    ):
        found = weight_of(model, f"{name}.{part}")
        assert torch.equal(found, expected)
        assert found.data_ptr() == expected.data_ptr()


@pytest.mark.parametrize(("share", "bits"), [(0.1, 2), (1.0, 2), (1.6, 3), (1.9, 4), (9.0, 8)])
def test_a_group_is_measured_about_where_the_budget_is(share: float, bits: int) -> None:
    assert reference_spec(group("layer"), share) == WeightSpec(bits, 32)
    unpacked = WidthGroup("head", ("head",), (Choice(None, 100),))
    assert reference_spec(unpacked, share) is None
