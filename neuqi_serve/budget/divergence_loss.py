"""What a width does to the model's answers: KL divergence with one group of layers quantized, the others as they are.

Measured at one choice of a group, about as large as the budget is; others follow in proportion to their weight loss,
since for small errors the divergence is quadratic in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_kernels.reference import dequantize
from neuqi_serve.budget.width_group import WidthGroup
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UnsupportedModelError
from neuqi_serve.quant.quantize import quantize_packed

SEQUENCES, LENGTH = 16, 128
_SEED = 0
_BATCH_LOGITS = 1 << 26
_EXPERT = re.compile(
    r"(?P<layer>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)"
)
_GATE, _DOWN = ("gate_proj", "w1"), ("down_proj", "w2")


def own_samples(model: Any, sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """Draw texts from the model itself, token ids int64 ``[sequences, length]``; the same draw for the same model."""
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(_SEED)
    first = torch.randint(config.vocab_size, (sequences, 1), generator=generator)
    if isinstance(config.bos_token_id, int):
        first.fill_(config.bos_token_id)
    cached, drawn = None, first
    latest = first.to(model.device)
    with torch.no_grad():
        while drawn.shape[1] < length:
            output = model(input_ids=latest, past_key_values=cached, use_cache=True)
            cached = output.past_key_values
            shares = output.logits[:, -1].float().softmax(-1).cpu()
            latest = torch.multinomial(shares, 1, generator=generator).to(model.device)
            drawn = torch.cat((drawn, latest.cpu()), dim=1)
    return drawn


def reference_spec(group: WidthGroup, share: float) -> WeightSpec | None:
    """Return the spec at which a group is measured: the one whose size is nearest to ``share`` times the smallest.

    None for a group that can only stay as it is.
    """
    choices = [choice for choice in group.choices if choice.spec is not None]
    wanted = share * min((choice.nbytes for choice in choices), default=0)
    nearest = min(choices, key=lambda choice: abs(choice.nbytes - wanted), default=None)
    return None if nearest is None else nearest.spec


@torch.no_grad()
def divergence_losses(
    model: Any,
    groups: Sequence[WidthGroup],
    references: Mapping[str, WeightSpec | None],
    tokens: Tensor,
    importance: Mapping[str, Tensor],
    preset: str,
    done: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Quantize one group at a time to its reference spec; return group → mean KL divergence in nats per token.

    ``references``: group → spec. ``tokens`` ``[S, T]``: texts. ``importance``: layer → h ``[K]``. The model is as
    before when this returns.

    Raises:
        UnsupportedModelError: a layer of the checkpoint is no linear layer or embedding of the model.
    """
    weights = {module: weight_of(model, module) for group in groups for module in group.modules}
    rows = max(1, _BATCH_LOGITS // (tokens.shape[1] * model.config.get_text_config(decoder=True).vocab_size))
    batches = [part.to(model.device) for part in torch.split(tokens, rows)]
    original = [_log_probabilities(model, batch) for batch in batches]
    losses: dict[str, float] = {}
    for group in groups:
        spec = references[group.name]
        if spec is None:
            losses[group.name] = 0.0
        else:
            kept = {module: weights[module].clone() for module in group.modules}
            try:
                for module, weight in kept.items():
                    weights[module].copy_(_rounded(weight, spec, importance.get(module), preset))
                losses[group.name] = _divergence(model, batches, original)
            finally:
                for module, weight in kept.items():
                    weights[module].copy_(weight)
        if done is not None:
            done(group.name)
    return losses


def _rounded(weight: Tensor, spec: WeightSpec, importance: Tensor | None, preset: str) -> Tensor:
    packed = quantize_packed(weight, spec, importance, preset)
    return dequantize(packed.qweight, packed.scale, packed.zero, spec.bits, spec.group_size, weight.dtype)


def _log_probabilities(model: Any, batch: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits.float().log_softmax(-1)


def _divergence(model: Any, batches: Sequence[Tensor], original: Sequence[Tensor]) -> float:
    total, count = 0.0, 0
    for batch, log_p in zip(batches, original, strict=True):
        log_q = _log_probabilities(model, batch)
        terms = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        total += float(terms.sum())
        count += terms.numel()
    return max(0.0, total / count)


def weight_of(model: Any, module: str) -> Tensor:
    """Return the weight ``[N, K]`` that a checkpoint calls ``module``, as a view of the model's own memory.

    The model may lack the prefix of its base model; experts lie in stacked tensors ``gate_up_proj [E, 2·I, H]`` and
    ``down_proj [E, H, I]``.

    Raises:
        UnsupportedModelError: there is no such layer.
    """
    prefix = f"{model.base_model_prefix}."
    renamed = module.replace(".block_sparse_moe.", ".mlp.")
    for name in (module, renamed, prefix + module, module.removeprefix(prefix)):
        expert = _EXPERT.fullmatch(name)
        try:
            found = model.get_submodule(name if expert is None else expert["layer"])
        except AttributeError:
            continue
        if isinstance(found, nn.Linear | nn.Embedding):
            return found.weight.data
        if expert is not None and hasattr(found, "gate_up_proj") and found.gate_up_proj.ndim == 3:
            number, part = int(expert["expert"]), expert["part"]
            if part in _DOWN:
                down: Tensor = found.down_proj.data[number]
                return down
            gate, up = found.gate_up_proj.data[number].chunk(2)
            return gate if part in _GATE else up
    raise UnsupportedModelError(
        f"expected the layer {module} of the checkpoint as a layer of {type(model).__name__} in transformers, got "
        "none. Measure the weights instead: --sensitivity weights."
    )
