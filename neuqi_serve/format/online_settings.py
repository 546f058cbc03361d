"""Settings for quantizing while loading come from several places; one rule says which holds.

What is given with the start (options of ``neuqi serve``, ``--quantization-config``, ``--hf-overrides``,
``--additional-config``) completes each other, and two different values for one key are an error; all of it goes before
the environment, and the environment before the defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from neuqi_serve.errors import UsageError

ADDITIONAL_CONFIG_KEY = "neuqi"
HF_OVERRIDES = "--hf-overrides"
ADDITIONAL_CONFIG = "--additional-config"
QUANTIZATION_CONFIG = "--quantization-config"


def merge_settings(sources: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the settings of all sources, each a pair of its name and its settings.

    Raises:
        UsageError: two sources give different values for one key.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for where, settings in sources:
        for key, value in settings.items():
            if key in merged and merged[key] != value:
                raise UsageError(
                    f"expected one {key}, got {merged[key]} from {origin[key]} and {value} from {where}. "
                    "Remove one of them."
                )
            merged[key] = value
            origin.setdefault(key, where)
    return merged


def settings_object(value: Any, where: str) -> dict[str, Any]:
    """Return ``value`` as settings; None means none.

    Raises:
        UsageError: it is no object, or names another method.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"expected an object of settings in {where}, got {value!r}. Correct it.")
    method = value.get("quant_method", "neuqi")
    if method != "neuqi":
        raise UsageError(
            f'expected quant_method "neuqi" in {where}, got {method!r}. Remove it, or add --no-quantize.'
        )
    return dict(value)
