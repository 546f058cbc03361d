"""Widths chosen per layer against one width for all, at equal bytes, in KL divergence from the original.

    python benchmarks/mixed_bits.py [--models FOLDER --text TEXTS.json] [--bits 2.25 2.5 3.0 3.5]

The embedded demo model is measured on its held-out questions, the models in FOLDER on TEXTS, a JSON list. For each
model and mean width: the widths that ``neuqi quantize --bits B`` chooses, by the divergence on text that the model
writes itself and by the errors of the weights, each with the vocabulary free and at 8 bits. Against them, within the
same bytes: the best uniform setting there is (bits, group size and widths of the vocabulary all tried, the lowest
divergence taken, with hindsight), and the mixture that looks at nothing, the first blocks at the next width.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import Record, report

from neuqi_serve.budget.budget import Budget
from neuqi_serve.budget.plan import SENSITIVITIES, plan_budget
from neuqi_serve.budget.width_group import bytes_at
from neuqi_serve.config import SUPPORTED_GROUP_SIZES, VocabularyBits, WeightSpec
from neuqi_serve.demo import model_path
from neuqi_serve.demo.tasks import held_out_tasks
from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.kl_divergence import Divergence
from neuqi_serve.evaluate.teacher_forcing import (
    Batch,
    ScoredSequence,
    batches,
    measure_divergence,
    next_token_logits,
)
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.source import open_source
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, plan_tensors, quantize_checkpoint
from neuqi_serve.pipeline.selection import select_modules

VOCABULARY_WIDTHS = (4, 8, 16)
CONTEXT = 256


@dataclass(frozen=True)
class Model:
    """A folder, the group size of its mixtures, and what it is measured on."""

    folder: Path
    group_size: int
    sequences: tuple[ScoredSequence, ...]


class Judge:
    """Measures packed folders against the original, in float32, on the same windows."""

    def __init__(self, model: Model) -> None:
        from transformers import AutoModelForCausalLM

        self._original = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
        self._work: Sequence[Batch] = batches(model.sequences)
        self._logits = [logits.clone() for logits in next_token_logits(self._original, self._work)]

    def divergence(self, folder: Path) -> Divergence:
        """KL divergence of a packed folder, its weights de-quantized: the definition of the kernels."""
        from neuqi_kernels.reference import dequantize

        checkpoint = open_checkpoint(folder)
        shared: dict[int, Any] = {id(p): p for p in (*self._original.parameters(), *self._original.buffers())}
        twin = copy.deepcopy(self._original, shared)
        with torch.no_grad():
            for name, module in checkpoint.manifest.modules.items():
                packed, spec = checkpoint.read_module(name), module.spec
                values = dequantize(packed.qweight, packed.scale, packed.zero, spec.bits, spec.group_size)
                parameter = torch.nn.Parameter(values, requires_grad=False)
                layer = twin.get_submodule(name)
                tied = twin.get_output_embeddings().weight is layer.weight
                layer.weight = parameter
                if tied:
                    twin.get_output_embeddings().weight = parameter
        return measure_divergence(self._logits, next_token_logits(twin, self._work), self._work)


def demo(count: int) -> Model:
    from transformers import AutoTokenizer

    folder = Path(model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = []
    for task in held_out_tasks(count):
        message = [{"role": "user", "content": task.prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer.encode(task.answer, add_special_tokens=False), tokenizer.eos_token_id]
        chats.append(ScoredSequence((*prompt, *answer), len(prompt)))
    return Model(folder, 64, tuple(chats))


def others(folder: Path, text: Path, count: int) -> Iterator[tuple[str, Model]]:
    from transformers import AutoTokenizer

    for path in sorted(one for one in folder.iterdir() if (one / "config.json").is_file()):
        tokenizer = AutoTokenizer.from_pretrained(path)
        # From the end: whoever calibrates on such a file begins at its beginning.
        texts = json.loads(text.read_text(encoding="utf-8"))[-count:]
        windows = (tuple(tokenizer.encode(one)[:CONTEXT]) for one in texts)
        yield path.name, Model(path, 32, tuple(ScoredSequence(ids) for ids in windows if len(ids) > 1))


def packed_bytes(folder: Path) -> int:
    return sum(spec.nbytes for spec in open_checkpoint(folder).expected_tensors().values())


def pack(model: Model, settings: QuantizationSettings, judge: Judge) -> tuple[int, Divergence]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "packed"
        quantize_checkpoint(model.folder, out, settings)
        return packed_bytes(out), judge.divergence(out)


def uniform_settings(model: Model) -> Iterator[tuple[str, QuantizationSettings, int]]:
    """Every uniform setting with its bytes; a vocabulary that is tied has one width."""
    source = open_source(model.folder)
    for bits, group, head, embedding in itertools.product(
        (2, 3, 4), SUPPORTED_GROUP_SIZES, VOCABULARY_WIDTHS, VOCABULARY_WIDTHS
    ):
        vocabulary = VocabularyBits(head, embedding)
        try:
            selection = select_modules(source, WeightSpec(bits, group), vocabulary)
        except UsageError:
            # The group size does not divide the rows, or a tied vocabulary with two widths.
            continue
        nbytes = sum(spec.nbytes for spec in plan_tensors(source, selection).values())
        name = f"{bits} bits g{group}, head {head}, embedding {embedding}"
        yield name, QuantizationSettings(WeightSpec(bits, group), vocabulary=vocabulary), nbytes


def first_blocks(model: Model, limit: int, bits: float) -> QuantizationSettings:
    """The mixture that looks at nothing: the first blocks at the next width, as many as fit."""
    source = open_source(model.folder)
    low, high = int(bits), int(bits) + 1
    narrow, wide = WeightSpec(low, model.group_size), WeightSpec(high, model.group_size)
    selection = select_modules(source, narrow)
    linear = [name for name in selection.modules if selection.recipe.vocabulary_spec(name) is None]
    exceptions: dict[str, WeightSpec] = {}
    for name in linear:
        widened = exceptions | {name: wide}
        chosen = select_modules(source, narrow, None, widened)
        if sum(spec.nbytes for spec in plan_tensors(source, chosen).values()) > limit:
            break
        exceptions = widened
    return QuantizationSettings(narrow, exceptions=exceptions)


def measured(name: str, model: Model, widths: Sequence[float]) -> list[Record]:
    judge = Judge(model)
    source = open_source(model.folder)
    selection = select_modules(source, WeightSpec(2, model.group_size))
    settings = QuantizationSettings(WeightSpec(2, model.group_size))
    uniform = {label: (nbytes, pack(model, one, judge)[1]) for label, one, nbytes in uniform_settings(model)}
    records: list[Record] = []
    for bits in widths:
        limit = bytes_at(source, selection, bits)
        rivals = {label: found for label, found in uniform.items() if found[0] <= limit}
        best = min(rivals, key=lambda label: rivals[label][1].mean_nats)
        eight = {label: rivals[label] for label in rivals if "head 8, embedding 8" in label}
        best_eight = min(eight, key=lambda label: eight[label][1].mean_nats)
        found: dict[str, tuple[int, Divergence]] = {
            "uniform, best with hindsight": rivals[best],
            "uniform, vocabulary 8 bits": eight[best_eight],
            "first blocks wider, vocabulary 8 bits": pack(model, first_blocks(model, limit, bits), judge),
        }
        for sensitivity in SENSITIVITIES:
            for label, asked in (("free", VocabularyBits()), ("8 bits", VocabularyBits(8, 8))):
                wanted = replace(settings, vocabulary=asked)
                plan = plan_budget(model.folder, wanted, Budget(bits=bits), sensitivity)
                found[f"mixed by {sensitivity}, vocabulary {label}"] = pack(model, plan.settings, judge)
        plan = plan_budget(model.folder, settings, Budget(bits=bits), group_sizes=(model.group_size,))
        found[f"mixed by {SENSITIVITIES[0]}, one group size"] = pack(model, plan.settings, judge)
        settings_of = {"uniform, best with hindsight": best, "uniform, vocabulary 8 bits": best_eight}
        records += rows(name, bits, limit, found, settings_of)
    return records


def rows(
    name: str,
    bits: float,
    limit: int,
    found: Mapping[str, tuple[int, Divergence]],
    settings_of: Mapping[str, str],
) -> list[Record]:
    records = []
    for method, (nbytes, divergence) in found.items():
        assert nbytes <= limit, f"{method} takes {nbytes} of {limit} bytes"
        case: dict[str, str | int | float | bool] = {"model": name, "budget_bits": bits, "method": method}
        if method in settings_of:
            case["setting"] = settings_of[method]
        free = not method.endswith("8 bits")
        reference = "uniform, best with hindsight" if free else "uniform, vocabulary 8 bits"
        ratio = None if method == reference else divergence.mean_nats / found[reference][1].mean_nats
        named = None if ratio is None else reference
        records.append(Record(case, "kld", divergence.mean_nats, "nats/token", named, ratio))
        records.append(Record(case, "perplexity", divergence.quantized_perplexity, ""))
        records.append(Record(case, "bytes", nbytes, "B", "budget", nbytes / limit))
        if divergence.standard_error_nats is not None:
            error = divergence.standard_error_nats
            records.append(Record(case, "kld_standard_error", error, "nats/token"))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder of other models, beside the demo model")
    parser.add_argument("--text", type=Path, help="JSON list of texts for those models")
    parser.add_argument("--bits", nargs="+", type=float, default=(2.25, 2.5, 3.0, 3.5))
    parser.add_argument("--count", type=int, default=200, help="sequences to measure on")
    args = parser.parse_args()
    if (args.models is None) != (args.text is None):
        parser.error("--models and --text go together")
    records = measured("demo", demo(args.count), args.bits)
    for name, model in others(args.models, args.text, args.count) if args.models else ():
        records += measured(name, model, args.bits)
    report("mixed_bits", records)


if __name__ == "__main__":
    main()
