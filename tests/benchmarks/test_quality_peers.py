import sys
from pathlib import Path

import pytest
import torch

from neuqi_serve.config import WeightSpec
from neuqi_serve.quant.affine import dequantize

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "quality_peers"]:
        del sys.modules[name]


@pytest.mark.parametrize("bits", [2, 3])
def test_the_initialisations_fall_into_the_order_of_the_paper(bits):
    from quality_peers.initialisations import INITIALISATIONS

    weight = torch.randn(17, 128, generator=torch.Generator().manual_seed(0))
    spec = WeightSpec(bits, -1)
    losses = {
        name: float((dequantize(solve(weight, spec, torch.ones(128))) - weight).square().sum())
        for name, solve in INITIALISATIONS.items()
    }
    assert losses["min-max integer"] > losses["min-max+"] > losses["integer search"] > losses["neuqi"]


def test_integer_zero_points_are_integers_and_stored_in_fewer_bits():
    from quality_peers.initialisations import INITIALISATIONS, INTEGER_ZERO, bits_per_weight

    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) + 0.4
    spec = WeightSpec(2, 32)
    for name in INTEGER_ZERO:
        zero = INITIALISATIONS[name](weight, spec, None).zero
        assert torch.equal(zero, zero.round())
        assert bits_per_weight(name, spec, 64) == 2 + 18 / 32
    assert bits_per_weight("neuqi", spec, 64) == 3.0


def test_k_quants_are_those_of_the_library():
    from quality_peers import k_quants

    if (reason := k_quants.refusal()) is not None:
        pytest.skip(reason)
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    errors = [
        float((k_quants.quantized(kind, weight) - weight).norm() / weight.norm())
        for kind in k_quants.K_QUANTS
    ]
    assert 0.4 > errors[0] > errors[1] > errors[2] > 0.0
    assert [k_quants.bits_per_weight(kind) for kind in k_quants.K_QUANTS] == [2.625, 3.4375, 4.5]
    with pytest.raises(ValueError, match="multiple of 256"):
        k_quants.quantized("Q2_K", weight[:1])


def tiny_llama():
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_a_rotated_model_computes_the_same():
    from quality_peers.sequential import rotate

    model = tiny_llama()
    for name, value in model.named_parameters():
        if "norm" in name:
            value.copy_(1 + 0.2 * torch.randn(value.shape))
    ids = torch.arange(24).view(2, 12)
    before = model(ids).logits
    rotate(model)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_feedback_and_refit_bring_the_model_closer():
    from quality_peers.sequential import Recipe, quantize_blocks

    model, windows = tiny_llama(), torch.randint(0, 96, (24, 32), generator=torch.Generator().manual_seed(0))
    target = model(windows).logits
    errors = []
    for recipe in (Recipe("min-max"), Recipe(ldlq=True, refit=True)):
        twin, stored = quantize_blocks(model, windows, WeightSpec(2, 32), recipe)
        assert len(stored) == 14
        errors.append(float((twin(windows).logits - target).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_pv_tuning_moves_codes_one_step_at_a_time_and_lowers_the_loss():
    from quality_peers.sequential import Recipe, quantize_blocks
    from quality_peers.trained import pv_tuned

    from neuqi_kernels import layout
    from neuqi_serve.distill.losses import make_loss
    from neuqi_serve.distill.training import TrainingSettings

    model, spec = tiny_llama(), WeightSpec(2, 32)
    windows = torch.randint(0, 96, (18, 32), generator=torch.Generator().manual_seed(0))
    quantized, stored = quantize_blocks(model, windows, spec, Recipe("min-max"))
    settings = TrainingSettings(steps=1, batch_size=8, learning_rate=3e-3)
    tuned = pv_tuned(model, quantized, stored, spec, windows, "logits", settings, 0.02)
    name, before = next(iter(stored.items()))
    after = layout.unpack(tuned.get_submodule(name).qweight, 2)
    moved = (after.int() - before.codes.int()).abs()
    assert int(moved.max()) == 1
    assert 0 < float(moved.float().mean()) <= 0.021
    losses = [float(make_loss("logits", one, model)(windows[:8]).detach()) for one in (quantized, tuned)]
    assert losses[1] < losses[0]
