"""Distil a packed folder: the same codes with trained scales, zero-points, norms and biases, in a new folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from neuqi_serve._version import VERSION
from neuqi_serve.distill.losses import LOSSES, make_loss
from neuqi_serve.distill.state import StateFile
from neuqi_serve.distill.student import Student, check_teacher, load_student, load_teacher
from neuqi_serve.distill.training import Trainer, TrainingResult, TrainingSettings
from neuqi_serve.errors import NeuqiError, UsageError
from neuqi_serve.format.manifest import MANIFEST_NAME, Manifest, hash_file
from neuqi_serve.format.reader import PackedCheckpoint, open_checkpoint
from neuqi_serve.format.source import CONFIG_NAME
from neuqi_serve.format.staging import check_destination
from neuqi_serve.format.writer import is_packed_folder, write_checkpoint
from neuqi_serve.pipeline.progress import Progress
from neuqi_serve.quality.card import QUALITY_NAME, README_NAME, without_card
from neuqi_serve.quality.text import read_windows

# Of the three it ends with the smallest KL divergence at equal tokens.
DEFAULT_LOSS = "logits"
DEFAULT_SAMPLES = 272
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class DistillationSettings:
    """``loss``: one of ``losses.LOSSES``. ``samples``: most windows of ``context`` tokens; None is the model's context,
    at most 2048. ``device``: ``cpu`` or ``cuda``. ``dtype``: in which both models compute; None is bfloat16 on a GPU
    and float32 on a CPU. ``restart``: begin anew where an interrupted run has left its state.

    Raises:
        UsageError: an unknown loss, dtype or device, or a number out of range.
    """

    training: TrainingSettings = field(default_factory=TrainingSettings)
    loss: str = DEFAULT_LOSS
    samples: int = DEFAULT_SAMPLES
    context: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    overwrite: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UsageError(f"expected a loss among {LOSSES}, got {self.loss!r}. Try {DEFAULT_LOSS!r}.")
        if self.dtype not in (None, *DTYPES):
            raise UsageError(f"expected a dtype among {DTYPES}, got {self.dtype!r}. Leave it out.")
        if self.samples < 2 or (self.context is not None and self.context < 2):
            raise UsageError(
                f"expected at least 2 samples of at least 2 tokens, got {self.samples} of {self.context}."
            )
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"expected a device of this machine, got {self.device!r}. Use --device cpu.")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the products."""
        default = "bfloat16" if torch.device(self.device).type == "cuda" else "float32"
        return torch.bfloat16 if (self.dtype or default) == "bfloat16" else torch.float32


@dataclass(frozen=True)
class Distillation:
    """What a run did; ``seconds`` of this process."""

    result: TrainingResult
    loss: str
    trained: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"loss": self.loss, "trained_parameters": self.trained, **self.result.to_dict(),
                "seconds": round(self.seconds, 3)}  # fmt: skip


def distill_checkpoint(
    packed: Path,
    teacher: Path,
    text: Path,
    output: Path,
    settings: DistillationSettings,
    stream: TextIO | None = None,
) -> Distillation:
    """Train the continuous parameters of the packed folder ``packed`` on a text and write the folder ``output``.

    Memory holds the teacher, the packed student (its embedding and head as packed), 12 bytes for each scale,
    zero-point, norm weight and bias, the activations of one batch, and one de-quantized part of a layer at a time.
    An interrupted run goes on from its last checkpoint when called again with the same arguments; the result is the
    same, bit for bit, on the same machine.

    Raises:
        UsageError: a bad text, a destination that is taken, another model as teacher, a state of other settings.
        UnsupportedModelError: no packed model there, or one that transformers cannot build.
        IntegrityError: a damaged folder or state.
        NeuqiError: the loss is not finite, or does not fall; nothing is written then.
    """
    check_destination(output, settings.overwrite, is_packed_folder)
    windows = windows_of(packed, text, settings)
    return distill_with_tokens(packed, teacher, windows, output, settings, stream)


def distill_with_tokens(
    packed: Path,
    teacher: Path,
    windows: Tensor,
    output: Path,
    settings: DistillationSettings,
    stream: TextIO | None = None,
) -> Distillation:
    """:func:`distill_checkpoint` on token ids int64 ``[S, T]``; every sixteenth window is held out to judge by."""
    started = time.monotonic()
    check_destination(output, settings.overwrite, is_packed_folder)
    checkpoint = open_checkpoint(packed)
    checkpoint.validate()
    state = StateFile(output, _identity(checkpoint, teacher, windows, settings), settings.restart)
    device, dtype = torch.device(settings.device), settings.compute_dtype
    original = load_teacher(teacher, checkpoint, device, dtype)
    student = load_student(checkpoint, device, dtype, with_head=settings.loss == "logits")
    check_teacher(original, student, checkpoint)
    result = _train(student, original, windows.to(device), settings, state, stream)
    if not result.loss_after < result.loss_before:
        raise NeuqiError(
            f"expected a loss below {result.loss_before:.6g} on the windows held out, got {result.loss_after:.6g}: the "
            "run did harm. Nothing was written; give a smaller --learning-rate, or more text."
        )
    described = {"loss": settings.loss, "seed": settings.training.seed, **result.to_dict()}
    write_distilled(checkpoint, student, output, described, settings.overwrite)
    state.discard()
    trained = sum(value.numel() for value in student.parameters().values())
    return Distillation(result, settings.loss, trained, time.monotonic() - started)


def _train(
    student: Student,
    teacher: Any,
    windows: Tensor,
    settings: DistillationSettings,
    state: StateFile,
    stream: TextIO | None,
) -> TrainingResult:
    loss = make_loss(settings.loss, student.model, teacher)
    trainer = Trainer(student.parameters(), loss, windows, settings.training)
    if stream is None:
        return trainer.run(state)
    progress = Progress(trainer.steps, "steps", stream)
    done = 0

    def advance(step: int, value: float) -> None:
        nonlocal done
        progress.advance(step - done, f"loss {value:.4g}")
        done = step

    try:
        return Trainer(student.parameters(), loss, windows, settings.training, advance).run(state)
    finally:
        progress.close()


def write_distilled(
    checkpoint: PackedCheckpoint,
    student: Student,
    output: Path,
    described: Mapping[str, Any],
    overwrite: bool = False,
) -> Manifest:
    """Write the packed folder with what the student has learnt; everything else is copied, byte for byte.

    ``described``: what the manifest says about the run. Quality figures of the folder before do not go along.

    Raises:
        UsageError: the destination is taken.
    """
    manifest, changed = checkpoint.manifest, student.stored()
    _check_stored(changed)
    with write_checkpoint(output, checkpoint.expected_tensors(), overwrite=overwrite) as writer:
        for name, place in checkpoint.stored.items():
            if name in changed:
                writer.write(name, changed[name])
            else:
                writer.copy(name, place)
        for name in manifest.files:
            if name == README_NAME:
                text = (checkpoint.path / name).read_text(encoding="utf-8")
                writer.write_file(name, without_card(text).encode())
            elif name not in (CONFIG_NAME, MANIFEST_NAME, QUALITY_NAME) and not _holds_weights(name):
                writer.copy_file(checkpoint.path / name)
        # The distance from the original's weights is no longer what is made small.
        modules = {
            name: replace(module, relative_error=None) if name in student.linears else module
            for name, module in manifest.modules.items()
        }
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        return writer.finish(
            config,
            checkpoint.recipe,
            modules,
            source=manifest.source,
            quantization={**manifest.quantization, "distillation": dict(described)},
        )


def _check_stored(changed: Mapping[str, Tensor]) -> None:
    for name, value in changed.items():
        if not bool(value.isfinite().all()):
            raise NeuqiError(f"expected finite values in {name}, got others. Give a smaller --learning-rate.")


def _holds_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def windows_of(packed: Path, text: Path, settings: DistillationSettings) -> Tensor:
    """Token ids int64 ``[S, context]`` of a text file, with the tokenizer of a packed folder.

    Raises:
        UsageError: no text, or one that is shorter than two windows.
    """
    from transformers import AutoTokenizer

    config = open_checkpoint(packed).config
    context = settings.context or min(2048, int(config.get("max_position_embeddings") or 2048))
    tokenizer = AutoTokenizer.from_pretrained(packed)
    found = read_windows([text], tokenizer, context, settings.samples * context)
    rows = [window.tokens for window in found if len(window.tokens) == context]
    if len(rows) < 2:
        raise UsageError(
            f"expected at least {2 * context} tokens in {text}, two windows of {context}, got {len(rows)} of them. "
            "Give a longer text, or a smaller --context."
        )
    return torch.tensor(rows)


def _identity(
    checkpoint: PackedCheckpoint, teacher: Path, windows: Tensor, settings: DistillationSettings
) -> dict[str, Any]:
    """Everything that decides the result."""
    training = asdict(settings.training)
    del training["checkpoint_every"]
    return {
        "packed": hash_file(checkpoint.path / MANIFEST_NAME).sha256,
        "teacher": {file.name: file.stat().st_size for file in sorted(teacher.glob("*.safetensors"))},
        "windows": sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
        "training": training,
        "loss": settings.loss,
        "dtype": str(settings.compute_dtype),
        "device": torch.device(settings.device).type,
        "version": VERSION,
    }
