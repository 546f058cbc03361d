"""How far a quantized language model's next-token distribution lies from the original's.

Everything here works on logits; where they come from is the business of :mod:`neuqi_serve.evaluate.teacher_forcing`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError

CHUNK_ELEMENTS = 1 << 22
"""Logits that are held in float64 at a time: 32 MiB for each of the two models."""


@dataclass(frozen=True)
class TokenComparison:
    """Two models at P positions: ``divergence`` and both losses in nats, float64 ``[P]``; ``agrees`` bool ``[P]``."""

    divergence: Tensor
    agrees: Tensor
    original_loss: Tensor
    quantized_loss: Tensor


@dataclass(frozen=True)
class Divergence:
    """Two models over a set of sequences; means are over tokens.

    ``mean_nats``: KL divergence per token. ``standard_error_nats``: of that mean, with whole sequences as the units
    that vary; None for a single sequence. ``top1_agreement``: share of positions with the same most likely token.
    ``sequence_nats`` float64 ``[S]``: KL divergence summed over each sequence. ``sequence_tokens`` int64 ``[S]``.
    """

    mean_nats: float
    standard_error_nats: float | None
    top1_agreement: float
    original_perplexity: float
    quantized_perplexity: float
    sequence_nats: Tensor
    sequence_tokens: Tensor


def compare_logits(
    original: Tensor, quantized: Tensor, targets: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> TokenComparison:
    """Compare two models' next-token distributions position by position.

    ``KL(P‖Q) = Σ_v P(v)·(log P(v) − log Q(v))`` with P the original and Q the quantized model, in float64.

    ``original``, ``quantized`` logits ``[P, V]`` of any float dtype, ``targets`` int64 ``[P]``: the true next tokens.
    At most ``chunk_elements`` logits are widened to float64 at a time (one row at least).

    Raises:
        UsageError: the shapes do not fit each other.
    """
    if original.dim() != 2 or original.shape != quantized.shape or targets.shape != original.shape[:1]:
        raise UsageError(
            "expected logits [P, V] of both models and targets [P], got "
            f"{list(original.shape)}, {list(quantized.shape)} and {list(targets.shape)}. "
            "Compare models of one vocabulary at the same positions."
        )
    rows = max(1, chunk_elements // max(1, original.shape[1]))
    parts = [
        _compare_rows(
            original[start : start + rows], quantized[start : start + rows], targets[start : start + rows]
        )
        for start in range(0, max(1, original.shape[0]), rows)
    ]
    return TokenComparison(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _compare_rows(
    original: Tensor, quantized: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p = original.double().log_softmax(-1)
    log_q = quantized.double().log_softmax(-1)
    probability = log_p.exp()
    # A token that the original rules out (logit −inf) contributes nothing, whatever the quantized model says.
    terms = torch.where(probability > 0, probability * (log_p - log_q), 0.0)
    at_target = targets.unsqueeze(-1)
    return (
        terms.sum(-1).clamp_(min=0.0),
        log_p.argmax(-1) == log_q.argmax(-1),
        -log_p.gather(-1, at_target).squeeze(-1),
        -log_q.gather(-1, at_target).squeeze(-1),
    )


def summarize(comparisons: Iterable[TokenComparison], lengths: Iterable[Sequence[int]]) -> Divergence:
    """Average batches of compared positions over tokens and keep the sums of each sequence.

    ``lengths``: for each comparison, how many consecutive positions belong to each of its sequences.

    Raises:
        UsageError: no position at all, or lengths that do not add up to the positions.
    """
    sums: list[Tensor] = []
    counts: list[int] = []
    agreeing = 0
    original_loss = quantized_loss = 0.0
    for comparison, sizes in zip(comparisons, lengths, strict=True):
        if sum(sizes) != comparison.divergence.numel():
            raise UsageError(
                f"expected lengths that add up to {comparison.divergence.numel()} positions, got {sum(sizes)}. "
                "Give the lengths of the very batch that was compared."
            )
        sums += [part.sum() for part in torch.split(comparison.divergence, list(sizes))]
        counts += sizes
        agreeing += int(comparison.agrees.sum())
        original_loss += float(comparison.original_loss.sum())
        quantized_loss += float(comparison.quantized_loss.sum())
    tokens = sum(counts)
    if tokens == 0:
        raise UsageError(
            "expected at least one position to compare, got none. Give a sequence of two tokens."
        )
    nats, numbers = torch.stack(sums).cpu(), torch.tensor(counts)
    return Divergence(
        mean_nats=float(nats.sum()) / tokens,
        standard_error_nats=ratio_standard_error(nats, numbers),
        top1_agreement=agreeing / tokens,
        original_perplexity=math.exp(original_loss / tokens),
        quantized_perplexity=math.exp(quantized_loss / tokens),
        sequence_nats=nats,
        sequence_tokens=numbers,
    )


def ratio_standard_error(sums: Tensor, counts: Tensor) -> float | None:
    """Standard error of the mean over tokens ``m = Σ sums / Σ counts`` when whole sequences are drawn.

    ``sqrt(S/(S − 1)·Σ_i (sums_i − m·counts_i)²) / Σ counts``: tokens of one sequence are not independent, so the
    sequences are the units. ``sums`` float64 ``[S]``, ``counts`` ``[S]``; None for fewer than two sequences.
    """
    units = sums.numel()
    if units < 2:
        return None
    total = float(counts.sum())
    residual = sums - (sums.sum() / total) * counts
    return math.sqrt(units / (units - 1) * float(residual.square().sum())) / total


def divergence_difference(first: Divergence, second: Divergence) -> tuple[float, float | None]:
    """Mean KL divergence of ``first`` less that of ``second`` in nats per token, and its paired standard error.

    Raises:
        UsageError: the two were not measured on the same sequences.
    """
    if not torch.equal(first.sequence_tokens, second.sequence_tokens):
        raise UsageError(
            "expected two measurements of the same sequences, got different lengths. Measure both on one set."
        )
    paired = first.sequence_nats - second.sequence_nats
    difference = float(paired.sum()) / float(first.sequence_tokens.sum())
    return difference, ratio_standard_error(paired, first.sequence_tokens)
