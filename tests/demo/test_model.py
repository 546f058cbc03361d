from __future__ import annotations

import json
from typing import Any

import pytest

from neuqi_serve.demo import MAX_LENGTH, model_path
from neuqi_serve.demo.tasks import held_out_tasks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from neuqi_serve.demo.accuracy import measure, replies  # noqa: E402
from neuqi_serve.demo.network import Network, NetworkShape  # noqa: E402
from neuqi_serve.demo.tokens import train_tokenizer  # noqa: E402

LIMIT = 24 * 2**20
BOUND = 0.7
"""The shipped model answers 82 % of 2000 held-out tasks; a sample of 87 scatters by about 4 points."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_path())


def ask(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    batch = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**batch, do_sample=False)
    text: str = tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_the_folder_is_complete_and_small() -> None:
    names = {path.name for path in model_path().iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in model_path().iterdir()) <= LIMIT


def test_real_kernels_apply(model: Any) -> None:
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.head_dim == 64
    assert config.max_position_embeddings == MAX_LENGTH
    assert model.dtype == torch.bfloat16
    assert 4e6 <= model.num_parameters() <= 12e6
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name
        assert all(size % 128 == 0 for size in weight.shape), (name, weight.shape)


def test_the_tokenizer_is_the_one_the_script_trains() -> None:
    shipped = json.loads((model_path() / "tokenizer.json").read_text(encoding="utf-8"))
    vocab_size = NetworkShape().vocab_size
    assert json.loads(train_tokenizer(vocab_size).to_str())["model"]["merges"] == shipped["model"]["merges"]


def test_digits_are_single_tokens_and_bytes_survive(tokenizer: Any) -> None:
    assert len(tokenizer.encode("1234", add_special_tokens=False)) == 4
    text = "Ünïcode \n\t 日本 {}"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_writes_every_role(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be kind. "},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye!"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be kind.<|end|><|user|>Hi!<|end|><|assistant|>Hello!<|end|><|user|>Bye!<|end|>"
        "<|assistant|>"
    )
    single = tokenizer.apply_chat_template([{"role": "user", "content": "Hi!"}], tokenize=False)
    assert single == "<|bos|><|user|>Hi!<|end|>"
    with pytest.raises(Exception, match="expected the role system, user or assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


def test_the_twin_computes_what_transformers_computes(model: Any, tokenizer: Any) -> None:
    twin = Network(NetworkShape())
    missing = twin.load_state_dict(model.float().state_dict(), strict=False)
    model.to(torch.bfloat16)
    assert missing.unexpected_keys in ([], ["lm_head.weight"])
    assert not missing.missing_keys
    twin.cos, twin.sin = twin.cos.float(), twin.sin.float()
    text = "<|bos|><|user|>What is 3 + 4?<|end|><|assistant|>3 + 4 = 7.<|end|>"
    tokens = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.inference_mode():
        ours = twin(tokens, torch.arange(tokens.numel()))
        theirs = model(tokens).logits[0].float()
    assert (ours.softmax(-1) - theirs.softmax(-1)).abs().max() < 0.05


def test_a_sample_of_held_out_tasks_is_answered(model: Any, tokenizer: Any) -> None:
    result = measure(model, tokenizer, held_out_tasks(87, seed=1), batch_size=29)
    assert sum(result.asked.values()) == 87
    assert result.total >= BOUND, result.table()


def test_replies_keep_the_order_of_the_prompts(model: Any, tokenizer: Any) -> None:
    prompts = ["What is the opposite of hot?", "Hello!", "What is 2 + 2?"]
    together = replies(model, tokenizer, prompts, batch_size=2)
    assert together == [
        "The opposite of hot is cold.",
        replies(model, tokenizer, ["Hello!"])[0],
        "2 + 2 = 4.",
    ]


def test_a_second_question_in_a_chat_and_a_system_message(model: Any, tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Who are you?"},
    ]
    first = ask(model, tokenizer, chat)
    assert "NeUQI demo" in first
    chat += [{"role": "assistant", "content": first}, {"role": "user", "content": "What is 2 + 3?"}]
    assert ask(model, tokenizer, chat) == "2 + 3 = 5."


def test_answers_are_greedy_by_default_in_vllm_too() -> None:
    """vLLM takes its default temperature from this file, and 1 where the file has none."""
    generation = json.loads((model_path() / "generation_config.json").read_text())
    assert generation["temperature"] == 0.0
    assert generation["do_sample"] is False
