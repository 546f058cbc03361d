"""What a student is trained towards: the teacher's last hidden states, its next-token distributions, or its blocks.

Each loss takes token ids ``[B, T]`` and returns one number with its gradient. ``hidden`` and ``blocks`` are squared
errors relative to the teacher's squares, so that a figure means the same in every model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_serve.errors import UnsupportedModelError

LOSSES = ("hidden", "logits", "blocks")
# Logits widened to float32 at a time, for each of the two models.
CHUNK_LOGITS = 1 << 24

Loss = Callable[[Tensor], Tensor]


def make_loss(name: str, student: Any, teacher: Any) -> Loss:
    """The loss of this name between two transformers causal language models of one architecture.

    ``hidden``: ``Σ(h − t)²/Σt²`` over the hidden states behind the final norm (arXiv:2505.17595 §3.4). ``logits``: KL
    divergence of the student's next-token distribution from the teacher's, nats per token. ``blocks``: the mean over
    the blocks of ``Σ(h − t)²/Σt²`` behind each, whose gradient stays within the block.

    Raises:
        UnsupportedModelError: ``blocks``, and the models have no list of decoder blocks.
    """
    if name == "logits":
        return lambda ids: _divergence(_logits(teacher, ids), student(input_ids=ids, use_cache=False).logits)
    if name == "hidden":
        return lambda ids: relative_error(_hidden(student, ids), _no_grad(_hidden, teacher, ids))
    return _BlockLoss(student, teacher)


def relative_error(found: Tensor, target: Tensor) -> Tensor:
    """``Σ(found − target)²/Σtarget²`` in float32."""
    wanted = target.float()
    return (found.float() - wanted).square().sum() / wanted.square().sum()


def _hidden(model: Any, ids: Tensor) -> Tensor:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def _no_grad(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over tokens of ``KL(teacher‖student)``, in float32, some rows at a time."""
    p, q = teacher.flatten(0, -2), student.flatten(0, -2)
    rows = max(1, CHUNK_LOGITS // p.shape[-1])
    total = q.new_zeros((), dtype=torch.float32)
    for start in range(0, len(p), rows):
        log_p = p[start : start + rows].float().log_softmax(-1)
        log_q = q[start : start + rows].float().log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return total / len(p)


class _BlockLoss:
    """Every block against the teacher's, on the student's own inputs, which carry no gradient."""

    def __init__(self, student: Any, teacher: Any) -> None:
        self._student, self._teacher = student, teacher
        self._blocks, self._targets = decoder_blocks(student), decoder_blocks(teacher)

    def __call__(self, ids: Tensor) -> Tensor:
        targets: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _, __, out: targets.append(_first(out)))
                 for block in self._targets]  # fmt: skip
        try:
            _no_grad(_hidden, self._teacher, ids)
        finally:
            for hook in hooks:
                hook.remove()
        found: list[Tensor] = []
        hooks = [block.register_forward_pre_hook(_detached, with_kwargs=True) for block in self._blocks]
        hooks += [
            block.register_forward_hook(lambda _, __, out: found.append(_first(out)))
            for block in self._blocks
        ]
        try:
            _hidden(self._student, ids)
        finally:
            for hook in hooks:
                hook.remove()
        errors = [relative_error(one, target) for one, target in zip(found, targets, strict=True)]
        return torch.stack(errors).mean()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _detached(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(cut(one) for one in args), {name: cut(one) for name, one in kwargs.items()}


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The decoder blocks of a transformers model, in order.

    Raises:
        UnsupportedModelError: it has no list of as many blocks as its configuration says.
    """
    expected = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected:
            return list(module)
    raise UnsupportedModelError(
        f"expected a model with a list of {expected} decoder blocks, got {type(model).__name__} without. "
        "Choose the loss hidden."
    )
