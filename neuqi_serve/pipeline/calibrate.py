"""Calibrated quantization, block by block: the model runs over a text, and each layer is rounded for what it reads.

For each block, in order: its weights are loaded; for each of its stages (layers of one input), in the order in which
they run, the inputs are collected from the block as it is by then, earlier stages quantized; the layers of the stage
are quantized under the Hessian of these inputs and take their new weights. The finished block makes the inputs of the
next one. One block is in memory at a time, and a journal keeps what is finished.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from neuqi_serve._version import VERSION
from neuqi_serve.config import ALGORITHM_VERSION, VocabularyBits, WeightSpec
from neuqi_serve.errors import IntegrityError, UsageError
from neuqi_serve.format.source import SourceCheckpoint, open_source
from neuqi_serve.format.staging import check_destination
from neuqi_serve.format.writer import DEFAULT_SHARD_BYTES, is_packed_folder
from neuqi_serve.pipeline.block_calibration import BlockCalibration, States
from neuqi_serve.pipeline.block_model import BlockCall, BlockModel
from neuqi_serve.pipeline.journal import Journal
from neuqi_serve.pipeline.progress import Progress
from neuqi_serve.pipeline.quantize_checkpoint import (
    QuantizationSettings,
    check_apart,
    check_settings,
    write_packed,
)
from neuqi_serve.pipeline.rotated import rotated_source
from neuqi_serve.pipeline.selection import Selection, select_modules
from neuqi_serve.pipeline.summary import CheckpointSummary, summarize
from neuqi_serve.quant.calibrated import RoundingRecipe
from neuqi_serve.quant.quantize import PackedWeight, quantize_packed

# Tokens that run through a block together.
BATCH_TOKENS = 4096
# Of the command line's recipe: rounding, coordinate descent of so many sweeps and refit, so many times.
REFIT_ROUNDS, REFIT_SWEEPS = 3, 4


@dataclass(frozen=True)
class CalibrationRecipe:
    """How a model is quantized with a text.

    ``spec``: bits, group size and storage dtype. ``rounding``: of each matrix. ``correction``: share, 0 to 1, of the
    error of its inputs that each layer makes up for, which needs a second forward pass, of the original model.
    ``rotate``: turn the basis of the hidden states and of the attention's values by random Hadamard matrices first,
    folded into the weights. ``seed``: of the rotation. ``vocabulary``, ``exceptions``, ``budget``: as in
    ``QuantizationSettings``.

    Raises:
        UsageError: a correction outside 0 to 1, a rotation under a budget.
    """

    spec: WeightSpec = field(default_factory=WeightSpec)
    rounding: RoundingRecipe = field(default_factory=RoundingRecipe)
    correction: float = 0.0
    rotate: bool = False
    seed: int = 0
    vocabulary: VocabularyBits | None = None
    exceptions: Mapping[str, WeightSpec] = field(default_factory=dict)
    budget: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.correction <= 1:
            raise UsageError(f"expected a correction from 0 to 1, got {self.correction}.")
        if self.rotate and self.budget is not None:
            raise UsageError(
                "expected a rotation or a budget, got both: a rotation gives a tied output head weights of its own, "
                "which the budget does not know. Leave --rotate out, or give a whole number of --bits."
            )

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says about it, without what it says elsewhere (the spec)."""
        return {
            **asdict(self.rounding),
            "correction": self.correction,
            "rotate": self.rotate,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class CalibrationRun:
    """``summary``: of the packed checkpoint. ``resumed_blocks``: found in the journal. ``peak_bytes``: largest resident
    memory of the process, ``device_bytes``: largest allocated on the GPU, 0 on a CPU.
    """

    summary: CheckpointSummary
    resumed_blocks: int
    peak_bytes: int
    device_bytes: int

    def to_table(self) -> str:
        """Return the summary's table, and below it what the run took."""
        resumed = f", {self.resumed_blocks} blocks of an earlier run" if self.resumed_blocks else ""
        device = f", {self.device_bytes / 2**20:.0f} MiB on the GPU" if self.device_bytes else ""
        memory = f"{self.peak_bytes / 2**20:.0f} MiB of memory at most"
        return f"{self.summary.to_table()}\ncalibrated with {memory}{device}{resumed}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            **self.summary.to_dict(),
            "resumed_blocks": self.resumed_blocks,
            "peak_bytes": self.peak_bytes,
            "device_bytes": self.device_bytes,
        }


def quantize_with_text(
    model_dir: Path,
    output: Path,
    recipe: CalibrationRecipe,
    calibration_tokens: Tensor | Sequence[Tensor],
    *,
    device: str = "cpu",
    overwrite: bool = False,
    restart: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress_stream: TextIO | None = None,
) -> CalibrationRun:
    """Pack the model in ``model_dir`` into the new folder ``output``, calibrated on token ids int64 ``[S, T]``
    or sequences ``[T]`` of different lengths.

    Call it from Python with tokens of your own::

        recipe = CalibrationRecipe(WeightSpec(bits=2, group_size=64))
        run = quantize_with_text(Path("model"), Path("packed"), recipe, tokens)

    An interrupted run goes on where it was when called again with the same arguments; ``restart`` begins anew. The
    result is the same, bit for bit, on the same machine. Memory holds a block in float32 (on a GPU: in the model's
    dtype), the Hessian of an input and the hidden states of all tokens. On a CPU the model runs in float32.

    Raises:
        UsageError: the destination is taken, tokens of another shape or outside the vocabulary, a journal of other
            settings, a group size that does not fit.
        UnsupportedModelError: no model there, one that cannot be packed, built by transformers, or rotated.
        IntegrityError: the source or the journal is damaged.
        DoesNotFitError: the disk is too small.
    """
    started = time.monotonic()
    settings = QuantizationSettings(
        recipe.spec,
        recipe.rounding.preset,
        device,
        overwrite,
        shard_bytes,
        vocabulary=recipe.vocabulary,
        exceptions=recipe.exceptions,
        budget=recipe.budget,
    )
    check_settings(settings)
    check_apart(model_dir, output)
    check_destination(output, overwrite, is_packed_folder)
    source = open_source(model_dir)
    sequences = list(calibration_tokens)
    _check_tokens(sequences, source.config)
    if recipe.rotate:
        source = rotated_source(source, recipe.seed)
    selection = select_modules(source, recipe.spec, recipe.vocabulary, recipe.exceptions)
    journal = Journal(output, _identity(source, recipe, sequences, device), restart)
    try:
        resumed = journal.finished
        count = _Calibration(source, selection, recipe, torch.device(device), journal).run(
            sequences, progress_stream
        )
        pack = _packed_blocks(journal, count, recipe)
        made = {
            "preset": recipe.rounding.preset,
            "importance": "none",
            "calibration": {**recipe.describe(), **_tokens_identity(sequences)},
        }
        manifest = write_packed(source, selection, output, settings, pack, made, progress_stream)
        journal.discard()
    finally:
        journal.close()
    summary = summarize(manifest, selection.unfit, time.monotonic() - started)
    on_gpu = torch.device(device).type == "cuda"
    return CalibrationRun(
        summary,
        resumed,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        torch.cuda.max_memory_allocated(device) if on_gpu else 0,
    )


class _Calibration:
    """The walk over the blocks."""

    def __init__(
        self,
        source: SourceCheckpoint,
        selection: Selection,
        recipe: CalibrationRecipe,
        device: torch.device,
        journal: Journal,
    ) -> None:
        from transformers import AutoConfig

        self._selection, self._recipe, self._journal = selection, recipe, journal
        config = AutoConfig.from_pretrained(source.path)
        dtype = torch.float32
        if device.type == "cuda" and isinstance(config.dtype, torch.dtype):
            dtype = config.dtype
        self._model = BlockModel(config, source, device, dtype)
        self._sizes = [
            sum(
                source.tensors[f"{name}.weight"].spec.nbytes
                for name in selection.modules
                if _inside(name, self._model.names[number], self._model)
            )
            for number in range(len(self._model.names))
        ]

    @torch.no_grad()
    def run(self, sequences: Sequence[Tensor], stream: TextIO | None) -> int:
        """Quantize the blocks that are not finished; return how many there are."""
        names = self._model.names
        first = self._journal.finished
        if first == len(names):
            return first
        hidden, calls = self._model.embed(batches(sequences))
        states = States(hidden, list(hidden) if self._recipe.correction > 0 else None)
        if first:
            states = States.from_tensors(self._journal.states())
        progress = None
        if stream is not None:
            progress = Progress(sum(self._sizes[first:]), "B", stream, steps=len(names) - first, name="block")
        try:
            for number in range(first, len(names)):
                states = self._run_block(number, states, [call[number] for call in calls])
                if progress is not None:
                    progress.advance(self._sizes[number], names[number])
        finally:
            if progress is not None:
                progress.close()
        return len(names)

    def _run_block(self, number: int, states: States, calls: list[BlockCall]) -> States:
        prefix = self._model.names[number]
        with self._model.block(number) as block:
            linears = {
                self._model.checkpoint_name(f"{prefix}.{path}.weight").removesuffix(".weight"): module
                for path, module in block.named_modules()
                if isinstance(module, nn.Linear)
            }
            work = BlockCalibration(
                block,
                linears,
                self._model.experts(number),
                calls,
                self._spec_of,
                self._recipe.rounding,
                self._recipe.correction,
            )
            following = work.run(states)
        packed = {
            f"{name}.{part}": getattr(weight, part)
            for name, weight in work.packed.items()
            for part in ("qweight", "scale", "zero")
        }
        self._journal.save(number, packed, following.to_tensors())
        return following

    def _spec_of(self, module: str) -> WeightSpec | None:
        return self._selection.recipe.spec_of(module) if module in self._selection.modules else None


def _inside(name: str, block: str, model: BlockModel) -> bool:
    """Whether a module of the checkpoint belongs to a block, whose name may have the prefix of the base model."""
    short = block.removeprefix(f"{model.model.base_model_prefix}.")
    return f".{short}." in f".{name}."


def _packed_blocks(journal: Journal, count: int, recipe: CalibrationRecipe) -> Any:
    """What packs a module: the journal's blocks, read one at a time; what is in none is packed from itself alone."""
    places = {}
    for number in range(count):
        places.update({name.rpartition(".")[0]: number for name in journal.names(number)})
    loaded: dict[int, dict[str, Tensor]] = {}

    def pack(module: str, weight: Tensor, spec: WeightSpec) -> PackedWeight:
        number = places.get(module)
        if number is None:
            return quantize_packed(weight, spec, preset=recipe.rounding.preset)
        if number not in loaded:
            loaded.clear()
            loaded[number] = journal.packed(number)
        parts = [loaded[number].get(f"{module}.{part}") for part in ("qweight", "scale", "zero")]
        if any(part is None for part in parts):
            raise IntegrityError(f"expected {module} in the journal's block {number}, got a part of it.")
        return PackedWeight(*(part.to(weight.device) for part in parts if part is not None))

    return pack


def _identity(
    source: SourceCheckpoint, recipe: CalibrationRecipe, sequences: Sequence[Tensor], device: str
) -> dict[str, Any]:
    return {
        "recipe": asdict(recipe),
        "model": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.shards},
        "config": sha256(repr(sorted(source.config.items())).encode()).hexdigest(),
        "calibration": _tokens_identity(sequences),
        "device": torch.device(device).type,
        "version": [VERSION, ALGORITHM_VERSION],
    }


def rounding_recipe(preset: str, rounding: str, refit: bool, magr: float) -> RoundingRecipe:
    """The recipe that these options of the command line stand for; without ``refit`` a matrix is rounded once.

    With feedback and refit, coordinate descent improves the codes as well (``benchmarks/calibration.py``).
    """
    if refit and rounding == "ldlq":
        return RoundingRecipe(preset, rounding, rounds=REFIT_ROUNDS, sweeps=REFIT_SWEEPS, magr=magr)
    return RoundingRecipe(preset, rounding, refit=refit, magr=magr)


def batches(sequences: Sequence[Tensor], most: int = BATCH_TOKENS) -> list[Tensor]:
    """Token ids ``[B, T]`` of about ``most`` tokens: sequences of one length together, the short ones first."""
    by_length: dict[int, list[Tensor]] = {}
    for sequence in sorted(sequences, key=len):
        by_length.setdefault(len(sequence), []).append(sequence)
    return [
        part
        for length, group in by_length.items()
        for part in torch.split(torch.stack(group), max(1, most // length))
    ]


def _tokens_identity(sequences: Sequence[Tensor]) -> dict[str, Any]:
    digest = sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.to(torch.int64).contiguous().numpy().tobytes())
    return {
        "tokens_sha256": digest.hexdigest(),
        "sequences": len(sequences),
        "tokens": sum(map(len, sequences)),
    }


def _check_tokens(sequences: Sequence[Tensor], config: Mapping[str, Any]) -> None:
    shapes = {(one.ndim, one.is_floating_point(), len(one) > 1) for one in sequences if one.ndim}
    if shapes != {(1, False, True)}:
        raise UsageError(
            "expected calibration tokens int64 [S, T], or sequences [T], of at least 2 tokens each, got "
            f"{len(sequences)} sequences that are not all so."
        )
    vocabulary, most = config.get("vocab_size"), config.get("max_position_embeddings")
    low, high = min(int(one.min()) for one in sequences), max(int(one.max()) for one in sequences)
    if isinstance(vocabulary, int) and (low < 0 or high >= vocabulary):
        raise UsageError(
            f"expected token ids from 0 to {vocabulary - 1}, got {low} to {high}. "
            "Tokenize with the tokenizer of this model."
        )
    longest = max(map(len, sequences))
    if isinstance(most, int) and longest > most:
        raise UsageError(
            f"expected windows of at most {most} tokens, the model's context, got {longest}. "
            f"Choose --context {most} or less."
        )
