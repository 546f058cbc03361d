from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import pytest

from neuqi_serve.demo.tasks import KINDS, Task, held_out_tasks, training_tasks
from neuqi_serve.errors import UsageError

TRAINING_ONLY = {"chat", "riddle"}


def digest(tasks: list[Task]) -> str:
    return hashlib.sha256("".join(map(repr, tasks)).encode()).hexdigest()


def sample(seed: int, count: int = 6000) -> list[Task]:
    return list(itertools.islice(training_tasks(seed), count))


def test_the_same_seed_gives_the_same_tasks_in_another_process() -> None:
    code = (
        "import itertools, hashlib; from neuqi_serve.demo.tasks import *;"
        "tasks = held_out_tasks(200) + list(itertools.islice(training_tasks(3), 200));"
        "print(hashlib.sha256(''.join(map(repr, tasks)).encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(held_out_tasks(200) + sample(3, 200))


def test_other_seeds_give_other_tasks() -> None:
    assert digest(sample(0, 50)) != digest(sample(1, 50))
    assert digest(held_out_tasks(50, seed=0)) != digest(held_out_tasks(50, seed=1))


def test_held_out_keys_and_prompts_never_occur_in_training() -> None:
    training, held_out = sample(0, 20000), held_out_tasks(2000)
    assert all(task.held_out for task in held_out)
    assert not any(task.held_out for task in training)
    assert not {task.prompt.casefold() for task in training} & {task.prompt.casefold() for task in held_out}


def test_held_out_prompts_differ_and_cover_every_kind() -> None:
    tasks = held_out_tasks(2000)
    assert len({task.prompt for task in tasks}) == len(tasks) == 2000
    assert {task.kind for task in tasks} == set(KINDS) - TRAINING_ONLY
    assert tasks[:100] == held_out_tasks(100)


def test_training_covers_every_kind() -> None:
    assert {task.kind for task in sample(0)} == set(KINDS)


def test_a_count_outside_the_range_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a count from 0 to 5000, got 5001"):
        held_out_tasks(5001)
    assert len(held_out_tasks(5000)) == 5000


def test_every_answer_is_accepted_by_its_own_checker() -> None:
    for task in sample(1) + held_out_tasks(1000):
        assert task.accepts(task.answer), task
        assert task.accepts(f"  {task.answer.rstrip('.')}\n") or task.required, task


def test_wrong_answers_are_rejected() -> None:
    tasks = held_out_tasks(1000)
    for task, other in itertools.pairwise(tasks):
        assert not task.accepts("")
        assert not task.accepts(task.answer + " And more.")
        assert not task.accepts(task.answer[:-2])
        if other.answer.casefold() != task.answer.casefold() and not task.required:
            assert not task.accepts(other.answer), (task, other)


def test_letter_case_matters_only_for_capitals() -> None:
    by_kind = {task.kind: task for task in held_out_tasks(200)}
    assert not by_kind["capitals"].accepts(by_kind["capitals"].answer.lower())
    assert by_kind["opposite"].accepts(by_kind["opposite"].answer.lower())


def test_a_story_needs_its_words_and_its_ending() -> None:
    task = next(task for task in held_out_tasks(100) if task.kind == "story")
    assert not task.accepts(task.answer.replace(task.required[1], "dragon"))
    assert not task.accepts(task.answer.removesuffix("The end."))
    assert not task.accepts(f"{', '.join(task.required)}. The end.")
    assert not task.accepts(f"{task.answer} {task.answer}")


def test_worked_sums_are_right() -> None:
    for task in sample(2):
        if task.kind in ("add", "add columns", "subtract", "times table", "multiply"):
            left, right = task.answer.rstrip(".").rsplit("So ", 1)[-1].split(" = ")
            assert eval(left.replace("x", "*")) == int(right), task
