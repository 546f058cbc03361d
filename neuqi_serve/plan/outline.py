"""The tensors of a checkpoint that is not there: names and shapes from ``config.json``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neuqi_serve.errors import IntegrityError, UnsupportedModelError
from neuqi_serve.format.safetensors_file import DTYPE_CODES, StoredTensor, TensorSpec
from neuqi_serve.format.source import SourceCheckpoint
from neuqi_serve.pipeline.families import family_of

# Published models without a dtype in their configuration are of before bfloat16 became usual; 16 bits either way.
DEFAULT_DTYPE = "bfloat16"
# What transformers holds as one tensor [experts, N, K] lies in checkpoints as one tensor per expert: the names of its
# parts, each an equal share of the rows.
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def outline(config: Mapping[str, Any], path: Path) -> SourceCheckpoint:
    """Return the checkpoint that this configuration describes; its tensors have shapes and dtypes and no data.

    transformers builds the model on the meta device, so no memory is used. ``path`` is only named in errors.

    Raises:
        UnsupportedModelError: an architecture that cannot be packed, or that transformers does not build.
        IntegrityError: a configuration that contradicts itself.
    """
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    family_of(architecture, config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or DEFAULT_DTYPE).removeprefix("torch.")
    if dtype not in DTYPE_CODES:
        raise IntegrityError(f"{path}: expected a dtype like {DEFAULT_DTYPE}, got {dtype!r}. Correct it.")
    tensors = {
        name: StoredTensor(path, TensorSpec(DTYPE_CODES[dtype], shape), 0)
        for name, shape in _parameters(architecture, config, path)
    }
    return SourceCheckpoint(path, config, tensors, ())


def _parameters(
    architecture: str, config: Mapping[str, Any], path: Path
) -> Iterator[tuple[str, tuple[int, ...]]]:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{path}: expected a model_type that transformers knows, got {model_type!r}. Correct it."
        )
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(dict(config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed)
    except Exception as error:  # a class of its own for almost every field that may be wrong
        reason = " ".join(str(error).split())[:200]
        raise IntegrityError(
            f"{path}: expected the configuration of a {architecture}, got one from which transformers cannot build "
            f"it ({type(error).__name__}: {reason}). Correct it, or download it again."
        ) from None
    if type(model).__name__ != architecture:
        raise IntegrityError(
            f"{path}: expected a {architecture} as its architectures say, got model_type {model_type!r}, which is a "
            f"{type(model).__name__}. Correct it."
        )
    for name, parameter in model.named_parameters():
        yield from _as_stored(name, tuple(parameter.shape), architecture)


def _as_stored(name: str, shape: tuple[int, ...], architecture: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    module, _, last = name.rpartition(".")
    mixtral = architecture.startswith("Mixtral")
    if mixtral:
        name, module = (text.replace(".mlp.", ".block_sparse_moe.") for text in (name, f"{module}."))
        module = module.removesuffix(".")
    if len(shape) != 3 or last not in _EXPERT_PARTS:
        yield name, shape
        return
    experts, rows, columns = shape
    parts = _EXPERT_PARTS[last]
    for expert in range(experts):
        for part in parts:
            stored = _MIXTRAL_NAMES[part] if mixtral else part
            yield f"{module}.{expert}.{stored}.weight", (rows // len(parts), columns)
