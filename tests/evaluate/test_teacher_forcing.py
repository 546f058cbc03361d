import pytest
import torch

from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.kl_divergence import compare_logits
from neuqi_serve.evaluate.teacher_forcing import (
    ScoredSequence,
    batches,
    measure_divergence,
    next_token_logits,
)

# Padding changes the shapes of float32 matrix products, and with them the order of their sums.
PADDING_TOLERANCE = 1e-4


def sequences():
    generator = torch.Generator().manual_seed(1)
    lengths = (2, 17, 5, 31, 5)
    return [
        ScoredSequence(tuple(torch.randint(67, (n,), generator=generator).tolist()), n // 2) for n in lengths
    ]


def test_batches_hold_every_prediction_once():
    work = batches(sequences(), batch_tokens=40)
    assert len(work) > 1
    targets = [part.tolist() for batch in work for part in batch.targets.split(list(batch.lengths))]
    expected = [list(item.tokens[item.first :]) for item in sequences()]
    assert sorted(targets) == sorted(expected)
    assert all(int(batch.sources.sum()) == len(batch.targets) for batch in work)


def test_batches_stay_within_the_limit_where_a_sequence_does():
    sizes = [batch.tokens.numel() for batch in batches(sequences(), batch_tokens=20)]
    assert sorted(sizes)[-1] == 31
    assert all(size <= 20 for size in sorted(sizes)[:-1])


def test_logits_do_not_depend_on_padding(tiny_llama):
    work = batches(sequences(), batch_tokens=4096)
    assert len(work) == 1
    together = next(next_token_logits(tiny_llama, work))
    parts = together.split(list(work[0].lengths))
    for item, part in zip(sorted(sequences(), key=lambda s: len(s.tokens)), parts, strict=True):
        with torch.inference_mode():
            alone = tiny_llama(input_ids=torch.tensor([item.tokens])).logits[0]
        torch.testing.assert_close(part, alone[item.first - 1 : -1], rtol=0, atol=PADDING_TOLERANCE)


def test_divergence_of_a_model_from_itself_is_zero(tiny_llama):
    work = batches(sequences(), batch_tokens=40)
    logits = list(next_token_logits(tiny_llama, work))
    found = measure_divergence(logits, next_token_logits(tiny_llama, work), work)
    assert found.mean_nats == 0.0
    assert found.top1_agreement == 1.0
    assert int(found.sequence_tokens.sum()) == sum(item.predictions for item in sequences())


def test_divergence_equals_that_of_the_sequences_one_by_one(tiny_llama):
    items = sequences()
    work = batches(items, batch_tokens=4096)
    noise = torch.Generator().manual_seed(2)
    logits = list(next_token_logits(tiny_llama, work))
    other = [part + torch.randn(part.shape, generator=noise) for part in logits]
    found = measure_divergence(logits, iter(other), work)
    direct = compare_logits(logits[0], other[0], work[0].targets).divergence
    assert found.mean_nats == pytest.approx(float(direct.mean()))
    assert found.mean_nats > 0.1


@pytest.mark.parametrize(("tokens", "first"), [((1,), 1), ((1, 2), 0), ((1, 2), 2), ((), 1)])
def test_sequence_without_a_prediction_is_refused(tokens, first):
    with pytest.raises(UsageError, match="first predicted token"):
        ScoredSequence(tokens, first)
