"""Runs a causal language model over given texts and yields its next-token logits at the positions that count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.kl_divergence import Divergence, compare_logits, summarize

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class ScoredSequence:
    """Token ids, and the index of the first one whose prediction counts: 1 for a text, that of the answer for a chat.

    Raises:
        UsageError: nothing would be predicted.
    """

    tokens: tuple[int, ...]
    first: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.first < len(self.tokens):
            raise UsageError(
                f"expected a first predicted token from 1 to {len(self.tokens) - 1}, got {self.first}. "
                "The first token of a sequence has no prediction; a sequence needs two tokens."
            )

    @property
    def predictions(self) -> int:
        """How many tokens are predicted."""
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class Batch:
    """Sequences that run together, padded on the right.

    ``tokens``, ``attention_mask`` int64 ``[B, L]``; ``sources`` bool ``[B, L]``: positions whose next token counts;
    ``targets`` int64 ``[P]``: those next tokens, sequence by sequence; ``lengths``: predictions of each sequence.
    """

    tokens: Tensor
    attention_mask: Tensor
    sources: Tensor
    targets: Tensor
    lengths: tuple[int, ...]


def batches(sequences: Sequence[ScoredSequence], batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Sort sequences by length and gather them into batches of at most ``batch_tokens`` padded tokens.

    A sequence that is longer makes a batch of its own.
    """
    groups: list[list[ScoredSequence]] = []
    for sequence in sorted(sequences, key=lambda item: len(item.tokens)):
        if groups and len(sequence.tokens) * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return [_batch(group) for group in groups]


def _batch(group: Sequence[ScoredSequence]) -> Batch:
    width = max(len(sequence.tokens) for sequence in group)
    tokens = torch.zeros(len(group), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    sources = torch.zeros(len(group), width, dtype=torch.bool)
    targets: list[int] = []
    for row, sequence in enumerate(group):
        length = len(sequence.tokens)
        tokens[row, :length] = torch.tensor(sequence.tokens)
        mask[row, :length] = 1
        sources[row, sequence.first - 1 : length - 1] = True
        targets += sequence.tokens[sequence.first :]
    lengths = tuple(sequence.predictions for sequence in group)
    return Batch(tokens, mask, sources, torch.tensor(targets), lengths)


@torch.inference_mode()
def next_token_logits(model: Any, work: Iterable[Batch]) -> Iterator[Tensor]:
    """Logits ``[P, V]`` of a transformers causal language model at the counted positions of each batch."""
    for batch in work:
        tokens, mask = batch.tokens.to(model.device), batch.attention_mask.to(model.device)
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        yield logits[batch.sources.to(logits.device)]


def measure_divergence(
    original: Iterable[Tensor], quantized: Iterable[Tensor], work: Sequence[Batch]
) -> Divergence:
    """KL divergence of a quantized model from the original, batch by batch.

    ``original``, ``quantized``: what :func:`next_token_logits` yields for ``work``; a list of the original's logits
    serves several comparisons, a fresh generator keeps memory at one batch.
    """
    pairs = zip(original, quantized, work, strict=True)
    comparisons = (compare_logits(p, q.to(p.device), batch.targets.to(p.device)) for p, q, batch in pairs)
    return summarize(comparisons, (batch.lengths for batch in work))
