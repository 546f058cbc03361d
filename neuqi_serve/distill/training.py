"""The training loop: AdamW over a student's continuous parameters, a choice of learning rate, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_serve.distill.losses import Loss
from neuqi_serve.distill.state import Saved, StateFile
from neuqi_serve.errors import NeuqiError, UsageError

BETAS = (0.9, 0.95)
WARMUP_SHARE = 0.1
# Tried where none is given: each a relative change of scales a step, and one of zero-points in codes.
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
# Steps of a trial, as a share of those of the run.
TRIAL_SHARE = 0.125
# One window of so many is never trained on: it tells learning rates, and the result, apart.
HELD_OUT_EVERY = 16
# The optimizer's running means of a parameter.
_MEANS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingSettings:
    """``steps``: of the optimizer; 0 is one pass over the windows. ``batch_size``: windows in a step.

    ``learning_rate``: its peak; None tries ``LEARNING_RATES`` for an eighth of the steps each and takes the best.
    ``seed``: of the order of windows. ``checkpoint_every``: steps between two checkpoints.

    Raises:
        UsageError: a number out of range.
    """

    steps: int = 0
    batch_size: int = 1
    learning_rate: float | None = None
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or self.checkpoint_every < 1:
            raise UsageError(
                "expected steps of at least 0, a batch and an interval of checkpoints of at least 1, got "
                f"{self.steps}, {self.batch_size} and {self.checkpoint_every}."
            )
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise UsageError(
                f"expected a learning rate between 0 and 1, got {self.learning_rate}. Try 1e-3, or leave it out."
            )


@dataclass(frozen=True)
class TrainingResult:
    """Losses over the held-out windows before and after; ``trials``: learning rate → loss after its trial."""

    steps: int
    tokens: int
    learning_rate: float
    loss_before: float
    loss_after: float
    trials: Mapping[float, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "learning_rate": self.learning_rate,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "trials": {f"{rate:g}": loss for rate, loss in self.trials.items() if math.isfinite(loss)},
        }


class Trainer:
    """Trains ``parameters`` (float32, by name) on windows of token ids int64 ``[S, T]`` until ``loss`` is small.

    ``advance`` is called after each step of the run with the step's number and loss.

    Raises:
        UsageError: fewer than two windows, or a batch that is larger than what there is to train on.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss: Loss,
        windows: Tensor,
        settings: TrainingSettings,
        advance: Callable[[int, float], None] | None = None,
    ) -> None:
        self._parameters, self._loss, self._settings = dict(parameters), loss, settings
        self._advance = advance or (lambda step, value: None)
        if len(windows) < 2:
            raise UsageError(
                f"expected at least 2 windows of text, one of them to judge by, got {len(windows)}. Give a longer text."
            )
        held_out = torch.zeros(len(windows), dtype=torch.bool)
        held_out[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
        held_out[-1] |= not bool(held_out.any())
        self._windows, self._held_out = windows[~held_out], windows[held_out]
        if settings.batch_size > len(self._windows):
            raise UsageError(
                f"expected a batch of at most the {len(self._windows)} windows to train on, got {settings.batch_size}. "
                "Give a longer text, or a smaller batch."
            )
        self._per_pass = len(self._windows) // settings.batch_size
        self.steps = settings.steps or self._per_pass

    def run(self, state: StateFile | None = None) -> TrainingResult:
        """Train, from the state in the file if there is one; the result is the same bit for bit.

        Raises:
            NeuqiError: a loss that is not finite.
        """
        saved = Saved() if state is None else state.read()
        start = {name: value.detach().clone() for name, value in self._parameters.items()}
        if saved.loss_before is None:
            saved.loss_before = self.held_out_loss()
        rate = self._settings.learning_rate or self._choose_rate(saved, start, state)
        self._train(rate, self.steps, saved, state)
        after = self.held_out_loss()
        tokens = self.steps * self._settings.batch_size * self._windows.shape[1]
        return TrainingResult(self.steps, tokens, rate, saved.loss_before, after, dict(saved.trials))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss over the windows that are not trained on, with all values as they would be stored."""
        parts = torch.split(self._held_out, self._settings.batch_size)
        losses = [float(self._loss(part)) for part in parts]
        return _finite(sum(losses) / len(losses), "on the windows held out")

    def _choose_rate(self, saved: Saved, start: Mapping[str, Tensor], state: StateFile | None) -> float:
        steps = max(1, min(self.steps, math.ceil(TRIAL_SHARE * self.steps)))
        for rate in LEARNING_RATES:
            if rate in saved.trials:
                continue
            try:
                self._train(rate, steps, Saved(), None)
                saved.trials[rate] = self.held_out_loss()
            except NeuqiError:
                # Too large a step: the smaller ones remain.
                saved.trials[rate] = math.inf
            self._restore(start)
            if state is not None:
                state.write(saved)
        best = min(LEARNING_RATES, key=lambda rate: saved.trials[rate])
        if not saved.trials[best] < math.inf:
            raise NeuqiError(
                f"expected a finite loss at one of the learning rates {LEARNING_RATES}, got none. Check the packed "
                "model with `neuqi inspect --verify`, or give a smaller --learning-rate."
            )
        return best

    def _train(self, rate: float, steps: int, saved: Saved, state: StateFile | None) -> None:
        values = list(self._parameters.values())
        optimizer = torch.optim.AdamW(values, lr=rate, betas=BETAS, weight_decay=0.0, foreach=False)
        if saved.step:
            self._load(saved, optimizer)
        for step in range(saved.step, steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, steps)
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(self._batch(step))
            value = _finite(float(loss.detach()), f"at step {step + 1}")
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if state is None:
                continue
            if (step + 1) % self._settings.checkpoint_every == 0 or step + 1 == steps:
                saved.step = step + 1
                saved.tensors = self._tensors(optimizer)
                state.write(saved)
            self._advance(step + 1, value)

    def _batch(self, step: int) -> Tensor:
        """The windows of a step: a new order of all of them for each pass, which the step's number alone decides."""
        turn, place = divmod(step, self._per_pass)
        generator = torch.Generator().manual_seed(self._settings.seed + turn)
        order = torch.randperm(len(self._windows), generator=generator)
        size = self._settings.batch_size
        return self._windows[order[place * size : (place + 1) * size]]

    def _tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in self._parameters.items():
            found[f"value:{name}"] = value.detach().cpu()
            # What a loss does not reach has no means.
            for key in _MEANS if value in optimizer.state else ():
                found[f"{key}:{name}"] = optimizer.state[value][key].cpu()
        return found

    def _load(self, saved: Saved, optimizer: torch.optim.Optimizer) -> None:
        self._restore({name: saved.tensors[f"value:{name}"] for name in self._parameters})
        for name, value in self._parameters.items():
            means = {key: saved.tensors.get(f"{key}:{name}") for key in _MEANS}
            known = {key: mean.to(value.device) for key, mean in means.items() if mean is not None}
            if known:
                optimizer.state[value] = {"step": torch.tensor(float(saved.step)), **known}

    @torch.no_grad()
    def _restore(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._parameters.items():
            value.copy_(values[name])


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at ``step`` of ``steps``, from 0: a tenth to warm up, then half a cosine."""
    warm = max(1, math.ceil(WARMUP_SHARE * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / max(1, steps - warm + 1)))


def _finite(value: float, when: str) -> float:
    if not math.isfinite(value):
        raise NeuqiError(
            f"expected a finite loss, got {value} {when}. Give a smaller --learning-rate, or --dtype float32."
        )
    return value
