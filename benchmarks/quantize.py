"""How close the presets come to the paper's search, how far Min-Max is from it, and what a weight costs.

``python benchmarks/quantize.py`` compares losses under the stored scale and zero-point, group by group, on Gaussian and
heavy-tailed weights, weights with outliers, and the weights of real models, with and without importance that leaves
few weights that count; and it times the presets and the reference in alternation on the same cores. ``--model DIR``
adds a checkpoint folder, ``--part loss`` or ``--part speed`` does one half, ``--bits`` and ``--groups`` a part of it
(results of earlier parts stay in the file), ``--quick`` takes few groups.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from harness import Record, report, time_alternating
from safetensors import safe_open
from torch import Tensor

from neuqi_kernels.cpu.quantize import instruction_set
from neuqi_serve.config import WHOLE_ROW, WeightSpec
from neuqi_serve.quant.objective import weighted_loss
from neuqi_serve.quant.quantize import quantize_weight

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "neuqi_serve" / "demo" / "model"
BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128, WHOLE_ROW)
ROW = 2048
FREEDOM = 4.0
OUTLIER_SHARE, OUTLIER_SIZE = 0.01, 10.0
# Uniform random numbers to this power: a fifth of the weights carry nearly all importance.
SPIKINESS = 8
PRESETS = ("balanced", "fast", "minmax")
TIMED_GROUP = 128


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="another folder with safetensors files"
    )
    parser.add_argument("--elements", type=int, default=1 << 18, help="weights per loss comparison")
    parser.add_argument("--repeats", type=int, default=5, help="timing rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--part", choices=("loss", "speed", "all"), default="all")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUP_SIZES)
    parser.add_argument("--quick", action="store_true", help="few weights and rounds, to see that it runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="quantize", help="name of the result file")
    options = parser.parse_args(arguments)
    elements, repeats = (2 * ROW, 1) if options.quick else (options.elements, options.repeats)
    bits, sizes = (BITS[::2], GROUP_SIZES[1:2]) if options.quick else (options.bits, options.groups)
    torch.set_num_threads(options.threads)
    specs = [WeightSpec(b, g) for g in sizes for b in bits]
    records = []
    if options.part != "speed":
        for kind, weight in _weights([DEMO_MODEL, *options.model], elements):
            for spec in specs:
                if spec.group_size == WHOLE_ROW or weight.shape[1] % spec.group_size == 0:
                    for spiky in (False, True):
                        records += _loss_records(kind, weight, spec, spiky)
    if options.part != "loss":
        for spec in specs:
            for spiky in (False, True) if spec.group_size == TIMED_GROUP else (False,):
                records += _speed_records(spec, elements, repeats, spiky)
    report(options.name, _merged(options.results / f"{options.name}.json", records), options.results)


def _weights(models: list[Path], elements: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = elements // ROW
    gaussian = torch.randn(rows, ROW, generator=generator)
    yield "gaussian", gaussian
    chi = torch.randn((int(FREEDOM), rows, ROW), generator=generator).square().sum(0)
    yield "student-t4", torch.randn(rows, ROW, generator=generator) * (FREEDOM / chi).sqrt()
    outlier = torch.rand(rows, ROW, generator=generator) < OUTLIER_SHARE
    yield "outliers", torch.where(outlier, OUTLIER_SIZE * gaussian, gaussian)
    for model in models:
        if not list(model.glob("*.safetensors")):
            print(f"no safetensors file in {model}: its weights are left out")
            continue
        yield from _real_weights(model, elements)


def _real_weights(model: Path, elements: int) -> Iterator[tuple[str, Tensor]]:
    """Rows from all linear layers of the checkpoint, spread evenly; one matrix per row length."""
    by_length: dict[int, list[Tensor]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.ndim == 2 and "proj" in name and tensor.shape[1] % 32 == 0:
                    by_length.setdefault(tensor.shape[1], []).append(tensor.float())
    name = "demo" if model == DEMO_MODEL else model.name
    for length, tensors in sorted(by_length.items()):
        weight = torch.cat(tensors)
        wanted = max(1, elements // len(by_length) // length)
        yield f"{name} K={length}", weight[:: max(1, len(weight) // wanted)][:wanted]


def _importance(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** SPIKINESS


def _losses(weight: Tensor, spec: WeightSpec, importance: Tensor | None, preset: str) -> Tensor:
    found = quantize_weight(weight, spec, importance, preset)
    groups = weight.reshape(found.scale.numel(), -1)
    mass = None
    if importance is not None:
        mass = importance.view(spec.groups(weight.shape[1]), -1).repeat(len(weight), 1)
    return weighted_loss(groups, mass, found.scale.view(-1), found.zero.view(-1), spec.bits)


def _loss_records(kind: str, weight: Tensor, spec: WeightSpec, spiky: bool) -> list[Record]:
    """Loss ÷ reference loss: mean over the groups, the group that one in a thousand exceeds, the worst."""
    importance = _importance(weight.shape[1]) if spiky else None
    reference = _losses(weight, spec, importance, "reference")
    counted = reference > 0
    records = []
    for preset in PRESETS:
        ratio = _losses(weight, spec, importance, preset)[counted] / reference[counted]
        statistics = {"mean": ratio.mean(), "99.9 %": ratio.quantile(0.999), "max": ratio.max()}
        for statistic, value in list(statistics.items())[: 1 if preset == "minmax" else None]:
            case = {"weights": kind, "bits": spec.bits, "group": spec.group_size, "importance": spiky}
            case |= {"groups": int(counted.sum()), "preset": preset, "over groups": statistic}
            records.append(
                Record(case, "loss_ratio_reference", value.item(), "", "reference preset", value.item())
            )
    return records


def _speed_records(spec: WeightSpec, elements: int, repeats: int, spiky: bool) -> list[Record]:
    """Nanoseconds per weight on one core, and the speedup over the reference on the same cores."""
    weight = torch.randn(max(1, 8 * elements // ROW), ROW, generator=torch.Generator().manual_seed(0))
    weight = weight.to(torch.bfloat16)
    importance = _importance(ROW) if spiky else None
    # The reference costs hundreds of times as much, so it gets fewer weights; all are reported per weight.
    few = weight[: max(1, len(weight) // 32)]
    timings = time_alternating(
        {
            "balanced": lambda: quantize_weight(weight, spec, importance),
            "fast": lambda: quantize_weight(weight, spec, importance, preset="fast"),
            "reference": lambda: quantize_weight(few, spec, importance, preset="reference"),
        },
        repeats,
    )
    threads = torch.get_num_threads()
    records = []
    for preset, timing in timings.items():
        count = few.numel() if preset == "reference" else weight.numel()
        case = {"weights": "gaussian bf16", "bits": spec.bits, "group": spec.group_size, "importance": spiky}
        case |= {
            "threads": threads,
            "preset": preset,
            "runs": "torch" if preset == "reference" else instruction_set() or "torch",
        }
        nanoseconds = timing.median_seconds / count * 1e9 * threads
        records.append(Record(case, "ns_per_weight_core", nanoseconds, "ns"))
        if preset != "reference":
            speedup = timing.ratio_to(timings["reference"]) * count / few.numel()
            records.append(Record(case, "speedup_reference", speedup, "", "reference preset", speedup))
    return records


def _merged(path: Path, records: list[Record]) -> list[Record]:
    """The records of an earlier part of the same run of this benchmark, less those that were taken again."""
    if not path.exists():
        return records
    taken = {(json.dumps(record.case, sort_keys=True), record.metric) for record in records}
    earlier = [Record(**record) for record in json.loads(path.read_text())["records"]]
    kept = [r for r in earlier if (json.dumps(r.case, sort_keys=True), r.metric) not in taken]
    return [record for record in kept if "preset" in record.case] + records


if __name__ == "__main__":
    main()
