"""What low bits cost: held-out task accuracy and next-token KL divergence, Min-Max against NeUQI at equal bytes.

``python benchmarks/quality.py`` asks the demo model's held-out tasks (greedy decoding) and compares the next-token
distributions over their answers (teacher-forced), for bf16 weights and for 2, 3 and 4 bits at groups of 128 and 64.
``--model DIR --text FILE`` measures KL divergence and perplexity of any local model on any text instead.

Both methods store the same codes, scales and real zero-points, so every pair of rows has the same size; ``min-max
integer`` rounds the zero-point, as common formats do. Weights are quantized from themselves alone, without
calibration data, and computed with in ``--dtype`` after de-quantization in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, write
from quality_report import (
    BASELINE,
    ORIGINAL,
    Outcome,
    baseline_of,
    header,
    line,
    plot_divergence,
    records,
    verdict,
)
from torch import Tensor

from neuqi_serve.config import WeightSpec
from neuqi_serve.demo import model_path
from neuqi_serve.demo.tasks import Task, held_out_tasks
from neuqi_serve.evaluate.greedy import greedy_replies
from neuqi_serve.evaluate.quantized_copy import Quantizer, quantized_copy
from neuqi_serve.evaluate.teacher_forcing import (
    Batch,
    ScoredSequence,
    batches,
    measure_divergence,
    next_token_logits,
)
from neuqi_serve.quant.affine import AffineParams, QuantizedWeight, quantize
from neuqi_serve.quant.minmax import minmax_integer
from neuqi_serve.quant.quantize import quantize_weight
from neuqi_serve.quant.storage import Tile

KEPT_LOGITS_BYTES = 1 << 30
SPARE_TOKENS = 8


def integer_minmax(weight: Tensor, spec: WeightSpec) -> QuantizedWeight:
    """Min-Max with the zero-point rounded to a code, in the same storage."""
    count = spec.groups(weight.shape[1])
    tile = Tile(weight.float().reshape(weight.shape[0] * count, -1), None, -1)
    params = minmax_integer(tile, spec.bits, getattr(torch, spec.scale_dtype))
    stored = AffineParams(
        *(one.view(-1, count).to(getattr(torch, spec.scale_dtype)) for one in (params.scale, params.zero))
    )
    return QuantizedWeight(quantize(weight, stored, spec.bits), stored.scale, stored.zero)


METHODS: dict[str, Quantizer] = {
    BASELINE: partial(quantize_weight, preset="minmax"),
    "min-max integer": integer_minmax,
    "neuqi": partial(quantize_weight, preset="balanced"),
}


@dataclass(frozen=True)
class Questions:
    """Held-out tasks as token ids: prompts, and the most tokens each reply may take."""

    tasks: Sequence[Task]
    prompts: list[list[int]]
    limits: list[int]

    def answered(self, model: Any, tokenizer: Any) -> list[bool]:
        """Whether the model's greedy reply to each task is right."""
        replies = greedy_replies(model, self.prompts, self.limits, tokenizer.eos_token_id)
        texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
        return [task.accepts(text) for task, text in zip(self.tasks, texts, strict=True)]


def ask(tasks: Sequence[Task], tokenizer: Any) -> tuple[Questions, list[ScoredSequence]]:
    """The tasks as prompts to decode from and as chats whose answers, end token included, are scored.

    A reply is right only if it equals the known answer (a story may differ, but ends), so a reply may take twice the
    answer's tokens and a few more before it is cut off as wrong.
    """
    prompts, limits, chats = [], [], []
    for task in tasks:
        message = [{"role": "user", "content": task.prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer.encode(task.answer, add_special_tokens=False), tokenizer.eos_token_id]
        prompts.append(prompt)
        limits.append(2 * len(answer) + SPARE_TOKENS)
        chats.append(ScoredSequence((*prompt, *answer), len(prompt)))
    return Questions(tasks, prompts, limits), chats


def read_text(path: Path, tokenizer: Any, window: int, most_tokens: int) -> list[ScoredSequence]:
    """A plain text cut into windows, or a JSON list of texts cut off at one window each; every token is scored."""
    if path.suffix == ".json":
        texts = (tokenizer.encode(text)[:window] for text in json.loads(path.read_text(encoding="utf-8")))
    else:
        # A token is a few characters long: most of a long file need not be tokenized.
        ids = tokenizer.encode(path.read_text(encoding="utf-8")[: 16 * most_tokens])
        texts = (ids[start : start + window] for start in range(0, len(ids), window))
    sequences: list[ScoredSequence] = []
    taken = 0
    for tokens in texts:
        if taken >= most_tokens:
            break
        if len(tokens) > 1:
            sequences.append(ScoredSequence(tuple(tokens)))
            taken += len(tokens)
    return sequences


def original_logits(model: Any, work: Sequence[Batch]) -> Callable[[], Any]:
    """The original's logits, kept for all settings if they fit into a GiB, else computed again for each."""
    predictions = sum(sum(batch.lengths) for batch in work)
    if 4 * predictions * model.config.vocab_size > KEPT_LOGITS_BYTES:
        return lambda: next_token_logits(model, work)
    kept: list[Tensor] = list(next_token_logits(model, work))
    return lambda: kept


def run_settings(
    model: Any,
    tokenizer: Any,
    specs: Sequence[WeightSpec],
    work: Sequence[Batch],
    questions: Questions | None,
    workers: int,
) -> list[Outcome]:
    """Measure the original, then every method at every spec, ``workers`` at a time; a line is printed for each."""
    logits = original_logits(model, work)

    def measure(method: str, spec: WeightSpec | None) -> Outcome:
        if spec is None:
            bits, group_size, size, unfit, candidate = 16, 0, 16.0, (), model
        else:
            copy = quantized_copy(model, spec, METHODS[method])
            bits, group_size, size, unfit = (
                spec.bits,
                spec.group_size,
                copy.bits_per_weight,
                tuple(copy.unfit),
            )
            candidate = copy.model
        divergence = measure_divergence(logits(), next_token_logits(candidate, work), work)
        answered = questions.answered(candidate, tokenizer) if questions else None
        return Outcome(method, bits, group_size, size, divergence, answered, unfit)

    jobs = [(ORIGINAL, None), *((method, spec) for spec in specs for method in METHODS)]
    found: list[Outcome] = []
    print(header(questions is not None), flush=True)
    with ThreadPoolExecutor(workers) as pool:
        for outcome in pool.map(measure, *zip(*jobs, strict=True)):
            found.append(outcome)
            print(line(outcome, baseline_of(outcome, found)), flush=True)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="model folder (default: the packaged demo model)")
    parser.add_argument(
        "--text", type=Path, help="text file, or JSON list of texts, instead of the held-out tasks"
    )
    parser.add_argument("--count", type=int, default=2800, help="held-out tasks (at most 5000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the held-out tasks")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of --text, about")
    parser.add_argument("--window", type=int, default=256, help="tokens of --text that run together")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[128, 64])
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of computation"
    )
    parser.add_argument("--workers", type=int, help="settings measured at a time (default: one a core)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument(
        "--quick", action="store_true", help="a few tasks at one setting; writes with --out only"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.count, options.tokens = min(options.count, 28), min(options.tokens, 1024)
        options.bits, options.group_sizes = options.bits[:1], options.group_sizes[-1:]
    elif options.out is None:
        options.out = RESULTS
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    cores = len(os.sched_getaffinity(0))
    options.workers = options.workers or cores
    # Threads that share one small product mostly wait for one another: settings run side by side instead.
    torch.set_num_threads(max(1, cores // options.workers))
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, and --help needs none

    folder = options.model or model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    questions = None
    if options.text is None:
        questions, sequences = ask(held_out_tasks(options.count, options.seed), tokenizer)
    else:
        window = min(options.window, model.config.max_position_embeddings)
        sequences = read_text(options.text, tokenizer, window, options.tokens)
    work = batches(sequences)
    name = "neuqi-demo" if options.model is None else folder.resolve().name
    common: dict[str, str | int | float | bool] = {
        "model": name, "dtype": options.dtype, "sequences": len(sequences),
        "text": f"held-out tasks, seed {options.seed}" if options.text is None else options.text.name,
        "tokens": sum(sequence.predictions for sequence in sequences),
    }  # fmt: skip
    print(", ".join(f"{key}: {value}" for key, value in common.items()))
    specs = [WeightSpec(bits, group) for bits in options.bits for group in options.group_sizes]
    start = time.perf_counter()
    outcomes = run_settings(model, tokenizer, specs, work, questions, options.workers)
    print(f"{verdict(outcomes)} {time.perf_counter() - start:.0f} s.")
    if options.out is None:
        return
    stem = "quality" if options.model is None and options.text is None else f"quality-{name}"
    print(f"written to {write(stem, records(outcomes, common), options.out)}")
    plot_divergence(options.out / f"{stem}.png", outcomes, name)


if __name__ == "__main__":
    sys.exit(main())
