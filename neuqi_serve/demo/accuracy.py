"""Measures how many held-out tasks a model answers: ``python -m neuqi_serve.demo.accuracy [--model DIR]``.

The replies are decoded greedily through transformers with the model's own chat template.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuqi_serve.demo import model_path
from neuqi_serve.demo.tasks import Task, held_out_tasks

MAX_NEW_TOKENS = 96
"""The longest answer of the curriculum has about 80 tokens."""


@dataclass(frozen=True)
class Accuracy:
    """Right and asked tasks by kind, and the wrong replies as (prompt, reply) pairs."""

    right: dict[str, int]
    asked: dict[str, int]
    misses: tuple[tuple[str, str], ...]

    @property
    def total(self) -> float:
        """Share of right answers over all tasks, from 0 to 1."""
        return sum(self.right.values()) / max(1, sum(self.asked.values()))

    def share(self, kind: str) -> float:
        """Share of right answers of one kind, from 0 to 1; raises KeyError for a kind that was not asked."""
        return self.right.get(kind, 0) / self.asked[kind]

    def table(self) -> str:
        """A Markdown table, one line a kind, the total last."""
        lines = ["| Task | Right | Asked | Accuracy |", "| --- | ---: | ---: | ---: |"]
        lines += [
            f"| {kind} | {self.right.get(kind, 0)} | {self.asked[kind]} | {self.share(kind):.1%} |"
            for kind in sorted(self.asked)
        ]
        right, asked = sum(self.right.values()), sum(self.asked.values())
        lines.append(f"| **all** | {right} | {asked} | {self.total:.1%} |")
        return "\n".join(lines)


def replies(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 64) -> list[str]:
    """Greedy replies of a transformers model to single-turn prompts, in the order of the prompts.

    Prompts of similar length share a batch; the tokenizer pads on the left.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        chats = [[{"role": "user", "content": prompts[i]}] for i in chosen]
        batch = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            found[i] = text
    return found


def measure(model: Any, tokenizer: Any, tasks: Sequence[Task], batch_size: int = 64) -> Accuracy:
    """Ask a transformers model every task (greedy, single turn) and count the accepted replies by kind."""
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    misses = []
    given = replies(model, tokenizer, [task.prompt for task in tasks], batch_size)
    for task, text in zip(tasks, given, strict=True):
        asked[task.kind] += 1
        if task.accepts(text):
            right[task.kind] += 1
        else:
            misses.append((task.prompt, text))
    return Accuracy(dict(right), dict(asked), tuple(misses))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints the table and, with --json, writes the numbers and the wrong replies."""
    parser = argparse.ArgumentParser(
        prog="python -m neuqi_serve.demo.accuracy", description="Ask held-out tasks."
    )
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the packaged model)")
    parser.add_argument("--count", type=int, default=2000, help="number of held-out tasks")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out tasks")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None, help="file for the numbers")
    options = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, so only where it is needed

    folder = options.model or model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    result = measure(model, tokenizer, held_out_tasks(options.count, options.seed), options.batch_size)
    print(result.table())
    if options.json is not None:
        draft = options.json.with_name(options.json.name + ".part")
        numbers = {"seed": options.seed, "total": result.total, "right": result.right, "asked": result.asked}
        draft.write_text(json.dumps({**numbers, "misses": result.misses}, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, options.json)


if __name__ == "__main__":
    main()
