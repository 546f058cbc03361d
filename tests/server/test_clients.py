"""What the published clients do, against one real server with a quantized model: ``openai`` and ``anthropic``."""

from __future__ import annotations

import json
from typing import Any

import pytest

QUESTION = [{"role": "user", "content": "What is the opposite of hot?"}]
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def openai_client(chat_server: Any) -> Any:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    return openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="module")
def anthropic_client(chat_server: Any) -> Any:
    anthropic = pytest.importorskip("anthropic", reason="needs the anthropic client")
    return anthropic.Anthropic(base_url=chat_server.url, api_key="none", timeout=120, max_retries=0)


def _chat(client: Any, **options: Any) -> Any:
    settings = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    return client.chat.completions.create(**(settings | options))


def test_models_are_listed_with_their_length(openai_client: Any) -> None:
    models = openai_client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert models[0].max_model_len == 512


def test_a_question_is_answered_and_counted(openai_client: Any) -> None:
    answer = _chat(openai_client)
    assert answer.choices[0].message.content.strip() == "The opposite of hot is cold."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_has_the_same_text_and_ends_with_the_usage(openai_client: Any) -> None:
    whole = _chat(openai_client)
    events = list(_chat(openai_client, stream=True, stream_options={"include_usage": True}))
    deltas = [event.choices[0].delta.content for event in events if event.choices]
    assert "".join(delta or "" for delta in deltas) == whole.choices[0].message.content
    assert sum(bool(delta) for delta in deltas) > 2
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage


def test_a_plain_completion_stops_where_it_is_told(openai_client: Any) -> None:
    prompt = "<|user|>What is the opposite of hot?<|end|><|assistant|>"
    settings: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 40}
    answer = openai_client.completions.create(prompt=prompt, stop=[" is"], **settings)
    assert answer.choices[0].text == "The opposite of hot"
    two = openai_client.completions.create(prompt=[prompt, prompt], echo=True, **settings)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == two.choices[1].text
    assert "opposite of hot is cold" in two.choices[0].text


def test_logprobs_are_those_of_the_chosen_tokens(openai_client: Any) -> None:
    answer = _chat(openai_client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    # The end of the answer is counted as a token, and has no text.
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        best = max(token.top_logprobs, key=lambda candidate: candidate.logprob)
        assert best.token == token.token
        assert token.logprob <= 0


def test_several_answers_and_a_seed(openai_client: Any) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 12}
    first, second = (_chat(openai_client, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in second.choices]


def test_structured_output_follows_its_schema(openai_client: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": ADD, "strict": True}}
    answer = json.loads(_chat(openai_client, response_format=wanted).choices[0].message.content)
    assert list(answer) == ["a"]
    assert 0 <= answer["a"] <= 99
    chosen = _chat(openai_client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert chosen.choices[0].message.content in ("yes", "no")


def test_embeddings_are_refused_clearly(openai_client: Any) -> None:
    import openai

    with pytest.raises(openai.APIStatusError) as refusal:
        openai_client.embeddings.create(model="tiny", input="hello")
    assert refusal.value.status_code == 404


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"model": "another"}, 404),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400),
        ({"max_tokens": -1}, 400),
        ({"temperature": "hot"}, 400),
        ({"messages": [{"role": "wizard", "content": "hello"}]}, 400),
    ],
    ids=["model", "length", "max_tokens", "temperature", "role"],
)
def test_errors_are_shaped_as_the_client_expects(openai_client: Any, options: Any, status: int) -> None:
    import openai

    with pytest.raises(openai.APIStatusError) as refusal:
        _chat(openai_client, **options)
    assert refusal.value.status_code == status
    body = refusal.value.response.json()["error"]
    assert body["message"]
    assert body["type"]
    assert body["code"] == status


def test_responses_answer_and_stream(openai_client: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "input": QUESTION, "temperature": 0, "max_output_tokens": 40}
    whole = openai_client.responses.create(**settings)
    assert whole.status == "completed"
    assert whole.output_text.strip() == "The opposite of hot is cold."
    events = list(openai_client.responses.create(stream=True, **settings))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.completed"


def test_messages_of_anthropic_answer_stream_and_count(anthropic_client: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": QUESTION}
    answer = anthropic_client.messages.create(max_tokens=40, **settings)
    assert answer.content[0].text.strip() == "The opposite of hot is cold."
    assert answer.stop_reason == "end_turn"
    with anthropic_client.messages.stream(max_tokens=40, **settings) as stream:
        assert "".join(stream.text_stream) == answer.content[0].text
    counted = anthropic_client.messages.count_tokens(**settings)
    assert counted.input_tokens == answer.usage.input_tokens
