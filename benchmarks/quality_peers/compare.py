"""NeUQI against quantizers from their own packages, at equal group sizes: KL divergence, perplexity and stored bytes.

    python benchmarks/quality_peers/compare.py --peers FOLDER [--models DIR --text FILE] [--bits 2 3 4]

``--peers``: a folder with the packages of ``requirements/quality_peers.txt`` (``pip install --no-deps --target``); they
run in processes of their own. ``--work`` keeps what they made, which a later run takes from there. All methods quantize
the linear layers of the blocks whose rows are a multiple of 32; head and embedding stay. Texts to calibrate and distil
on are apart from those that are measured on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import copy

import torch
from harness import RESULTS, Record, merged, table, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neuqi_serve.config import WeightSpec
from neuqi_serve.demo import model_path
from neuqi_serve.distill.training import TrainingSettings
from neuqi_serve.evaluate.quantized_copy import block_linears, quantized_copy
from neuqi_serve.evaluate.teacher_forcing import batches, measure_divergence, next_token_logits
from quality_peers import k_quants
from quality_peers.initialisations import bits_per_weight
from quality_peers.sequential import Recipe, quantize_blocks, rotate
from quality_peers.texts import Texts, demo_texts, story_texts
from quality_peers.trained import distilled

HERE = Path(__file__).resolve().parent
ITERATIONS = 200
LDLQ = "neuqi + ldlq"
# Uniform quantizers that train nothing.
UNTRAINED = ("min-max", "gptq", "hqq", *k_quants.K_QUANTS)
RECIPES = {
    "min-max": Recipe("min-max"),
    "gptq": Recipe("min-max", ldlq=True),
    "neuqi + importance": Recipe(),
    LDLQ: Recipe(ldlq=True),
    "neuqi + refit": Recipe(ldlq=True, refit=True),
    "neuqi + rotation": Recipe(ldlq=True, refit=True, rotate=True),
}


def replaced(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """The model with other weights in some layers."""
    shared: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for name, weight in weights.items():
        twin.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return twin


class Comparison:
    """One model and its texts; ``run`` measures every method at one spec."""

    def __init__(self, folder: Path, name: str, texts: Texts, work: Path, peers: Path | None) -> None:
        from transformers import AutoModelForCausalLM

        self.folder, self.name, self.texts, self.work, self.peers = folder, name, texts, work, peers
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        linears = block_linears(self.model)
        self.kept = [key for key, layer in linears.items() if layer.in_features % 32]
        self.linears = {key: layer for key, layer in linears.items() if key not in self.kept}
        self.batches = batches(texts.evaluation)
        self.logits = list(next_token_logits(self.model, self.batches))
        self.notes: dict[str, str] = {}

    def run(self, spec: WeightSpec) -> list[Record]:
        """Records of all methods at ``spec``."""
        found: dict[str, tuple[float, float, float]] = {}

        def keep(method: str, candidate: Any, bits: float) -> None:
            measured = measure_divergence(
                self.logits, next_token_logits(candidate, self.batches), self.batches
            )
            found[method] = (measured.mean_nats, measured.quantized_perplexity, bits)
            print(
                f"{self.name} {spec.bits} bits g{spec.group_size} {method}: {measured.mean_nats:.5f}",
                flush=True,
            )

        ours = self._mean_bits(lambda columns: spec.bits_per_weight(columns))
        keep("neuqi", quantized_copy(self.model, spec).model, ours)
        for method, recipe in RECIPES.items():
            candidate, stored = quantize_blocks(self.model, self.texts.windows[:128], spec, recipe)
            keep(method, candidate, ours)
            if method == "neuqi + rotation":
                teacher = copy.deepcopy(self.model)
                rotate(teacher)
                settings = TrainingSettings(batch_size=2)
                student, _ = distilled(
                    teacher, candidate, stored, spec, self.texts.windows, "logits", settings
                )
                keep("neuqi + distillation", student, ours)
        self._peers(spec, keep)
        return self._records(spec, found)

    def _peers(self, spec: WeightSpec, keep: Callable[[str, Any, float], None]) -> None:
        reason = k_quants.refusal()
        for kind, bits in k_quants.K_QUANTS.items() if reason is None else ():
            if bits == spec.bits:
                weights = {k: k_quants.quantized(kind, v.weight.detach()) for k, v in self.linears.items()}
                keep(kind, replaced(self.model, weights), k_quants.bits_per_weight(kind))
        if reason is not None:
            self.notes["K-quants"] = reason
        windows = self.work / f"{self.name}.windows"
        save_file({"windows": self.texts.windows}, windows)
        size, layers = str(spec.group_size), ",".join(self.linears)
        integer = self._mean_bits(lambda columns: bits_per_weight("min-max integer", spec, columns))
        for method, script, rest, bits in (
            ("hqq", "hqq_worker.py", [str(spec.bits), size, layers], self._mean_bits(spec.bits_per_weight)),
            ("auto-round", "auto_round_worker.py",
             [str(spec.bits), size, str(ITERATIONS), str(windows), ",".join(self.kept)], integer),
        ):  # fmt: skip
            weights = self._worker(method, script, rest, spec)
            if weights is not None:
                keep(method, replaced(self.model, weights), bits)

    def _worker(
        self, method: str, script: str, rest: Sequence[str], spec: WeightSpec
    ) -> dict[str, Tensor] | None:
        out = self.work / f"{method}-{self.name}-{spec.bits}-{spec.group_size}.safetensors"
        if not out.exists():
            if self.peers is None:
                self.notes[method] = "no folder with its package was given (--peers)"
                return None
            partial = out.with_suffix(".partial")
            done = subprocess.run(
                [sys.executable, str(HERE / script), str(self.folder), str(partial), *rest],
                env={**os.environ, "PYTHONPATH": str(self.peers), "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                self.notes[method] = done.stderr.strip().splitlines()[-1][:200]
                return None
            partial.rename(out)
        weights = load_file(out)
        if set(weights) != set(self.linears):
            self.notes[method] = f"quantized {len(weights)} layers of {len(self.linears)}"
        return weights

    def _mean_bits(self, of: Callable[[int], float]) -> float:
        sizes = {name: layer.weight.numel() for name, layer in self.linears.items()}
        total = sum(of(layer.in_features) * sizes[name] for name, layer in self.linears.items())
        return total / sum(sizes.values())

    def _records(self, spec: WeightSpec, found: Mapping[str, tuple[float, float, float]]) -> list[Record]:
        weights = sum(layer.weight.numel() for layer in self.linears.values())
        best = min((name for name in UNTRAINED if name in found), key=lambda name: found[name][0])
        records = []
        for method, (nats, perplexity, bits) in found.items():
            case: dict[str, str | int | float | bool] = {
                "model": self.name, "bits": spec.bits, "group_size": spec.group_size, "method": method,
            }  # fmt: skip
            ratio = nats / found[best][0]
            records += [
                Record(case, "kld", nats, "nats/token"),
                Record(case, "kld_ratio_best_peer", ratio, "", best, ratio),
                Record(case, "perplexity", perplexity, ""),
                Record(case, "bytes", bits * weights / 8, "B"),
                Record(case, "bits_per_weight", bits, "bit"),
            ]
        return records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, help="folder with the packages hqq and auto-round")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps what the peers made")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo model)")
    parser.add_argument("--text", type=Path, help="JSON list of texts for --model")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=256, help="windows of 256 tokens to calibrate on")
    parser.add_argument("--count", type=int, default=250, help="texts, or tasks, to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer

    folder = options.model or Path(model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if options.model is None:
        name, texts = "neuqi-demo", demo_texts(tokenizer, options.windows, options.count)
    else:
        name, texts = folder.name, story_texts(options.text, tokenizer, options.windows, options.count)
    comparison = Comparison(folder, name, texts, options.work, options.peers)
    records = [
        record for bits in options.bits for record in comparison.run(WeightSpec(bits, options.group_size))
    ]
    print(table([record for record in records if record.metric == "kld_ratio_best_peer"]))
    stem = f"quality_peers-{name}"
    notes = {"text": texts.source, "calibration_tokens": texts.windows.numel(), **comparison.notes}
    print(f"written to {write(stem, merged(records, options.out / f'{stem}.json'), options.out, notes)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
