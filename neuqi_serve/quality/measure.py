"""Measures a model against another on texts: KL divergence, perplexity, agreement, and the noise floor of bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.block_bootstrap import BlockBootstrap, Estimate
from neuqi_serve.evaluate.kl_divergence import TokenComparison, compare_logits
from neuqi_serve.evaluate.teacher_forcing import Batch, ScoredSequence, batches, next_token_logits

# Logits of one batch in float32: 256 MiB for each of the models.
_BATCH_LOGITS = 1 << 26
_MOST_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Measured:
    """Statistics over all tokens; divergences in nats per token, ``top1_agreement`` from 0 to 1.

    ``perplexity_ratio``: of the model to the base, on the same tokens.
    """

    kld_mean: Estimate
    kld_median: Estimate
    kld_99: Estimate
    top1_agreement: Estimate
    perplexity: Estimate
    perplexity_ratio: Estimate


@dataclass(frozen=True)
class Measurement:
    """``model`` against the base in float32; ``noise``: the base in bfloat16 against the base in float32."""

    model: Measured
    noise: Measured | None
    base_perplexity: Estimate
    tokens: int
    sequences: int


def measure(
    base: Any,
    model: Any,
    sequences: Sequence[ScoredSequence],
    noisy: Any = None,
    done: Callable[[int], None] | None = None,
) -> Measurement:
    """Run the models over the same sequences, batch by batch, and compare their next-token distributions.

    ``base``: the original in float32. ``noisy``: the original in bfloat16, None for no noise floor. ``done`` is called
    with the tokens of each batch. Errors: block bootstrap over the sequences.

    Raises:
        UsageError: the models have different vocabularies, or the texts tokens that they do not have.
    """
    _check_vocabulary(base, model, sequences)
    work = batches(sequences, _batch_tokens(base))
    # Batches hold the sequences by length; the bootstrap wants the same order.
    counts = torch.tensor([length for batch in work for length in batch.lengths])
    bootstrap = BlockBootstrap(counts)
    columns: dict[str, list[TokenComparison]] = {"model": [], "noise": []}
    for batch, (reference, candidate, noise) in zip(work, _logits(base, model, noisy, work), strict=True):
        columns["model"].append(_compact(compare_logits(reference, candidate, batch.targets)))
        if noise is not None:
            columns["noise"].append(_compact(compare_logits(reference, noise, batch.targets)))
        if done is not None:
            done(int(batch.attention_mask.sum()))
    compared = {name: _joined(parts) for name, parts in columns.items() if parts}
    return Measurement(
        model=_measured(compared["model"], bootstrap),
        noise=_measured(compared["noise"], bootstrap) if "noise" in compared else None,
        base_perplexity=bootstrap.exponential_mean(compared["model"].original_loss),
        tokens=int(counts.sum()),
        sequences=len(counts),
    )


def _logits(
    base: Any, model: Any, noisy: Any, work: Sequence[Batch]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for batch in work:
        # One batch at a time: only its logits are in memory.
        reference, candidate = (next(next_token_logits(one, [batch])).cpu() for one in (base, model))
        noise = None if noisy is None else next(next_token_logits(noisy, [batch])).cpu()
        yield reference, candidate, noise


def _compact(comparison: TokenComparison) -> TokenComparison:
    """Four numbers a token are kept to the end: half the memory is enough for each."""
    return TokenComparison(
        comparison.divergence.float(),
        comparison.agrees,
        comparison.original_loss.float(),
        comparison.quantized_loss.float(),
    )


def _joined(parts: Sequence[TokenComparison]) -> TokenComparison:
    return TokenComparison(
        torch.cat([part.divergence for part in parts]),
        torch.cat([part.agrees for part in parts]),
        torch.cat([part.original_loss for part in parts]),
        torch.cat([part.quantized_loss for part in parts]),
    )


def _measured(compared: TokenComparison, bootstrap: BlockBootstrap) -> Measured:
    median, highest = bootstrap.quantiles(compared.divergence, (0.5, 0.99))
    return Measured(
        kld_mean=bootstrap.mean(compared.divergence),
        kld_median=median,
        kld_99=highest,
        top1_agreement=bootstrap.mean(compared.agrees),
        perplexity=bootstrap.exponential_mean(compared.quantized_loss),
        perplexity_ratio=bootstrap.exponential_mean(
            compared.quantized_loss.double() - compared.original_loss.double()
        ),
    )


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _batch_tokens(base: Any) -> int:
    return max(1, min(_MOST_BATCH_TOKENS, _BATCH_LOGITS // _vocabulary(base)))


def _check_vocabulary(base: Any, model: Any, sequences: Sequence[ScoredSequence]) -> None:
    sizes = (_vocabulary(base), _vocabulary(model))
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"expected two models of one vocabulary, got {sizes[0]} and {sizes[1]} tokens. Compare a model with the "
            "one that it was made from."
        )
    largest = max(max(sequence.tokens) for sequence in sequences)
    if largest >= sizes[0]:
        raise UsageError(
            f"expected tokens below {sizes[0]}, got {largest}: the tokenizer belongs to another model. Copy the right "
            "one into the base model's folder."
        )
