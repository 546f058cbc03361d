"""What a model folder holds, against what vLLM was told: before anything is loaded, on every rank alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuqi_serve.config import EMBEDDING, LM_HEAD, UNQUANTIZED_BITS
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.online_settings import ADDITIONAL_CONFIG
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.format.reader import open_checkpoint


def check_folder(
    folder: Path, online: bool, recipe: QuantizationRecipe, architectures: Sequence[str] | None
) -> None:
    """Check the folder of a model; a name on the hub passes, its weights are checked as they arrive.

    ``online``: the weights are to be quantized while they load. ``architectures``: what vLLM will build.

    Raises:
        IntegrityError: a packed folder is not what its manifest says.
        UnsupportedModelError: its ``config.json`` says another architecture than vLLM was told, or it is quantized
            already and is to be quantized while loading, or with another recipe. (Of a ``ValueError``, as
            ``UsageError`` is one, vLLM's configuration would leave the text alone.)
    """
    config = _config(folder)
    if config is None:
        return
    stored = config.get("quantization_config")
    if online:
        if stored is not None:
            method = stored.get("quant_method") if isinstance(stored, dict) else stored
            raise UnsupportedModelError(
                f"expected unquantized weights to quantize while loading, got {folder}, which is quantized with "
                f"{method!r} already. Leave out the settings of neuqi, or give the original model."
            )
        return
    open_checkpoint(folder).validate()
    if isinstance(stored, dict) and QuantizationRecipe.from_dict(stored) != recipe:
        raise UnsupportedModelError(
            f"expected the bits and groups that {folder} was packed with, got others from --hf-overrides. Leave "
            "quantization_config out of it, or pack the original model anew."
        )
    packed_for = config.get("architectures")
    if packed_for and architectures and list(packed_for) != list(architectures):
        raise UnsupportedModelError(
            f"expected a model packed for {', '.join(architectures)}, got {folder}, packed for "
            f"{', '.join(packed_for)}. Leave architectures out of --hf-overrides, or pack a model of that kind."
        )


def check_packed_settings(
    recipe: QuantizationRecipe, settings: Mapping[str, Any], where: str = ADDITIONAL_CONFIG
) -> None:
    """Hold settings of the user against the recipe of a packed checkpoint, which they cannot change.

    Raises:
        UsageError: a setting that differs from the recipe, or that only quantizing while loading knows.
    """
    stored = recipe.to_dict()
    for key, module in (("lm_head_bits", LM_HEAD), ("embedding_bits", EMBEDDING)):
        spec = recipe.vocabulary_spec(module)
        stored[key] = UNQUANTIZED_BITS if spec is None else spec.bits
    for key, value in settings.items():
        if key not in stored or stored[key] != value:
            raise UsageError(
                f"expected {key} {stored.get(key, 'to be left out')}, as the checkpoint is packed, got {value!r} from "
                f"{where}. Leave it out, or give the original model to quantize it anew."
            )


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None
