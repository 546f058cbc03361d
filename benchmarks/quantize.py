"""How close the fast solver comes to the reference, how far Min-Max is from it, and what a weight costs.

``python benchmarks/quantize.py`` compares losses under the stored scale and zero-point on Gaussian, heavy-tailed and
real weights, and times fast and reference in alternation on the same cores. ``--model DIR`` takes the real weights
from another checkpoint folder than the packaged demo model's, ``--quick`` takes few groups.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Record, report, time_alternating
from safetensors import safe_open
from torch import Tensor

from neuqi_serve.config import WHOLE_ROW, WeightSpec
from neuqi_serve.quant.objective import weighted_loss
from neuqi_serve.quant.quantize import quantize_weight

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "neuqi_serve" / "demo" / "model"
BITS = (2, 3, 4)
GROUP_SIZES = (64, 128, WHOLE_ROW)
ROW = 2048
FREEDOM = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="folder with safetensors files")
    parser.add_argument("--elements", type=int, default=1 << 18, help="weights per loss comparison")
    parser.add_argument("--repeats", type=int, default=5, help="timing rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="few weights and rounds, to see that it runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="quantize", help="name of the result file")
    options = parser.parse_args()
    elements, repeats = (2 * ROW, 1) if options.quick else (options.elements, options.repeats)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bits = BITS[::2] if options.quick else BITS
    sizes = GROUP_SIZES[:1] if options.quick else GROUP_SIZES
    records = []
    for kind, weight in _weights(options.model, elements):
        for spec in (WeightSpec(b, g) for g in sizes for b in bits):
            if spec.group_size == WHOLE_ROW or weight.shape[1] % spec.group_size == 0:
                records += _loss_records(kind, weight, spec)
    for spec in (WeightSpec(b, g) for g in sizes for b in bits):
        records += _speed_records(spec, elements, repeats)
    report(options.name, records, options.results)


def _weights(model: Path, elements: int) -> Iterator[tuple[str, Tensor]]:
    rows = elements // ROW
    yield "gaussian", torch.randn(rows, ROW)
    yield "student-t4", torch.distributions.StudentT(FREEDOM).sample((rows, ROW)).float()
    if not list(model.glob("*.safetensors")):
        print(f"no safetensors file in {model}: real weights are left out")
        return
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
    for length, tensors in sorted(by_length.items()):
        weight = torch.cat(tensors)
        wanted = max(1, elements // len(by_length) // length)
        yield f"{model.name} K={length}", weight[:: max(1, len(weight) // wanted)][:wanted]


def _losses(weight: Tensor, spec: WeightSpec, solver: str) -> Tensor:
    found = quantize_weight(weight, spec, solver=solver)
    groups = weight.reshape(found.scale.numel(), -1)
    return weighted_loss(groups, None, found.scale.view(-1), found.zero.view(-1), spec.bits)


def _loss_records(kind: str, weight: Tensor, spec: WeightSpec) -> list[Record]:
    """Mean over the groups, and worst group, of loss ÷ reference loss."""
    reference = _losses(weight, spec, "reference")
    counted = reference > 0
    records = []
    for solver in ("fast", "minmax"):
        ratio = _losses(weight, spec, solver)[counted] / reference[counted]
        for statistic, value in (("mean", ratio.mean().item()), ("max", ratio.max().item())):
            case = {"weights": kind, "bits": spec.bits, "group": spec.group_size}
            case |= {"groups": int(counted.sum()), "solver": solver, "over groups": statistic}
            records.append(Record(case, "loss_ratio_reference", value, "", "reference solver", value))
    return records


def _speed_records(spec: WeightSpec, elements: int, repeats: int) -> list[Record]:
    weight = torch.randn(max(1, 4 * elements // ROW), ROW)
    # The reference costs hundreds of times as much, so it gets fewer weights; both are reported per weight.
    few = weight[: max(1, len(weight) // 16)]
    timings = time_alternating(
        {
            "fast": lambda: quantize_weight(weight, spec),
            "reference": lambda: quantize_weight(few, spec, solver="reference"),
        },
        repeats,
    )
    fast = timings["fast"].median_seconds / weight.numel()
    slow = timings["reference"].median_seconds / few.numel()
    case = {
        "weights": "gaussian",
        "bits": spec.bits,
        "group": spec.group_size,
        "threads": torch.get_num_threads(),
    }
    speedup = timings["fast"].ratio_to(timings["reference"]) * weight.numel() / few.numel()
    return [
        Record(case | {"solver": "fast"}, "ns_per_weight", fast * 1e9, "ns"),
        Record(case | {"solver": "reference"}, "ns_per_weight", slow * 1e9, "ns"),
        Record(case | {"solver": "fast"}, "speedup_reference", speedup, "", "reference solver", speedup),
    ]


if __name__ == "__main__":
    main()
