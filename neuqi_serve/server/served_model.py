"""What ``MODEL`` is, found out before anything heavy starts: a folder or a hub name, packed, unquantized or foreign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.quantization_config import QUANT_METHOD, QuantizationRecipe
from neuqi_serve.pipeline.families import ties_vocabulary

DEMO = "demo"
CONFIG_NAME = "config.json"

Kind = Literal["unquantized", "packed", "foreign"]


@dataclass(frozen=True)
class ServedModel:
    """``name``: as the user gave it. ``reference``: what vLLM gets, a folder or a hub name.

    ``kind``: ``unquantized``, ``packed`` (by neuqi) or ``foreign`` (quantized by ``method``). ``spec``, ``recipe``:
    those of a packed checkpoint. ``weight_bytes``: bytes of the weight files, 0 where unknown (a hub name).
    """

    name: str
    reference: str
    config: Mapping[str, Any]
    kind: Kind
    method: str | None = None
    spec: WeightSpec | None = None
    weight_bytes: int = 0
    recipe: QuantizationRecipe | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the weights lie in a folder of this machine."""
        return Path(self.reference).is_dir()

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the configuration; the whole one for a text-only model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @property
    def is_tied(self) -> bool:
        """Whether the configuration says that output head and embedding are one tensor."""
        return ties_vocabulary(self.text_config)

    @property
    def served_name(self) -> str | None:
        """The name in the API when it should differ from ``reference``."""
        return DEMO if self.name == DEMO else None


def local_folder(name: str) -> Path | None:
    """Return the folder that ``name`` means, whether it exists or not; None for a name on the hub.

    Raises:
        UnsupportedModelError: ``demo`` without the packaged model.
    """
    if name == DEMO and not Path(name).is_dir():
        from neuqi_serve.demo import model_path

        return Path(model_path())
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return Path(name).expanduser()
    return None


def find_model(name: str, revision: str | None = None) -> ServedModel:
    """Look at ``name``: ``demo``, a folder, or a name on the Hugging Face hub (its config.json is fetched).

    Headers and sizes of a packed or unquantized folder are checked, no tensor is read.

    Raises:
        UnsupportedModelError: there is no model of this name.
        IntegrityError: the folder is damaged or incomplete.
    """
    folder = local_folder(name)
    if folder is not None:
        return _from_folder(name, folder)
    return _classify(name, name, find_config(name, revision))


def find_config(name: str, revision: str | None = None) -> Mapping[str, Any]:
    """Return the ``config.json`` of a name on the Hugging Face hub; no weights are fetched.

    Raises:
        UnsupportedModelError: the hub has no such model, or cannot be reached.
    """
    return _read_config(_hub_config(name, revision))


def _from_folder(name: str, folder: Path) -> ServedModel:
    if not folder.is_dir():
        raise UnsupportedModelError(
            f"expected a model folder, got {'a file' if folder.exists() else 'no such folder'}: {folder}. "
            "Give a folder with config.json and safetensors, a name on the Hugging Face hub, or 'demo'."
        )
    model = _classify(name, str(folder), _read_config(folder / CONFIG_NAME))
    # These import torch, so not before the cheap checks have passed.
    from neuqi_serve.format.reader import open_checkpoint
    from neuqi_serve.format.source import open_source

    if model.kind == "packed":
        open_checkpoint(folder).validate()
    elif model.kind == "unquantized":
        open_source(folder)
    return model


def _read_config(path: Path) -> Mapping[str, Any]:
    from neuqi_serve.format.source import read_json_object

    return read_json_object(path, missing=UnsupportedModelError)


def _classify(name: str, reference: str, config: Mapping[str, Any]) -> ServedModel:
    folder = Path(reference)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return ServedModel(name, reference, config, "unquantized", weight_bytes=size)
    method = str(quantization.get("quant_method")) if isinstance(quantization, Mapping) else str(quantization)
    if method != QUANT_METHOD:
        return ServedModel(name, reference, config, "foreign", method=method, weight_bytes=size)
    recipe = QuantizationRecipe.from_dict(quantization, where=f"{reference}/{CONFIG_NAME}")
    return ServedModel(
        name,
        reference,
        config,
        "packed",
        method=method,
        spec=recipe.spec,
        weight_bytes=size,
        recipe=recipe,
    )


def _hub_config(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, CONFIG_NAME, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"expected a model folder or a name on the Hugging Face hub, got {name!r}: there is no such folder, and "
            f"the hub did not give its {CONFIG_NAME} ({type(error).__name__}: {reason}). Check the name, the network "
            "and HF_TOKEN, or try 'demo'."
        ) from None


def check_on_the_fly(model: ServedModel, spec: WeightSpec) -> None:
    """Refuse a spec that cannot be applied to the linear layers of an unquantized model.

    Raises:
        UsageError: the group size divides neither the hidden nor the intermediate size.
    """
    config = model.text_config
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    # Where experts have a size of their own, no layer may have the other.
    wide = "moe_intermediate_size" if config.get("moe_intermediate_size") else "intermediate_size"
    sizes = {key: config.get(key) for key in ("hidden_size", wide, "shared_expert_intermediate_size")}
    if isinstance(heads, int) and isinstance(head_dim, int):
        sizes["num_attention_heads·head_dim"] = heads * head_dim
    for key, size in sizes.items():
        # Rows that are no multiple of 32 stay unquantized, which the load reports.
        if not isinstance(size, int) or size % 32:
            continue
        try:
            spec.groups(size)
        except UsageError as error:
            raise UsageError(f"{model.name}, {key}: {error}") from None
