import math

import pytest
import torch

from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.kl_divergence import (
    TokenComparison,
    compare_logits,
    divergence_difference,
    ratio_standard_error,
    summarize,
)

# Sums of a few hundred float64 terms of size 1 or less.
ROUNDING = 1e-12


def random_logits(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, columns, generator=generator) for _ in range(2)], torch.randint(
        columns, (rows,), generator=generator
    )


def comparison(divergence, agrees=None, loss=0.0):
    nats = torch.tensor(divergence, dtype=torch.float64)
    same = torch.ones(len(nats), dtype=torch.bool) if agrees is None else torch.tensor(agrees)
    return TokenComparison(nats, same, torch.full_like(nats, loss), torch.full_like(nats, 2 * loss))


def test_divergence_of_equal_logits_is_zero():
    (logits, _), targets = random_logits(17, 63)
    found = compare_logits(logits, logits.clone(), targets)
    assert torch.equal(found.divergence, torch.zeros(17, dtype=torch.float64))
    assert bool(found.agrees.all())
    assert torch.equal(found.original_loss, found.quantized_loss)


def test_divergence_ignores_a_constant_added_to_the_logits():
    (logits, _), targets = random_logits(5, 7)
    shifted = logits.double() + torch.arange(5.0).double().unsqueeze(-1)
    assert compare_logits(logits, shifted, targets).divergence.abs().max() < ROUNDING


def test_divergence_equals_a_hand_computed_example():
    # P = (1/2, 1/4, 1/4), Q = (1/4, 1/2, 1/4): KL = ½·ln 2 − ¼·ln 2 + 0 = ¼·ln 2.
    p = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    found = compare_logits(p, q, torch.tensor([1]))
    assert found.divergence.item() == pytest.approx(0.25 * math.log(2), abs=ROUNDING)
    assert found.agrees.tolist() == [False]
    assert found.original_loss.item() == pytest.approx(math.log(4), abs=ROUNDING)
    assert found.quantized_loss.item() == pytest.approx(math.log(2), abs=ROUNDING)


def test_divergence_is_from_the_original_to_the_quantized_model():
    # P = (3/4, 1/4), Q = (1/2, 1/2): the two directions differ.
    p = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    q = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = compare_logits(p, q, torch.tensor([0]))
    assert found.divergence.item() == pytest.approx(expected, abs=ROUNDING)
    assert compare_logits(q, p, torch.tensor([0])).divergence.item() != pytest.approx(expected, abs=1e-3)


def test_divergence_skips_tokens_that_the_original_rules_out():
    p = torch.tensor([[0.0, 0.0, -math.inf]])
    q = torch.tensor([[0.0, 0.0, math.log(2.0)]])
    found = compare_logits(p, q, torch.tensor([0]))
    assert found.divergence.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("chunk_elements", [1, 63, 200, 10_000])
def test_comparison_does_not_depend_on_the_chunk(chunk_elements):
    (p, q), targets = random_logits(17, 63)
    whole = compare_logits(p, q, targets)
    parts = compare_logits(p, q, targets, chunk_elements)
    torch.testing.assert_close(parts.divergence, whole.divergence, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(parts.quantized_loss, whole.quantized_loss, rtol=0, atol=ROUNDING)
    assert torch.equal(parts.agrees, whole.agrees)


def test_losses_equal_the_cross_entropy():
    (p, q), targets = random_logits(17, 63)
    found = compare_logits(p, q, targets)
    expected = torch.nn.functional.cross_entropy(q.double(), targets, reduction="none")
    torch.testing.assert_close(found.quantized_loss, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("p", "q", "targets"), [((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (3,)), ((1, 2, 3), (1, 2, 3), (1,))]
)
def test_compare_logits_refuses_shapes_that_do_not_fit(p, q, targets):
    with pytest.raises(UsageError, match="expected logits"):
        compare_logits(torch.zeros(p), torch.zeros(q), torch.zeros(targets, dtype=torch.int64))


def test_summary_averages_over_tokens_not_over_sequences():
    found = summarize([comparison([1.0, 2.0, 6.0], [True, False, True], loss=0.5)], [(2, 1)])
    assert found.mean_nats == 3.0
    assert found.sequence_nats.tolist() == [3.0, 6.0]
    assert found.sequence_tokens.tolist() == [2, 1]
    assert found.top1_agreement == pytest.approx(2 / 3)
    assert found.original_perplexity == pytest.approx(math.exp(0.5))
    assert found.quantized_perplexity == pytest.approx(math.exp(1.0))


def test_summary_does_not_depend_on_how_the_sequences_are_batched():
    one = summarize([comparison([1.0, 2.0, 6.0, 0.0])], [(2, 1, 1)])
    two = summarize([comparison([1.0, 2.0]), comparison([6.0, 0.0])], [(2,), (1, 1)])
    assert two.mean_nats == one.mean_nats
    assert two.standard_error_nats == one.standard_error_nats
    assert torch.equal(two.sequence_nats, one.sequence_nats)


def test_summary_has_no_standard_error_for_one_sequence():
    assert summarize([comparison([1.0, 2.0])], [(2,)]).standard_error_nats is None


def test_summary_refuses_lengths_of_another_batch():
    with pytest.raises(UsageError, match="add up to 2 positions, got 3"):
        summarize([comparison([1.0, 2.0])], [(3,)])


def test_summary_refuses_no_position():
    with pytest.raises(UsageError, match="at least one position"):
        summarize([], [])


def test_standard_error_of_equally_long_sequences_is_the_textbook_one():
    sums = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    found = ratio_standard_error(sums, torch.tensor([1, 1, 1, 1]))
    assert found == pytest.approx(float(sums.std()) / 2, abs=ROUNDING)


def test_standard_error_is_zero_when_every_token_is_alike():
    assert ratio_standard_error(torch.tensor([2.0, 6.0, 1.0]).double(), torch.tensor([2, 6, 1])) == 0.0


def test_difference_is_paired():
    first = summarize([comparison([1.0, 5.0, 3.0])], [(1, 1, 1)])
    second = summarize([comparison([0.5, 4.5, 2.5])], [(1, 1, 1)])
    assert divergence_difference(first, second) == (0.5, 0.0)


def test_difference_refuses_other_sequences():
    first = summarize([comparison([1.0, 5.0, 3.0])], [(1, 2)])
    second = summarize([comparison([1.0, 5.0, 3.0])], [(2, 1)])
    with pytest.raises(UsageError, match="same sequences"):
        divergence_difference(first, second)
