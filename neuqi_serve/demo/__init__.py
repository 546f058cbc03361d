"""The small language model that this project trains itself and ships: a first try needs no network."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from neuqi_serve.errors import UnsupportedModelError

MODEL_NAME = "neuqi-demo"
"""The name under which the demo model is served."""

MAX_LENGTH = 512
"""Longest conversation in tokens, the reply included."""


def model_path() -> Path:
    """The folder of the packaged model (config.json, model.safetensors, tokenizer, card).

    Raises UnsupportedModelError when the package was installed without its data.
    """
    folder = Path(str(resources.files(__name__).joinpath("model")))
    if not (folder / "model.safetensors").is_file():
        raise UnsupportedModelError(
            f"expected the packaged demo model at {folder}, found no model.safetensors; reinstall"
            " neuqi-serve, or train it with: python -m neuqi_serve.demo.train --out FOLDER"
        )
    return folder
