"""The Triton kernels against the dense bf16 product of torch and the kernels of others, on a GPU.

    python benchmarks/gpu_kernels.py [--minutes 10]

One command; it ends within its minutes. It measures the most important layers first and says at the end, and in the
result, what was left out. Peers (gpu_peers/) take part where they are installed: vLLM for CUDA brings Marlin, Machete,
its two Triton kernels and Humming; ``pip install --no-deps -r requirements/gpu_peers.txt`` brings gemlite.

Every contender is captured in a CUDA graph that calls it on one copy of the layer's weights after the other; the copies
together are several times the L2 cache, as the layers of a model are. The graphs are replayed in turn, so that a
change of the clock meets all alike. Before anything is timed, every contender is held against float64: one that is off
is an error where it is ours, and left out with its error where it is not. A peer that knows integer zero-points only is
held against the layer with rounded zero-points.

Metrics: ``time`` (median, with the 10th and 90th percentile) against the dense product; ``packed_bandwidth``: the bytes
of the weights a second as a share of what copying memory reaches in the same rounds; ``error``: rel-L2 against float64.
Written: ``gpu_kernels.json``, and from it ``gpu_kernels.md`` and ``gpu_kernels.png`` (``--render`` makes these again).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import gpu_report
import torch
from gpu_budget import Budget
from gpu_capture import Captured, capture
from gpu_clocks import read_clocks
from gpu_peers.awq_triton import AWQ_TRITON
from gpu_peers.contender import Contender, Peer, capability
from gpu_peers.dense import DENSE
from gpu_peers.gemlite import GEMLITE
from gpu_peers.humming import HUMMING
from gpu_peers.layer import DTYPE, Case, Layer
from gpu_peers.machete import MACHETE
from gpu_peers.marlin import MARLIN
from gpu_peers.neuqi import NEUQI
from gpu_peers.triton_w4a16 import TRITON_W4A16
from gpu_shapes import SHAPES, TOKENS, blocks, parse_shape
from harness import RESULTS, Record, Timing, report, time_alternating

from neuqi_kernels import dispatch

PEERS: tuple[Peer, ...] = (GEMLITE, HUMMING, MARLIN, MACHETE, TRITON_W4A16, AWQ_TRITON)
OURS = (DENSE.name, NEUQI.name)
NAME = "gpu_kernels"
L2_MULTIPLE = 4
# Replays of all contenders at one number of tokens take about so long; more than 50 tell nothing new.
SLICE_SECONDS = 1.5
MIN_REPEATS, MAX_REPEATS = 11, 50
COPIED_BYTES = 1 << 28

Result = TypeVar("Result")


@dataclass
class Run:
    """What a whole run shares: its time, the bytes that copies fill, the peers, what it found and left out."""

    budget: Budget
    rotated_bytes: int
    peers: Sequence[Peer]
    max_repeats: int = MAX_REPEATS
    records: list[Record] = field(default_factory=list)
    # Peer → why it does not take part → in what.
    absent: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def leave_out(self, peer: str, what: str, why: str) -> None:
        cases = self.absent.setdefault(peer, {}).setdefault(why, [])
        if not cases:
            print(f"{peer} is left out of {what}: {why}", file=sys.stderr)
        cases.append(what)

    def notes(self) -> dict[str, object]:
        major, minor = capability()
        return {
            "architecture": f"sm_{major}{minor}",
            "left out for lack of time": self.budget.left_out,
            "absent": self.absent,
        }


def contenders_of(run: Run, case: Case) -> dict[str, Contender]:
    """Ours, the dense product and the peers that can run the layer."""
    layer = Layer.random(case)
    found: dict[str, Contender] = {}
    for peer in (DENSE, NEUQI, *run.peers):
        own = peer.name in OURS
        refusal = peer.refuse(case) or (None if own else run.budget.setup_spent(peer.name))
        if refusal is not None:
            if own:
                raise SystemExit(f"error: expected {peer.name} to run {case}, it refuses: {refusal}.")
            run.leave_out(peer.name, str(case), refusal)
            continue
        with run.budget.setup(peer.name):
            contender = attempt(
                run, peer.name, case, lambda peer=peer: peer.build(case, layer, run.rotated_bytes)
            )
        if contender is not None:
            found[peer.name] = contender
    return found


def attempt(run: Run, name: str, case: Case, action: Callable[[], Result]) -> Result | None:
    """The result, or None where a peer fails: it may do so in ways of its own, and is then left out by name."""
    try:
        return action()
    except Exception as error:
        if name in OURS:
            raise
        run.leave_out(name, str(case), f"failed: {type(error).__name__}: {error}")
        return None


def captured_of(run: Run, case: Case, found: dict[str, Contender]) -> dict[str, Captured]:
    """The graphs of the contenders whose product is right."""
    device = next(iter(found.values())).layer.codes.device
    generator = torch.Generator(device).manual_seed(case.tokens)
    x = torch.randn(case.tokens, case.k, generator=generator, device=device).to(DTYPE)
    graphs = {}
    for name, contender in found.items():
        spent = None if name in OURS else run.budget.setup_spent(name)
        if spent is not None:
            run.leave_out(name, str(case), spent)
            continue
        with run.budget.setup(name):
            captured = attempt(run, name, case, lambda contender=contender: capture(contender, x))
        if isinstance(captured, str):
            if name in OURS:
                raise SystemExit(f"error: expected a right product of {name} in {case}: {captured}.")
            run.leave_out(name, str(case), captured)
        elif captured is not None:
            graphs[name] = captured
    return graphs


def measure(run: Run, case: Case, found: dict[str, Contender]) -> list[Record]:
    """Time a number of tokens."""
    graphs = captured_of(run, case, found)
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=found[DENSE.name].layer.codes.device)
    target = torch.empty_like(source)
    replays: dict[str, Callable[[], object]] = {name: held.graph.replay for name, held in graphs.items()}
    round_seconds = sum(held.seconds * held.calls for held in graphs.values())
    repeats = min(run.max_repeats, max(MIN_REPEATS, int(SLICE_SECONDS / round_seconds)))
    timings = time_alternating(
        {**replays, "copy": lambda: target.copy_(source)},
        repeats=repeats,
        warmup=3,
        synchronize=torch.cuda.synchronize,
    )
    copied = 2 * COPIED_BYTES / timings["copy"].median_seconds / 1e9
    return records_of(case, found, graphs, timings, copied)


def records_of(
    case: Case,
    found: dict[str, Contender],
    graphs: dict[str, Captured],
    timings: dict[str, Timing],
    copied: float,
) -> list[Record]:
    """``copied``: GB/s that are read and written while copying."""
    records = []
    for name, held in graphs.items():
        fields = case.record(name) | {
            "zeros": "real" if found[name].layer is found[DENSE.name].layer else "integer"
        }
        timing = timings[name]
        ratio = timing.ratio_to(timings[DENSE.name]) * held.calls / graphs[DENSE.name].calls
        low, high = percentiles(timing.runs)
        scale = 1e6 / held.calls
        records.append(Record(fields, "time", timing.median_seconds * scale, "us", DENSE.name, ratio))
        records.append(Record(fields, "time_p10", low * scale, "us"))
        records.append(Record(fields, "time_p90", high * scale, "us"))
        rate = found[name].layer_bytes * held.calls / timing.median_seconds / 1e9
        records.append(Record(fields, "packed_bandwidth", rate, "GB/s", "copying memory", rate / copied))
        records.append(Record(fields, "error", held.error, "rel-L2"))
    return records


def percentiles(runs: Sequence[float]) -> tuple[float, float]:
    """The 10th and the 90th percentile of the runs."""
    if len(runs) < 2:
        return runs[0], runs[0]
    cuts = statistics.quantiles(runs, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def run_block(run: Run, case: Case, tokens: Sequence[int]) -> None:
    """One layer at all numbers of tokens, as far as the time goes."""
    size = case.n * case.k / 1e8
    if not run.budget.fits("layer", size, str(case)):
        return
    with run.budget.spend("layer", size):
        found = contenders_of(run, case)
    for count in tokens:
        at = replace(case, tokens=count)
        if run.budget.fits("measurement", 1, str(at)):
            with run.budget.spend("measurement", 1):
                run.records += measure(run, at, found)
    gpu = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
    for metric, (value, unit) in read_clocks(f"GPU-{gpu}").items():
        run.records.append(Record(case.record("GPU"), metric, value, unit))
    del found
    torch.cuda.empty_cache()


def require_gpu() -> None:
    """Stop with the reason where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "error: expected a CUDA GPU, torch sees none. Run this benchmark on a machine with one."
        )
    refusal = dispatch.refusal("triton", Case(128, 128, 4, 128).spec)
    if refusal:
        raise SystemExit(f"error: expected the triton backend to run, it refuses: {refusal}.")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[128, 64, -1], help="-1: the whole row")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", default=list(SHAPES), help="N x K, as 4096x14336"
    )
    parser.add_argument(
        "--peers", nargs="*", default=[peer.name for peer in PEERS], help="by name; none: no peer"
    )
    parser.add_argument("--quick", action="store_true", help="one small shape, few tokens and repeats")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="make the table and the plot of --out again")
    options = parser.parse_args(arguments)
    unknown = set(options.peers) - {peer.name for peer in PEERS}
    if unknown:
        parser.error(f"expected peers of {[peer.name for peer in PEERS]}, got {sorted(unknown)}")
    if options.quick:
        options.shapes, options.tokens, options.group_sizes = [(512, 1024)], [1, 64], options.group_sizes[:1]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.render:
        return gpu_report.render(options.out / f"{NAME}.json")
    budget = Budget(60 * options.minutes)
    require_gpu()
    rotated_bytes = L2_MULTIPLE * torch.cuda.get_device_properties(0).L2_cache_size
    peers = [peer for peer in PEERS if peer.name in options.peers]
    run = Run(budget, rotated_bytes, peers, MIN_REPEATS if options.quick else MAX_REPEATS)
    try:
        with torch.inference_mode():
            for case in blocks(options.shapes, options.bits, options.group_sizes):
                run_block(run, case, options.tokens)
    finally:
        # A kernel that breaks the GPU's context ends the run; what was measured before it stays.
        if run.records:
            path = report(NAME, run.records, options.out, run.notes())
            gpu_report.render(path)
    for line in gpu_report.shortened(budget.left_out):
        print(f"left out for lack of time: {line}")
    return None


if __name__ == "__main__":
    main()
