"""``NeuqiConfig``: what transformers knows about a model quantized with the method ``neuqi``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from neuqi_serve.errors import UsageError
from neuqi_serve.format.importance import Importance, read_importance
from neuqi_serve.format.quantization_config import QUANT_METHOD, QuantizationRecipe

# Says that the settings are those of a packed checkpoint; settings for quantizing while loading have no version.
_PACKED_KEY = "format_version"


class NeuqiConfig(QuantizationConfigMixin):
    """The settings of ``from_pretrained(…, quantization_config=NeuqiConfig(bits=3))``, or those of a packed folder.

    ``bits``: 2, 3, 4 or 8. ``group_size``: 32, 64, 128 or −1 (the whole row). ``lm_head_bits``, ``embedding_bits``: 16
    (as they are), 8 or 4; 8 where vLLM can run it so. ``modules``: exceptions, name → ``{"bits": …, "group_size": …}``.
    ``modules_to_not_convert``: names of what stays. ``preset``: how thorough the search is. ``importance``: a file of
    mean squared inputs. What is left out takes the defaults of ``neuqi quantize``.

    Raises:
        UsageError: a value outside the supported set, an unknown setting, or no such importance file.
        IntegrityError: a damaged importance file.
    """

    def __init__(self, bits: int | None = None, group_size: int | None = None, **settings: Any) -> None:
        given = {"bits": bits, "group_size": group_size, **settings}
        given = {key: value for key, value in given.items() if value is not None}
        self.quant_method = QUANT_METHOD
        self.importance: Importance | None = None
        self.settings: dict[str, Any] = given
        if _PACKED_KEY in given:
            self.recipe = QuantizationRecipe.from_dict(given)
            return
        path = given.pop("importance", None)
        if path is not None:
            if not isinstance(path, str | Path):
                raise UsageError(f"expected importance to be the name of a file, got {path!r}. Correct it.")
            self.importance = read_importance(Path(path))
        self.recipe = QuantizationRecipe.for_online(given, "NeuqiConfig")

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build from ``config.json["quantization_config"]`` or a dictionary of the same settings as the class takes.

        Raises:
            UsageError, IntegrityError: as the class; a packed checkpoint must have exactly the keys of its format.
        """
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of format version 1, as ``config.json`` of a packed folder holds it."""
        return self.recipe.to_dict()

    def __repr__(self) -> str:
        return f"NeuqiConfig(bits={self.recipe.spec.bits}, group_size={self.recipe.spec.group_size})"
