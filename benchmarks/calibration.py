"""What each step of the calibrated pipeline is worth: KL divergence from the original, at equal bytes.

    python benchmarks/calibration.py [--models DIR --text FILE] [--bits 2 3 4] [--group-sizes 64] [--methods …]
        [--calibration 128] [--count 200]

Every row is a whole run of ``neuqi quantize --calibrate`` into a packed folder, read back and computed with in float32
after de-quantization; output head and embedding stay as they are, so that the rows differ in the blocks alone. The
ratio is KL divergence over that of ``gptq`` (Min-Max parameters, LDLQ), which stores as many bytes. The demo model is
calibrated on training tasks and measured on the answers to held-out ones; other models are calibrated on the first half
of the texts and measured on the second.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Record, table, write
from importance import CALIBRATION_SEQUENCES, sequences_of
from torch import nn

from neuqi_kernels.reference import dequantize
from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.demo import model_path
from neuqi_serve.evaluate.teacher_forcing import batches, measure_divergence, next_token_logits
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.pipeline.calibrate import CalibrationRecipe, quantize_with_text
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint
from neuqi_serve.quant.calibrated import RoundingRecipe

BASELINE = "gptq"
# Name → recipe, without the spec; None: NeUQI without a text.
METHODS: dict[str, Mapping[str, Any] | None] = {
    "no text": None,
    "gptq": {"rounding": RoundingRecipe("minmax", refit=False)},
    "rtn": {"rounding": RoundingRecipe(rounding="rtn", refit=False)},
    "ldlq": {"rounding": RoundingRecipe(refit=False)},
    "refit": {"rounding": RoundingRecipe()},
    "descent": {"rounding": RoundingRecipe(sweeps=4)},
    "descent r3": {"rounding": RoundingRecipe(sweeps=4, rounds=3)},
    "descent r6": {"rounding": RoundingRecipe(sweeps=4, rounds=6)},
    "magr": {"rounding": RoundingRecipe(sweeps=4, rounds=3, magr=0.05)},
    "correction 0.5": {"rounding": RoundingRecipe(sweeps=4, rounds=3), "correction": 0.5},
    "correction 1": {"rounding": RoundingRecipe(sweeps=4, rounds=3), "correction": 1.0},
    "rotation": {"rounding": RoundingRecipe(sweeps=4, rounds=3), "rotate": True},
    "rotation correction": {
        "rounding": RoundingRecipe(sweeps=4, rounds=3),
        "rotate": True,
        "correction": 1.0,
    },
}


def packed_model(original: Any, folder: Path) -> Any:
    """The original's class with the packed folder's weights, de-quantized."""
    checkpoint = open_checkpoint(folder)
    model = type(original)(original.config).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    state = {
        name: checkpoint.read(name).float()
        for name in checkpoint.expected_tensors()
        if name.rpartition(".")[2] not in ("qweight", "scale", "zero")
    }
    for name, module in checkpoint.manifest.modules.items():
        packed = checkpoint.read_module(name)
        spec = module.spec
        state[f"{name}.weight"] = dequantize(
            packed.qweight, packed.scale, packed.zero, spec.bits, spec.group_size
        )
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, strict=True)
    return model


def measure(
    folder: Path,
    text: Path | None,
    specs: Sequence[WeightSpec],
    methods: Sequence[str],
    count: int,
    calibration_count: int,
    workers: int,
) -> list[Record]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    window = min(256, model.config.max_position_embeddings)
    calibration, evaluation = sequences_of(folder, text, tokenizer, window, count)
    tokens = [torch.tensor(sequence.tokens) for sequence in calibration[:calibration_count]]
    work = batches(evaluation)
    logits = list(next_token_logits(model, work))
    name = "neuqi-demo" if text is None else folder.name
    records: list[Record] = []

    def run(job: tuple[WeightSpec, str]) -> float:
        spec, method = job
        steps, vocabulary = METHODS[method], VocabularyBits(16, 16)
        with tempfile.TemporaryDirectory() as scratch:
            packed = Path(scratch) / "packed"
            if steps is None:
                quantize_checkpoint(folder, packed, QuantizationSettings(spec, vocabulary=vocabulary))
            else:
                quantize_with_text(
                    folder, packed, CalibrationRecipe(spec, vocabulary=vocabulary, **steps), tokens
                )
            candidate = packed_model(model, Path(scratch) / "packed")
        nats = measure_divergence(logits, next_token_logits(candidate, work), work).mean_nats
        print(f"{name} {spec.bits} bits, group {spec.group_size}, {method}: {nats:.4g}", flush=True)
        return nats

    for spec in specs:
        if spec.group_size != -1 and any(n % spec.group_size for n in lengths(model)):
            continue
        with ThreadPoolExecutor(workers) as pool:
            found = dict(zip(methods, pool.map(run, [(spec, method) for method in methods]), strict=True))
        for method, nats in found.items():
            case: dict[str, str | int | float | bool] = {
                "model": name, "bits": spec.bits, "group_size": spec.group_size, "method": method,
                "sequences": len(evaluation), "calibration_tokens": sum(map(len, tokens)),
            }  # fmt: skip
            ratio = nats / found[BASELINE] if BASELINE in found and method != BASELINE else None
            records.append(Record(case, "kl_divergence", nats, "nats/token", ratio and BASELINE, ratio))
        print(table(records[-len(found) :]), flush=True)
    return records


def lengths(model: nn.Module) -> set[int]:
    """Rows of the layers that can be packed."""
    return {
        module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name and module.in_features % 32 == 0
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, help="folder of other models, beside the demo model")
    parser.add_argument("--text", type=Path, help="JSON list of texts for those models")
    parser.add_argument("--no-demo", action="store_true", help="leave the demo model out")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[64, 32, -1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--count", type=int, default=700, help="sequences to measure on")
    parser.add_argument(
        "--calibration", type=int, default=CALIBRATION_SEQUENCES, help="sequences to calibrate on"
    )
    parser.add_argument("--workers", type=int, default=1, help="methods measured at a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.workers))
    specs = [WeightSpec(bits, group) for bits in options.bits for group in options.group_sizes]
    records: list[Record] = []
    models: list[tuple[Path, Path | None]] = []
    if not options.no_demo:
        models.append((model_path(), None))
    models += [
        (folder, options.text) for folder in (sorted(options.models.iterdir()) if options.models else ())
    ]
    for folder, text in models:
        records += measure(
            folder, text, specs, options.methods, options.count, options.calibration, options.workers
        )
    print(table(records))
    print(f"written to {write('calibration', records, options.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
