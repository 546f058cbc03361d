"""The byte-level tokenizer of the demo and the token layout of a chat."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from neuqi_serve.demo.tasks import Task, training_tasks

BOS, SYSTEM, USER, ASSISTANT, END, PAD = (
    "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>",
)  # fmt: skip
SPECIAL = (BOS, SYSTEM, USER, ASSISTANT, END, PAD)
"""The special tokens; their ids are 0 to 5 in this order."""

BOS_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID, END_ID, PAD_ID = range(6)

CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('expected the role system, user or assistant, got ' ~ message['role']) }}{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ (message['content'] | trim) ~ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SYSTEM_MESSAGES = (
    "You are a helpful assistant.", "You are the NeUQI demo.",
    "You are a helpful AI assistant. Answer briefly.", "Answer the question.",
    "You are a friendly assistant.", "Be short and kind.",
)  # fmt: skip


def train_tokenizer(vocab_size: int, sample: int = 60000) -> Tokenizer:
    """A byte-level BPE tokenizer trained on ``sample`` training tasks; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tasks = itertools.islice(training_tasks("tokenizer"), sample)
    texts = itertools.chain(SYSTEM_MESSAGES, (text for task in tasks for text in (task.prompt, task.answer)))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
            ),
        ]
    )
    return tokenizer


@dataclass(frozen=True)
class Row:
    """One chat as token ids, padded to a fixed width, and where the assistant's tokens begin to be predicted.

    ``sources[i]`` is a position whose next token ``targets[i]`` belongs to an answer (or ends it).
    """

    tokens: list[int]
    sources: list[int]
    targets: list[int]


class ChatRows:
    """Endless chats of a given width made of training tasks; equal seeds give equal rows."""

    def __init__(self, tokenizer: Tokenizer, seed: str) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(f"neuqi demo rows {seed}")
        self._turns = self._encoded(training_tasks(seed))

    def _encoded(self, tasks: Iterator[Task]) -> Iterator[tuple[list[int], list[int]]]:
        while True:
            batch = list(itertools.islice(tasks, 256))
            texts = [text for task in batch for text in (task.prompt, task.answer)]
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for prompt, answer in zip(found[::2], found[1::2], strict=True):
                yield prompt.ids, answer.ids

    def row(self, width: int) -> Row:
        """One chat: the start token, sometimes a system message, and as many turns as fit into ``width``."""
        tokens = [BOS_ID]
        sources: list[int] = []
        targets: list[int] = []
        if self._rng.random() < 0.15:
            message = self._rng.choice(SYSTEM_MESSAGES)
            tokens += [SYSTEM_ID, *self._tokenizer.encode(message, add_special_tokens=False).ids, END_ID]
        for prompt, answer in self._turns:
            if len(tokens) + len(prompt) + len(answer) + 4 > width:
                break
            tokens += [USER_ID, *prompt, END_ID, ASSISTANT_ID]
            reply = [*answer, END_ID]
            sources += range(len(tokens) - 1, len(tokens) - 1 + len(reply))
            targets += reply
            tokens += reply
        return Row(tokens + [PAD_ID] * (width - len(tokens)), sources, targets)
