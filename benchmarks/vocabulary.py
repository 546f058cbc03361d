"""What low bits of the output head and the embedding cost: next-token KL divergence from the original model.

``python benchmarks/vocabulary.py`` compares the demo model's distributions over held-out answers, its blocks
unquantized and at 4 and 2 bits, its head and embedding at 16, 8 and 4 bits; ``--model DIR --text FILE`` any local model
on any text. A tied model has one width for both. Bytes are those of head and embedding.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import RESULTS, Record, report
from quality import ask, original_logits, read_text

from neuqi_serve.config import UNQUANTIZED_BITS, VOCABULARY_BITS, WeightSpec
from neuqi_serve.demo import model_path
from neuqi_serve.demo.tasks import held_out_tasks
from neuqi_serve.evaluate.quantized_copy import quantized_copy
from neuqi_serve.evaluate.quantized_vocabulary import quantized_vocabulary
from neuqi_serve.evaluate.teacher_forcing import batches, measure_divergence, next_token_logits


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="model folder (default: the packaged demo model)")
    parser.add_argument("--text", type=Path, help="text file, or JSON list of texts")
    parser.add_argument("--count", type=int, default=560, help="held-out tasks")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of --text, about")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 4, 2], help="bits of the blocks")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def widths(tied: bool) -> Sequence[tuple[int, int]]:
    """Bits of head and embedding to try: together, and each alone where they are two tensors."""
    together = [(bits, bits) for bits in VOCABULARY_BITS]
    low = [bits for bits in VOCABULARY_BITS if bits != UNQUANTIZED_BITS]
    alone = [pair for bits in low for pair in ((bits, UNQUANTIZED_BITS), (UNQUANTIZED_BITS, bits))]
    return together if tied else together + alone


def main() -> int:
    options = parse()
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, and --help needs none

    folder = options.model or model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if options.text is None:
        _, sequences = ask(held_out_tasks(options.count, 1), tokenizer)
    else:
        window = min(256, model.config.max_position_embeddings)
        sequences = read_text(options.text, tokenizer, window, options.tokens)
    work = batches(sequences)
    logits = original_logits(model, work)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tied = head is embedding
    records = []
    for block_bits in options.bits:
        body = model
        if block_bits != UNQUANTIZED_BITS:
            body = quantized_copy(model, WeightSpec(block_bits, options.group_size)).model
        for pair in widths(tied):
            specs = [
                None if bits == UNQUANTIZED_BITS else WeightSpec(bits, options.group_size) for bits in pair
            ]
            candidate = quantized_vocabulary(body, *specs)
            divergence = measure_divergence(logits(), next_token_logits(candidate, work), work)
            sizes = [
                weight.numel() * (16 if spec is None else spec.bits_per_weight(weight.shape[1])) / 8
                for weight, spec in zip((head, embedding), specs, strict=True)
            ]
            case: dict[str, str | int | float | bool] = {
                "model": "neuqi-demo" if options.model is None else folder.name,
                "tied": tied,
                "blocks": block_bits,
                "head": pair[0],
                "embedding": pair[1],
                "group": options.group_size,
                "bytes": int(sizes[0] if tied else sum(sizes)),
                "top-1 agreement": round(divergence.top1_agreement, 4),
            }
            records.append(Record(case, "kl_divergence", divergence.mean_nats, "nats"))
            print(records[-1], flush=True)
    stem = "vocabulary" if options.model is None else f"vocabulary-{folder.name}"
    report(stem, records, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
