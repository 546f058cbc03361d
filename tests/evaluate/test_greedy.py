import pytest
import torch

from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.greedy import greedy_replies

END = 4
LENGTHS = (1, 17, 3, 9, 5, 2, 11)
LIMITS = (13, 1, 40, 7, 25, 31, 18)


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(6, 67, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture
def ending_llama(tiny_llama):
    """The random model with the end token made likely, so that replies end at different lengths."""
    with torch.no_grad():
        tiny_llama.lm_head.weight[END] *= 2.0
    return tiny_llama


def one_by_one(model, prompts, limits):
    found = []
    for prompt, limit in zip(prompts, limits, strict=True):
        tokens = torch.tensor([prompt])
        output = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=limit
        )
        reply = output[0, len(prompt) :].tolist()
        found.append(reply[: reply.index(END)] if END in reply else reply)
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_replies_equal_those_of_generate_one_by_one(ending_llama, prompts, batch_size):
    expected = one_by_one(ending_llama, prompts, LIMITS)
    stopped = [len(reply) < limit for reply, limit in zip(expected, LIMITS, strict=True)]
    assert any(stopped)
    assert not all(stopped)
    assert greedy_replies(ending_llama, prompts, LIMITS, END, batch_size) == expected


def test_no_prompts_give_no_replies(tiny_llama):
    assert greedy_replies(tiny_llama, [], [], END) == []


@pytest.mark.parametrize(("given", "limits"), [([[1, 2]], []), ([[1, 2], []], [3, 3]), ([[1, 2]], [0])])
def test_prompts_and_limits_that_do_not_fit_are_refused(tiny_llama, given, limits):
    with pytest.raises(UsageError, match="expected prompts of at least one token"):
        greedy_replies(tiny_llama, given, limits, END)
