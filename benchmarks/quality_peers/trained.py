"""Training on top of stored codes, in memory: light distillation, and PV-tuning, the baseline that moves codes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuqi_kernels import layout
from neuqi_serve.config import WeightSpec
from neuqi_serve.distill.losses import Loss, make_loss
from neuqi_serve.distill.stored_rounding import StoredRounding
from neuqi_serve.distill.trainable_linear import TrainableLinear
from neuqi_serve.distill.training import BETAS, Trainer, TrainingResult, TrainingSettings, schedule
from neuqi_serve.quant.affine import QuantizedWeight, max_code
from neuqi_serve.quant.quantize import PackedWeight


def student_of(
    model: Any, stored: Mapping[str, QuantizedWeight], spec: WeightSpec
) -> tuple[Any, dict[str, nn.Parameter]]:
    """A copy of a quantized model with trainable scales, zero-points and norms, and these by name."""
    student = copy.deepcopy(model).requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    for name, one in stored.items():
        packed = PackedWeight(layout.pack(one.codes, spec.bits), one.scale, one.zero)
        layer = TrainableLinear(packed, spec, torch.float32)
        student.set_submodule(name, layer)
        parameters |= {f"{name}.{part}": value for part, value in layer.named_parameters()}
    for name, module in list(student.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 1:
            continue
        module.weight = nn.Parameter(weight.detach().float())
        parametrize.register_parametrization(module, "weight", StoredRounding(torch.bfloat16, torch.float32))
        parameters[f"{name}.weight"] = module.parametrizations.weight.original
    return student, parameters


def distilled(
    original: Any,
    quantized: Any,
    stored: Mapping[str, QuantizedWeight],
    spec: WeightSpec,
    windows: Tensor,
    loss: str = "hidden",
    settings: TrainingSettings | None = None,
) -> tuple[Any, TrainingResult]:
    """Light distillation of a quantized copy towards the original, whose basis it has."""
    student, parameters = student_of(quantized, stored, spec)
    settings = settings or TrainingSettings()
    result = Trainer(parameters, make_loss(loss, student, original), windows, settings).run()
    return student, result


def pv_tuned(
    original: Any,
    quantized: Any,
    stored: Mapping[str, QuantizedWeight],
    spec: WeightSpec,
    windows: Tensor,
    loss: str,
    settings: TrainingSettings,
    share: float,
) -> Any:
    """PV-tuning: each step moves the continuous parameters (P) and a small share of the codes (V).

    V step: of all weights of a layer, the ``share`` whose loss falls most by linearisation, ``dW`` scaled by its
    running mean square, take the neighbouring code in the direction of descent; the share follows the
    schedule of the learning rate. In so small a subspace the step may be as long as a code is wide, where a step on
    all weights would round back. Reference: arXiv:2405.14852, Alg. 1 and §3.3.
    """
    student, parameters = student_of(quantized, stored, spec)
    objective = make_loss(loss, student, original)
    layers = {name: student.get_submodule(name) for name in stored}
    tuners = {name: _CodeTuner(layer, spec) for name, layer in layers.items()}
    trainer = Trainer(parameters, objective, windows, settings)
    rate = settings.learning_rate or 1e-3
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=rate, betas=BETAS, weight_decay=0.0)
    for step in range(trainer.steps):
        level = schedule(step, trainer.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * level
        optimizer.zero_grad(set_to_none=True)
        _backward(objective, trainer._batch(step))
        optimizer.step()
        for tuner in tuners.values():
            tuner.step(share * level)
    for tuner in tuners.values():
        tuner.remove()
    return student


def _backward(objective: Loss, batch: Tensor) -> None:
    objective(batch).backward()


class _CodeTuner:
    """Collects ``dW`` of a layer from its inputs and the gradients of its outputs, and moves its codes."""

    def __init__(self, layer: TrainableLinear, spec: WeightSpec) -> None:
        self._layer, self._spec = layer, spec
        self._input = torch.empty(0)
        self._gradient = torch.empty(0)
        self._square: Tensor | None = None
        self._hooks = [
            layer.register_forward_hook(self._forward),
            layer.register_full_backward_hook(self._back),
        ]

    def _forward(self, _: nn.Module, args: tuple[Any, ...], __: Tensor) -> None:
        self._input = args[0].detach().flatten(0, -2)

    def _back(self, _: nn.Module, __: Any, outer: tuple[Any, ...]) -> None:
        self._gradient = outer[0].detach().flatten(0, -2).T @ self._input

    @torch.no_grad()
    def step(self, share: float) -> None:
        gradient = self._gradient
        square = gradient.square()
        self._square = square if self._square is None else self._square.lerp_(square, 1 - BETAS[1])
        codes = layout.unpack(self._layer.qweight, self._spec.bits).int()
        direction = -gradient.sign().int()
        moved = codes + direction
        legal = (moved >= 0) & (moved <= max_code(self._spec.bits))
        score = torch.where(legal, gradient.abs() / (self._square.sqrt() + 1e-12), 0.0)
        count = math.floor(share * codes.numel() + torch.rand(()).item())
        if count < 1:
            return
        chosen = score.flatten().topk(count).indices
        codes.view(-1)[chosen] = moved.view(-1)[chosen]
        self._layer.qweight = layout.pack(codes.clamp_(0).to(torch.uint8), self._spec.bits)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
