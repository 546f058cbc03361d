"""Light distillation of NeUQI against PV-tuning, which moves codes too: KL divergence from the original.

    python benchmarks/pv_tuning.py --model DIR --text FILE [--bits 2] [--group-size 32] [--passes 1 …]

Both train towards the original's next-token distribution, with the same learning rate, and ``--passes`` over the text.
PV-tuning starts from GPTQ's codes, as in its paper, and from NeUQI's, with each share of codes that a step may move
of ``--shares``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from harness import RESULTS, Record, table, write
from quality_peers.sequential import Recipe, quantize_blocks
from quality_peers.texts import story_texts
from quality_peers.trained import distilled, pv_tuned

from neuqi_serve.config import WeightSpec
from neuqi_serve.distill.training import TrainingSettings
from neuqi_serve.evaluate.teacher_forcing import batches, measure_divergence, next_token_logits

STARTS = {"gptq": Recipe("min-max", ldlq=True), "neuqi": Recipe(ldlq=True, refit=True)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="JSON list of texts")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--windows", type=int, default=128, help="windows of 256 tokens")
    parser.add_argument("--count", type=int, default=100, help="texts to measure on")
    parser.add_argument(
        "--passes", type=int, nargs="+", default=[1], help="passes of PV-tuning over the text"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = story_texts(options.text, tokenizer, options.windows, options.count)
    work, spec = batches(texts.evaluation), WeightSpec(options.bits, options.group_size)
    logits = list(next_token_logits(model, work))
    records: list[Record] = []

    def keep(method: str, start: str, tokens: int, share: float, candidate: object) -> None:
        nats = measure_divergence(logits, next_token_logits(candidate, work), work).mean_nats
        case = {"model": options.model.name, "bits": spec.bits, "group_size": spec.group_size, "method": method,
                "start": start, "trained_tokens": tokens, "share": share}  # fmt: skip
        ratio = nats / records[0].value if records else None
        records.append(Record(case, "kld", nats, "nats/token", ratio and "distillation", ratio))
        print(table(records[-1:]), flush=True)

    made = {name: quantize_blocks(model, texts.windows, spec, recipe) for name, recipe in STARTS.items()}
    rate = options.learning_rate
    student, result = distilled(
        model,
        *made["neuqi"],
        spec,
        texts.windows,
        "logits",
        TrainingSettings(batch_size=2, learning_rate=rate),
    )
    keep("distillation", "neuqi", result.tokens, 0.0, student)
    for passes in options.passes:
        settings = TrainingSettings(result.steps * passes, 2, rate)
        for start, (quantized, stored) in made.items():
            for share in options.shares:
                tuned = pv_tuned(model, quantized, stored, spec, texts.windows, "logits", settings, share)
                keep("pv-tuning", start, result.tokens * passes, share, tuned)
    print(table(records))
    print(f"written to {write('pv_tuning', records, options.out, {'text': texts.source})}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
