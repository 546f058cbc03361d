"""What a start of a 1.1B-parameter model costs: time and peak memory, packed, cached, on the fly and unquantized.

    python benchmarks/load.py [--bits 4] [--repeats 3] [--cold] [--quick] [--folder FOLDER] [--join FILE ...]

A synthetic bf16 Llama (22 layers, hidden 2048, feed-forward 5632, 32 heads, 4 of keys and values, vocabulary 32000; its
weights are random with the spread of trained ones) is written to a temporary folder. Every start is a fresh process,
in turn: ``unquantized`` is vLLM loading the bf16 weights through the same command, ``packed`` a folder packed ahead of
time, ``on the fly`` quantizes while loading and keeps nothing, ``first, cache`` packs into an empty cache and serves
from there, ``second, cache`` finds that entry and verifies it.

``start_seconds``: from the command to the first answer of the API. ``peak_bytes``: the most anonymous memory of all
processes together (weights, work arrays; not the pages of mapped files, which the system can drop; what forked
processes share counts for each). Files come from
the page cache unless ``--cold`` drops them from it before each start. ``extra_bytes``: the peak above what is left at
the end, which is to be compared with the largest tensor. ``--join`` puts the results of several runs together: medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import RESULTS, Record, table, write
from safetensors.torch import save_file
from start import NEUQI, free_port, read_metrics, stop, wait_until_ready

SHARD_LAYERS = 4
SAMPLE_SECONDS = 0.02
# Samples between two looks for new processes.
TREE_SAMPLES = 20
UNQUANTIZED, PACKED, ON_THE_FLY = "unquantized", "packed", "on the fly"
FIRST, SECOND = "first, cache", "second, cache"
# Parameters of the models that the time of quantizing is extrapolated to: those of Llama 3.1.
LARGER = {"8B": 8_030_261_248, "70B": 70_553_706_496}
# Which start each one is compared with.
REFERENCE = {PACKED: UNQUANTIZED, ON_THE_FLY: UNQUANTIZED, FIRST: ON_THE_FLY, SECOND: PACKED}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    layers: int = 22
    hidden: int = 2048
    ffn: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    @property
    def largest_tensor_bytes(self) -> int:
        return 2 * self.hidden * max(self.vocabulary, self.ffn)

    def parameters(self) -> int:
        return sum(tensor.numel() for shard in shards_of(self, meta=True) for tensor in shard.values())


@dataclass
class Start:
    """One start: seconds, bytes, and the phases that the server tells."""

    seconds: float
    peak_bytes: int
    left_bytes: int
    phases: dict[str, float] = field(default_factory=dict)


def shards_of(shape: Shape, meta: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors, a few layers at a time; ``meta``: their shapes only."""
    generator = torch.Generator().manual_seed(1)

    def matrix(rows: int, columns: int, spread: float) -> torch.Tensor:
        if meta:
            return torch.empty(rows, columns, device="meta")
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        for part in weight.split(512):
            part.copy_(torch.randn(part.shape, generator=generator).mul_(spread))
        return weight

    hidden, kv = shape.hidden, shape.kv_heads * shape.hidden // shape.heads
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    residual = 0.02 / (2 * shape.layers) ** 0.5
    yield {
        "model.embed_tokens.weight": matrix(shape.vocabulary, hidden, 0.02),
        "lm_head.weight": matrix(shape.vocabulary, hidden, 0.02),
        "model.norm.weight": ones.clone(),
    }
    for first in range(0, shape.layers, SHARD_LAYERS):
        tensors = {}
        for layer in range(first, min(first + SHARD_LAYERS, shape.layers)):
            block = f"model.layers.{layer}"
            for name, rows, columns, spread in (
                ("self_attn.q_proj", hidden, hidden, 0.02),
                ("self_attn.k_proj", kv, hidden, 0.02),
                ("self_attn.v_proj", kv, hidden, 0.02),
                ("self_attn.o_proj", hidden, hidden, residual),
                ("mlp.gate_proj", shape.ffn, hidden, 0.02),
                ("mlp.up_proj", shape.ffn, hidden, 0.02),
                ("mlp.down_proj", hidden, shape.ffn, residual),
            ):
                tensors[f"{block}.{name}.weight"] = matrix(rows, columns, spread)
            tensors[f"{block}.input_layernorm.weight"] = ones.clone()
            tensors[f"{block}.post_attention_layernorm.weight"] = ones.clone()
        yield tensors


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """Write the model with the tokenizer of the packaged one, whose ids are a part of the vocabulary."""
    from neuqi_serve.demo import model_path

    folder.mkdir(parents=True)
    weight_map = {}
    for number, tensors in enumerate(shards_of(shape)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((Path(model_path()) / "config.json").read_text())
    config |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in Path(model_path()).iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(file, folder)


def processes_of(pid: int) -> list[int]:
    """A process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def anonymous_bytes(pids: list[int]) -> int:
    """Anonymous resident memory; pages that forked processes share count once for each."""
    total = 0
    for one in pids:
        try:
            text = Path(f"/proc/{one}/status").read_text()
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("RssAnon:"))
        total += int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
    return total


class Sampler(threading.Thread):
    """Samples the memory of a process tree until it is told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.ended = pid, 0, threading.Event()

    def run(self) -> None:
        samples = 0
        pids = [self.pid]
        while not self.ended.wait(SAMPLE_SECONDS):
            if samples % TREE_SAMPLES == 0:
                pids = processes_of(self.pid)
            samples += 1
            self.peak = max(self.peak, anonymous_bytes(pids))


def drop_from_page_cache(folders: list[Path]) -> None:
    for folder in folders:
        for path in folder.rglob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def start_once(arguments: list[str], cache: Path) -> Start:
    port = free_port()
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(NEUQI), "serve", *arguments, "--port", str(port), "--served-model-name", "m"],
            env=os.environ | {"NEUQI_CACHE_DIR": str(cache)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        sampler = Sampler(process.pid)
        sampler.start()
        try:
            wait_until_ready(process, port, log)
            answer(port)
            seconds = time.perf_counter() - began
            sampler.ended.set()
            sampler.join()
            # The workers are asked for what they loaded after the start.
            deadline = time.monotonic() + 20
            phases, _ = read_metrics(port)
            while not phases and "--no-quantize" not in arguments and time.monotonic() < deadline:
                time.sleep(0.2)
                phases, _ = read_metrics(port)
            return Start(seconds, sampler.peak, anonymous_bytes(processes_of(process.pid)), phases)
        finally:
            stop(process)


def answer(port: int) -> None:
    body = {"model": "m", "prompt": [5, 17, 300, 42], "max_tokens": 2, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        if json.load(response)["usage"]["completion_tokens"] != 2:
            sys.exit("the server answered without two tokens")


def run_starts(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, list[Start]]:
    packed, cache = folder / "packed", folder / "cache"
    bits = ["--bits", str(options.bits)]
    small = ["--max-model-len", "512", "--max-num-seqs", "4"]
    if not packed.exists():
        subprocess.run([NEUQI, "quantize", model, "-o", packed, *bits], check=True, stdout=subprocess.DEVNULL)
    contenders = {
        UNQUANTIZED: [str(model), "--no-quantize", *small],
        PACKED: [str(packed), *small],
        ON_THE_FLY: [str(model), *bits, "--no-cache", *small],
        FIRST: [str(model), *bits, *small],
        SECOND: [str(model), *bits, *small],
    }
    if options.only:
        contenders = {name: contenders[name] for name in options.only}
    starts: dict[str, list[Start]] = {name: [] for name in contenders}
    for _ in range(options.repeats):
        for name, arguments in contenders.items():
            if name == FIRST:
                shutil.rmtree(cache, ignore_errors=True)
            if options.cold:
                drop_from_page_cache([model, packed, cache])
            starts[name].append(start_once(arguments, cache))
            one = starts[name][-1]
            shown = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in one.phases.items())
            print(f"{name}: {one.seconds:.1f} s, peak {one.peak_bytes / 1e9:.2f} GB, {shown}", flush=True)
    return starts


def records_of(starts: dict[str, list[Start]], options: argparse.Namespace, shape: Shape) -> list[Record]:
    records = []
    for name, runs in starts.items():
        case: dict[str, str | int | float | bool] = {
            "start": name, "bits": options.bits, "parameters": shape.parameters(), "runs": len(runs),
            "files": "cold" if options.cold else "in the page cache",
        }  # fmt: skip
        reference = REFERENCE.get(name)
        for metric, unit, value_of in (
            ("start_seconds", "s", lambda run: run.seconds),
            ("peak_bytes", "bytes", lambda run: run.peak_bytes),
            ("left_bytes", "bytes", lambda run: run.left_bytes),
        ):
            value = statistics.median(value_of(run) for run in runs)
            ratio = None
            if reference in starts:
                ratio = value / statistics.median(value_of(run) for run in starts[reference])
            records.append(Record(case, metric, value, unit, reference if ratio else None, ratio))
        extra = statistics.median(run.peak_bytes - run.left_bytes for run in runs)
        records.append(
            Record(case, "extra_bytes", extra, "bytes", "largest tensor", extra / shape.largest_tensor_bytes)
        )
        records.extend(
            Record(case, f"{phase}_seconds", statistics.median(run.phases[phase] for run in runs), "s")
            for phase in runs[0].phases
        )
    return records


def extrapolated(records: list[Record], shape: Shape) -> list[Record]:
    """Quantizing larger models on these cores, at the seconds per weight of the model that was measured.

    Nothing of that size was run: a stated extrapolation, in proportion to the number of parameters.
    """
    return [
        Record(
            {**record.case, "parameters": parameters, "extrapolated from": shape.parameters()},
            f"quantize_seconds_extrapolated_{name}",
            record.value * parameters / shape.parameters(),
            "s",
        )
        for record in records
        if record.metric == "quantize_seconds" and record.value > 0
        for name, parameters in LARGER.items()
    ]


def joined(files: list[Path]) -> list[Record]:
    """Records of several result files of this script: the medians of the values, and ratios of those."""
    runs = [json.loads(file.read_text())["records"] for file in files]
    values: dict[tuple[str, str], float] = {}
    for records in zip(*runs, strict=True):
        key = (records[0]["case"]["start"], records[0]["metric"])
        values[key] = statistics.median(record["value"] for record in records)
    found = []
    for record in runs[0]:
        start, metric = record["case"]["start"], record["metric"]
        value, ratio = values[start, metric], record["ratio"]
        if ratio is not None:
            divisor = values.get((record["reference"], metric), record["value"] / ratio)
            ratio = value / divisor
        case = {**record["case"], "runs": sum(records[0]["case"]["runs"] for records in runs)}
        found.append(Record(case, metric, value, record["unit"], record["reference"], ratio))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument(
        "--quick", action="store_true", help="a model of 2 layers, once; writes with --out only"
    )
    parser.add_argument("--folder", type=Path, help="keep the model here, and use the one that is there")
    parser.add_argument("--only", nargs="+", choices=[*REFERENCE, UNQUANTIZED], help="these starts only")
    parser.add_argument("--join", type=Path, nargs="+", help="result files to put together, nothing is run")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args()
    shape = Shape(layers=2, hidden=512, ffn=1408, heads=8, vocabulary=2048) if options.quick else Shape()
    if options.quick:
        options.repeats = 1
    if options.join:
        records = joined(options.join)
        print(table(records))
        print(f"written to {write(options.join[0].stem, records, options.out or RESULTS)}")
        return 0
    folder = options.folder or Path(tempfile.mkdtemp())
    try:
        model = folder / "model"
        if not model.exists():
            write_checkpoint(model, shape)
        records = records_of(run_starts(options, model, folder), options, shape)
        records += extrapolated(records, shape)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    print(table(records))
    out = options.out or (None if options.quick or options.only else RESULTS)
    if out is not None:
        print(f"written to {write('load-cold' if options.cold else 'load', records, out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
