"""The texts of a model: windows to calibrate and distil on, and sequences, apart from them, to measure on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from importance import of_tasks
from torch import Tensor

from neuqi_serve.demo.tasks import held_out_tasks, training_tasks
from neuqi_serve.evaluate.teacher_forcing import ScoredSequence

CONTEXT = 256


@dataclass(frozen=True)
class Texts:
    """``windows`` int64 ``[S, T]``; ``evaluation``: other texts; ``source``: what they are, in words."""

    windows: Tensor
    evaluation: list[ScoredSequence]
    source: str


def demo_texts(tokenizer: Any, windows: int, count: int) -> Texts:
    """Training tasks of the demo's curriculum as chats, one behind the other; answers to its held-out tasks."""
    tasks = training_tasks(seed=5)
    endless = (token for task in tasks for token in of_tasks([task], tokenizer)[0].tokens)
    evaluation = of_tasks(held_out_tasks(count, seed=1), tokenizer)
    return Texts(
        _cut(endless, windows), evaluation, "curriculum of the demo model: training and held-out tasks"
    )


def story_texts(file: Path, tokenizer: Any, windows: int, count: int) -> Texts:
    """Stories of a JSON list: the first half one behind the other, and each of the second half by itself."""
    stories = [story.replace("\n\n", "\n") for story in json.loads(file.read_text(encoding="utf-8"))]
    half = len(stories) // 2
    train = (token for story in stories[:half] for token in tokenizer.encode(story))
    ids = [tuple(tokenizer.encode(story)[:CONTEXT]) for story in stories[half:]]
    evaluation = [ScoredSequence(tokens) for tokens in ids if len(tokens) > 1][:count]
    return Texts(_cut(train, windows), evaluation, "TinyStories, split by story")


def _cut(tokens: Iterable[int], windows: int) -> Tensor:
    taken: list[int] = []
    for token in tokens:
        taken.append(token)
        if len(taken) == windows * CONTEXT:
            break
    whole = len(taken) // CONTEXT
    return torch.tensor(taken[: whole * CONTEXT]).view(whole, CONTEXT)
