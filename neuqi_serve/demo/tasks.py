"""The curriculum: endless training tasks and a disjoint, deterministic held-out set."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

from neuqi_serve.demo import arithmetic, language, stories
from neuqi_serve.demo.task import Task, decorate, is_held_out
from neuqi_serve.errors import UsageError

__all__ = ["KINDS", "Task", "held_out_tasks", "is_held_out", "training_tasks"]

Maker = Callable[[random.Random], Task]

_MAKERS: tuple[tuple[Maker, int], ...] = (
    (arithmetic.add, 9), (arithmetic.add_columns, 5), (arithmetic.subtract, 9), (arithmetic.times_table, 4),
    (arithmetic.multiply, 5), (arithmetic.compare, 4), (arithmetic.sort_numbers, 6), (arithmetic.extreme, 3),
    (arithmetic.parity, 2), (arithmetic.sequence, 6), (arithmetic.word_problem, 6), (language.sort_words, 7),
    (language.reverse_list, 3), (language.count_items, 4), (language.count_word, 4), (language.member, 3),
    (language.odd_one_out, 3), (language.letters, 4), (language.spell, 3), (language.end_letter, 2),
    (language.capitals, 3), (language.opposite, 3), (language.plural, 2), (language.calendar, 4),
    (language.rhyme, 2), (language.fact, 3), (stories.story, 6), (stories.reading, 4), (stories.name, 1),
    (stories.chat, 3), (stories.riddle, 1),
)  # fmt: skip

KINDS: tuple[str, ...] = tuple(maker.__name__.replace("_", " ") for maker, _ in _MAKERS)
"""Every kind of task; ``chat`` and ``riddle`` occur in training only."""

_HELD_OUT_MAKERS = tuple(m for m, _ in _MAKERS if m not in (stories.chat, stories.riddle))


def training_tasks(seed: int | str) -> Iterator[Task]:
    """Tasks without end whose keys are never held out; equal seeds give equal sequences on every machine."""
    rng = random.Random(f"neuqi demo training {seed}")
    makers, weights = zip(*_MAKERS, strict=True)
    while True:
        maker: Maker = rng.choices(makers, weights)[0]
        task = maker(rng)
        if task.held_out:
            continue
        yield dataclasses.replace(task, prompt=decorate(rng, task.prompt))


def held_out_tasks(count: int, seed: int = 0) -> list[Task]:
    """``count`` different prompts whose keys never occur in training, spread evenly over the kinds.

    Raises UsageError when count is negative or larger than 5000 (the small tables have no more phrasings).
    """
    if not 0 <= count <= 5000:
        raise UsageError(f"expected a count from 0 to 5000, got {count}; ask for fewer held-out tasks")
    rng = random.Random(f"neuqi demo held out {seed}")
    tasks: list[Task] = []
    prompts: set[str] = set()
    turn = 0
    while len(tasks) < count:
        task = _HELD_OUT_MAKERS[turn % len(_HELD_OUT_MAKERS)](rng)
        if not task.held_out:
            continue
        turn += 1
        task = dataclasses.replace(task, prompt=decorate(rng, task.prompt))
        if task.prompt in prompts:
            continue
        prompts.add(task.prompt)
        tasks.append(task)
    return tasks
