"""What weighing the inputs is worth: next-token KL divergence with and without an importance of the layers' inputs.

    python benchmarks/importance.py [--models DIR --text FILE] [--bits 2 3 4] [--group-sizes 64 32] [--out FOLDER]

Three weights of input i in the squared error of a layer: ``none`` (all alike), ``rmsnorm`` (the square of the norm's
weight in front of the layer, where there is one: free, no data; other layers none), ``measured`` (its mean square on a
calibration text, as `neuqi importance` writes it). The ratio is KL divergence over that of ``none``; the standard
error is that of the paired difference, over whole sequences. The demo model is measured on held-out tasks and
calibrated on training tasks; other models on the second half of the texts and calibrated on the first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Record, table, write
from torch import Tensor, nn

from neuqi_serve.config import WeightSpec
from neuqi_serve.demo import model_path
from neuqi_serve.demo.task import Task
from neuqi_serve.demo.tasks import held_out_tasks, training_tasks
from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.kl_divergence import divergence_difference
from neuqi_serve.evaluate.quantized_copy import block_linears, quantized_copy
from neuqi_serve.evaluate.teacher_forcing import (
    ScoredSequence,
    batches,
    measure_divergence,
    next_token_logits,
)
from neuqi_serve.pipeline.importance import input_squares

CALIBRATION_SEQUENCES = 256
# Layers that read what a norm of their block has written (Llama, Mistral, Qwen).
NORM_OF = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}


def rmsnorm_importance(model: nn.Module) -> dict[str, Tensor]:
    """Square of the norm's weight for the layers that read a norm's output."""
    found = {}
    for name in block_linears(model):
        block, _, last = name.rpartition(".")
        if last in NORM_OF:
            norm = model.get_submodule(f"{block.rpartition('.')[0]}.{NORM_OF[last]}")
            found[name] = norm.weight.detach().float().square()
    return found


def of_tasks(tasks: Sequence[Task], tokenizer: Any) -> list[ScoredSequence]:
    chats = []
    for task in tasks:
        message = [{"role": "user", "content": task.prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer.encode(task.answer, add_special_tokens=False), tokenizer.eos_token_id]
        chats.append(ScoredSequence((*prompt, *answer), len(prompt)))
    return chats


def sequences_of(
    folder: Path, text: Path | None, tokenizer: Any, window: int, count: int
) -> tuple[list[ScoredSequence], list[ScoredSequence]]:
    """Calibration and evaluation sequences."""
    if text is None:
        tasks = training_tasks(seed=5)
        calibration = of_tasks([next(tasks) for _ in range(CALIBRATION_SEQUENCES)], tokenizer)
        return calibration, of_tasks(held_out_tasks(count, seed=1), tokenizer)
    texts = [story.replace("\n\n", "\n") for story in json.loads(text.read_text(encoding="utf-8"))]
    ids = [tuple(tokenizer.encode(story)[:window]) for story in texts]
    kept = [ScoredSequence(tokens) for tokens in ids if len(tokens) > 1]
    half = len(kept) // 2
    return kept[:half][:CALIBRATION_SEQUENCES], kept[half:][:count]


def measure(folder: Path, text: Path | None, specs: Sequence[WeightSpec], count: int) -> list[Record]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    window = min(256, model.config.max_position_embeddings)
    calibration, evaluation = sequences_of(folder, text, tokenizer, window, count)
    linears: Mapping[str, nn.Module] = block_linears(model)
    measured = input_squares(model, linears, [torch.tensor(s.tokens) for s in calibration])
    sources = {"none": None, "rmsnorm": rmsnorm_importance(model), "measured": measured}
    work = batches(evaluation)
    logits = list(next_token_logits(model, work))
    name = "neuqi-demo" if text is None else folder.name
    spike = max(float(values.max() / values.mean()) for values in measured.values())
    records = [Record({"model": name}, "largest_input_over_mean", spike, "ratio")]
    for spec in specs:
        found = {}
        for source, importance in sources.items():
            try:
                copy = quantized_copy(model, spec, importance=importance)
            except UsageError:
                break
            found[source] = measure_divergence(logits, next_token_logits(copy.model, work), work)
        for source, divergence in found.items():
            base = found["none"]
            case: dict[str, str | int | float | bool] = {
                "model": name, "bits": spec.bits, "group_size": spec.group_size, "importance": source,
                "sequences": len(evaluation),
            }  # fmt: skip
            ratio = None if source == "none" else divergence.mean_nats / base.mean_nats
            records.append(
                Record(case, "kl_divergence", divergence.mean_nats, "nats/token", ratio and "none", ratio)
            )
            if source != "none":
                difference, error = divergence_difference(divergence, base)
                records.append(Record(case, "kl_difference", difference, "nats/token"))
                if error is not None:
                    records.append(Record(case, "kl_difference_standard_error", error, "nats/token"))
        print(table([r for r in records if r.metric == "kl_divergence"][-3:]).splitlines()[-3:], flush=True)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=Path, help="folder of other models to measure, beside the demo model"
    )
    parser.add_argument("--text", type=Path, help="JSON list of texts for those models")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--count", type=int, default=1400, help="sequences to measure on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    specs = [WeightSpec(bits, group) for bits in options.bits for group in options.group_sizes]
    records = measure(model_path(), None, specs, options.count)
    for folder in sorted(options.models.iterdir()) if options.models else ():
        records += measure(folder, options.text, specs, options.count)
    print(table(records))
    print(f"written to {write('importance', records, options.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
