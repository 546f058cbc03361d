"""A model folder to evaluate: packed by this project, or any other that transformers loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.source import open_source
from neuqi_serve.format.writer import is_packed_folder
from neuqi_serve.pipeline.summary import summarize


@dataclass(frozen=True)
class EvaluatedModel:
    """``nbytes``: of all tensors. ``bits_per_weight``: of the quantized layers, or of all weights if there are none.

    ``average_bits``: 8·bytes by weights, over the whole model. ``settings``: bits and group size of a packed one.
    """

    path: Path
    packed: bool
    nbytes: int
    bits_per_weight: float
    average_bits: float
    settings: dict[str, Any] | None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    def load(self, dtype: torch.dtype | str = "auto", device: str = "cpu") -> Any:
        """Load it through transformers, in evaluation mode."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        import neuqi_serve.hf  # noqa: F401  (tells transformers about packed folders)

        # A bar for each of three models would hide the one that matters.
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype)
        finally:
            if bars:
                logging.enable_progress_bar()
        return model.to(device).eval()

    def tokenizer(self) -> Any:
        """Load its tokenizer.

        Raises:
            UnsupportedModelError: there is none in the folder.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(
                f"expected a tokenizer in {self.path}, got none that loads ({str(error).splitlines()[0]}). Copy the "
                "tokenizer's files into the folder."
            ) from None


def open_model(path: Path) -> EvaluatedModel:
    """Look at a folder's configuration and headers; no tensor is read.

    Raises:
        UsageError: transformers is not installed, or is older than 5.
        UnsupportedModelError: no model there.
        IntegrityError: a packed folder that is not what its manifest says.
    """
    _require_transformers()
    if is_packed_folder(path):
        checkpoint = open_checkpoint(path)
        checkpoint.validate()
        summary = summarize(checkpoint.manifest)
        settings = {key: checkpoint.recipe.to_dict()[key] for key in ("bits", "group_size", "scale_dtype")}
        elements = sum(
            spec.nbytes * 8 // _bits(spec.dtype)
            for name, spec in checkpoint.expected_tensors().items()
            if not name.endswith((".qweight", ".scale", ".zero"))
        )
        elements += sum(
            rows * columns for rows, columns in (m.shape for m in checkpoint.manifest.modules.values())
        )
        bits = summary.total.bits_per_weight
        return EvaluatedModel(
            path, True, summary.packed_bytes, bits, 8 * summary.packed_bytes / elements, settings
        )
    source = open_source(path)
    nbytes = sum(stored.spec.nbytes for stored in source.tensors.values())
    elements = sum(stored.spec.nbytes * 8 // _bits(stored.spec.dtype) for stored in source.tensors.values())
    bits = 8 * nbytes / elements
    return EvaluatedModel(path, False, nbytes, bits, bits, None)


def _bits(dtype: str) -> int:
    from neuqi_serve.format.safetensors_file import ELEMENT_BYTES

    return 8 * ELEMENT_BYTES[dtype]


def _require_transformers() -> None:
    try:
        import transformers
    except ImportError:
        raise UsageError(
            "expected transformers 5 or newer to evaluate a model, it is not installed. Install it: "
            "pip install 'transformers>=5'."
        ) from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise UsageError(
            f"expected transformers 5 or newer to evaluate a model, got {transformers.__version__}. Update it."
        )
