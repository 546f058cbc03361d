from __future__ import annotations

import math

import pytest
import torch

from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.block_bootstrap import BlockBootstrap
from neuqi_serve.evaluate.kl_divergence import ratio_standard_error

# A standard error from R resamples is itself off by about 1/√(2R): 3 % here, of which four are allowed; the two
# formulas differ by terms of order 1/S besides.
RESAMPLES = 4000
RELATIVE = 0.12


def sample(sequences: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(5, 17, (sequences,), generator=generator)
    level = torch.randn(sequences, generator=generator).repeat_interleave(counts)
    return level + 0.3 * torch.randn(int(counts.sum()), generator=generator), counts


def test_the_mean_is_that_of_the_tokens_and_its_error_that_of_the_formula() -> None:
    values, counts = sample()
    found = BlockBootstrap(counts, RESAMPLES).mean(values)
    assert found.value == pytest.approx(float(values.double().mean()))
    sums = torch.stack([part.sum() for part in values.double().split(counts.tolist())])
    assert found.standard_error == pytest.approx(ratio_standard_error(sums, counts), rel=RELATIVE)
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.standard_error, rel=RELATIVE)


def test_tokens_of_a_sequence_count_as_one_draw() -> None:
    """Were they independent, the error would be smaller by a factor of about √(tokens of a sequence)."""
    values, counts = sample()
    ours = BlockBootstrap(counts).mean(values).standard_error
    independent = BlockBootstrap(torch.ones(len(values), dtype=torch.int64)).mean(values).standard_error
    assert ours > 2 * independent


def test_quantiles_are_those_of_all_tokens() -> None:
    values, counts = sample()
    median, high = BlockBootstrap(counts).quantiles(values, (0.5, 0.99))
    ordered = values.double().sort().values
    assert median.value == float(ordered[math.ceil(0.5 * len(ordered)) - 1])
    assert high.value == float(ordered[math.ceil(0.99 * len(ordered)) - 1])
    assert median.low <= median.value <= median.high
    assert median.standard_error > 0


def test_a_resample_of_a_quantile_is_what_drawing_the_sequences_gives() -> None:
    values, counts = sample(sequences=7)
    bootstrap = BlockBootstrap(counts, 50)
    found = bootstrap.quantiles(values, (0.9,))[0]
    parts = values.double().split(counts.tolist())
    drawn = []
    for weights in bootstrap._weights:
        tokens = (
            torch.cat([part.repeat(int(w)) for part, w in zip(parts, weights, strict=True)]).sort().values
        )
        drawn.append(tokens[math.ceil(0.9 * len(tokens) - 1e-9) - 1])
    assert found.standard_error == pytest.approx(float(torch.stack(drawn).std()), rel=1e-9)


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    values, counts = sample()
    found = BlockBootstrap(counts).exponential_mean(values)
    assert found.value == pytest.approx(math.exp(float(values.double().mean())))
    assert found.low < found.value < found.high


def test_the_draws_are_always_the_same() -> None:
    values, counts = sample()
    assert BlockBootstrap(counts).mean(values) == BlockBootstrap(counts).mean(values)


def test_a_single_sequence_has_no_error_bars() -> None:
    found = BlockBootstrap(torch.tensor([3])).mean(torch.tensor([1.0, 2.0, 6.0]))
    assert (found.value, found.standard_error, found.low, found.high) == (3.0, None, None, None)


@pytest.mark.parametrize("counts", [[], [3, 0]])
def test_sequences_without_tokens_are_refused(counts: list[int]) -> None:
    with pytest.raises(UsageError, match="at least one token"):
        BlockBootstrap(torch.tensor(counts, dtype=torch.int64))
