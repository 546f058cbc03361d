"""``config.json["quantization_config"]``: parse, validate, serialise (FORMAT.md, section 2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from neuqi_serve.config import (
    DEFAULT_PRESET,
    DEFAULT_SKIP,
    EMBEDDING,
    LM_HEAD,
    PRESETS,
    UNQUANTIZED_BITS,
    VocabularyBits,
    WeightSpec,
)
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError

QUANT_METHOD = "neuqi"
FORMAT_VERSION = 1
_REQUIRED_KEYS = (
    "quant_method",
    "format_version",
    "bits",
    "group_size",
    "scale_dtype",
    "modules",
    "modules_to_not_convert",
)
_MODULE_KEYS = ("bits", "group_size")
# Settings that say how to quantize while loading, not what a packed checkpoint holds.
_ONLINE_KEYS = ("preset",)
# Shorthands of settings for quantizing while loading; a packed checkpoint names the modules themselves.
_VOCABULARY_KEYS = ("lm_head_bits", "embedding_bits")


# Before a name that is a regular expression. In settings only: a packed checkpoint names its modules.
REGEX_PREFIX = "re:"


def is_name_of(name: str, module: str) -> bool:
    """Whether ``name`` is the module's full name or its trailing components (``gate``, not ``gate_proj``).

    ``re:EXPRESSION`` names the modules in whose full names the regular expression is found.
    """
    if name.startswith(REGEX_PREFIX):
        return re.search(name.removeprefix(REGEX_PREFIX), module) is not None
    return module == name or module.endswith("." + name)


def trailing_names(module: str) -> list[str]:
    """Return the names that :func:`is_name_of` takes for the module, expressions aside: ``a.b.c``, ``b.c``, ``c``."""
    names = [module]
    while "." in names[-1]:
        names.append(names[-1].partition(".")[2])
    return names


@dataclass(frozen=True)
class QuantizationRecipe:
    """Which modules of a checkpoint are quantized, and how.

    ``spec``: the default for linear layers. ``modules``: exceptions by name; an output head or embedding is quantized
    only if it is named here. ``modules_to_not_convert``: names of what stays. A name is a full module name or its
    trailing components (FORMAT.md, section 2); in settings for quantizing while loading it may be ``re:`` and a regular
    expression. ``preset``: how thorough the search is while loading; a packed
    checkpoint does not carry it.
    """

    spec: WeightSpec = field(default_factory=WeightSpec)
    modules: Mapping[str, WeightSpec] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = DEFAULT_SKIP
    preset: str = DEFAULT_PRESET

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "quantization_config") -> QuantizationRecipe:
        """Parse the object of a packed checkpoint; every key of format version 1 must be there and no other.

        Raises:
            UnsupportedModelError: another method.
            IntegrityError: another format version, a missing, unknown or ill-typed key, or a value outside the
                supported set.
        """
        check_format(config, where)
        _check_keys(config, _REQUIRED_KEYS, _REQUIRED_KEYS, where, IntegrityError)
        return _parse(config, where, IntegrityError)

    @classmethod
    def for_online(
        cls,
        settings: Mapping[str, Any],
        where: str = "neuqi settings",
        tied: bool = False,
        architecture: str = "",
    ) -> QuantizationRecipe:
        """Parse settings for quantizing while loading; absent keys take their defaults.

        Beside the keys of a packed checkpoint, ``lm_head_bits`` and ``embedding_bits`` (16, 8 or 4) set the width of
        output head and embedding. ``tied``: the model has one tensor for both. ``architecture``: the model's, where it
        is known; some take no packed vocabulary.

        Raises:
            UsageError: an unknown key, another method, or a value outside the supported set.
        """
        known = (*_REQUIRED_KEYS, *_ONLINE_KEYS, *_VOCABULARY_KEYS)
        _check_keys(settings, (), known, where, UsageError)
        method = settings.get("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise UsageError(
                f'{where}: expected quant_method "{QUANT_METHOD}", got {method!r}. Correct or omit it.'
            )
        preset = settings.get("preset", DEFAULT_PRESET)
        if preset not in PRESETS:
            raise UsageError(
                f"{where}: expected a preset among {PRESETS}, got {preset!r}. Try {DEFAULT_PRESET}."
            )
        vocabulary = VocabularyBits(*(settings.get(key) for key in _VOCABULARY_KEYS)).supported_by(
            architecture
        )
        recipe = replace(_parse(settings, where, UsageError), preset=preset)
        return recipe.with_vocabulary(vocabulary, tied)

    def with_vocabulary(self, bits: VocabularyBits, tied: bool) -> QuantizationRecipe:
        """Return the recipe with output head and embedding at these widths, in groups of the default size.

        What was not given takes its default, unless the recipe names the module already.

        Raises:
            UsageError: two widths given for one tensor (``tied``).
        """
        modules, kept = dict(self.modules), list(self.modules_to_not_convert)
        given = (bits.lm_head, bits.embedding)
        named = [name in kept or name in modules for name in (LM_HEAD, EMBEDDING)]
        widths = bits.resolved(tied)
        if tied and any(named) and given == (None, None):
            # One tensor: what the recipe says of either holds for both.
            speaker = LM_HEAD if named[0] else EMBEDDING
            spec = None if speaker in kept else modules[speaker]
            specs = [spec, spec]
        else:
            specs = [
                None
                if width == UNQUANTIZED_BITS
                else WeightSpec(width, self.spec.group_size, self.spec.scale_dtype)
                for width in widths
            ]
        for name, spec, was_named, option in zip((LM_HEAD, EMBEDDING), specs, named, given, strict=True):
            if was_named and option is None and not tied:
                continue
            modules.pop(name, None)
            kept = [one for one in kept if one != name]
            if spec is None:
                kept.append(name)
            else:
                modules[name] = spec
        return replace(self, modules=modules, modules_to_not_convert=tuple(kept))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of format version 1, keys in the order of FORMAT.md."""
        modules = {
            name: {"bits": spec.bits, "group_size": spec.group_size} for name, spec in self.modules.items()
        }
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": self.spec.bits,
            "group_size": self.spec.group_size,
            "scale_dtype": self.spec.scale_dtype,
            "modules": modules,
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }

    def keeps(self, module: str) -> bool:
        """Whether the module of this full name stays unquantized."""
        return any(is_name_of(name, module) for name in self.modules_to_not_convert)

    def spec_of(self, module: str) -> WeightSpec:
        """Return the spec of the module of this full name: its exception, the first match, or the default."""
        return self.exception_of(module) or self.spec

    def exception_of(self, module: str) -> WeightSpec | None:
        """Return what ``modules`` says of the module of this full name: under this name, or the first match."""
        exact = self.modules.get(module)
        if exact is not None:
            return exact
        # A mixture of experts can name its modules by the ten thousand: no search through all of them.
        places, expressions = self._places
        found = [places[name] for name in trailing_names(module) if name in places]
        found += [places[name] for name in expressions if is_name_of(name, module)]
        return list(self.modules.values())[min(found)] if found else None

    @cached_property
    def _places(self) -> tuple[dict[str, int], list[str]]:
        """Where each name stands in ``modules``, and which names are regular expressions."""
        places = {name: place for place, name in enumerate(self.modules)}
        return places, [name for name in places if name.startswith(REGEX_PREFIX)]

    def vocabulary_spec(self, module: str) -> WeightSpec | None:
        """Return the spec of the output head or embedding of this full name, None if it stays as it is."""
        return None if self.keeps(module) else self.exception_of(module)

    def renamed(
        self,
        rename_list: Callable[[list[str]], list[str]],
        rename_dict: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> QuantizationRecipe:
        """Return the recipe with every name mapped, e.g. by ``apply_list, apply_dict`` of vLLM's mapper."""
        modules: dict[str, WeightSpec] = {}
        for name, spec in self.modules.items():
            # An expression stays as it is, and all in their places: the first match holds.
            modules |= {name: spec} if name.startswith(REGEX_PREFIX) else rename_dict({name: spec})
        kept = [name for name in self.modules_to_not_convert if not name.startswith(REGEX_PREFIX)]
        expressions = [name for name in self.modules_to_not_convert if name.startswith(REGEX_PREFIX)]
        return replace(self, modules=modules, modules_to_not_convert=(*rename_list(kept), *expressions))


def check_format(config: Mapping[str, Any], where: str) -> None:
    """Refuse another ``quant_method`` or an unknown ``format_version``.

    Raises:
        UnsupportedModelError: another method.
        IntegrityError: a format version that this reader does not know.
    """
    method = config.get("quant_method")
    if method != QUANT_METHOD:
        raise UnsupportedModelError(
            f'{where}: expected quant_method "{QUANT_METHOD}", got {method!r}. '
            "Pack the unquantized model with `neuqi quantize`, or load this one with its own method."
        )
    check_format_version(config.get("format_version"), where)


def check_format_version(version: object, where: str) -> None:
    """Refuse a format version other than the known ones.

    Raises:
        IntegrityError: an unknown version.
    """
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise IntegrityError(
            f"{where}: expected format_version {FORMAT_VERSION}, got {version!r}. "
            "Update neuqi-serve to read a newer format, or pack the model again."
        )


def _check_keys(
    config: Mapping[str, Any],
    required: tuple[str, ...],
    known: tuple[str, ...],
    where: str,
    error: type[IntegrityError] | type[UsageError],
) -> None:
    missing = [key for key in required if key not in config]
    if missing:
        raise error(f"{where}: expected the keys {list(required)}, {missing} missing. Pack the model again.")
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise error(f"{where}: expected only the keys {list(known)}, got also {unknown}. Remove them.")


def _parse(
    config: Mapping[str, Any], where: str, error: type[IntegrityError] | type[UsageError]
) -> QuantizationRecipe:
    default = WeightSpec()
    scale_dtype = config.get("scale_dtype", default.scale_dtype)
    spec = _spec(
        config.get("bits", default.bits),
        config.get("group_size", default.group_size),
        scale_dtype,
        where,
        error,
    )
    modules = config.get("modules", {})
    if not isinstance(modules, Mapping):
        raise error(
            f'{where}: expected "modules" to be an object, got {modules!r}. Use {{}} for no exceptions.'
        )
    exceptions = {}
    for name, entry in modules.items():
        place = f"{where}, modules[{name!r}]"
        if not isinstance(entry, Mapping):
            raise error(f"{place}: expected an object with {list(_MODULE_KEYS)}, got {entry!r}. Correct it.")
        _check_name(name, place, error)
        _check_keys(entry, _MODULE_KEYS if error is IntegrityError else (), _MODULE_KEYS, place, error)
        bits, group_size = entry.get("bits", spec.bits), entry.get("group_size", spec.group_size)
        exceptions[name] = _spec(bits, group_size, scale_dtype, place, error)
    kept = config.get("modules_to_not_convert", list(DEFAULT_SKIP))
    if not isinstance(kept, list | tuple) or not all(isinstance(name, str) and name for name in kept):
        raise error(
            f'{where}: expected "modules_to_not_convert" to be a list of names, got {kept!r}. Correct it.'
        )
    for name in kept:
        _check_name(name, f"{where}, modules_to_not_convert", error)
    return QuantizationRecipe(spec, exceptions, tuple(kept))


def _check_name(name: str, where: str, error: type[IntegrityError] | type[UsageError]) -> None:
    if not name.startswith(REGEX_PREFIX):
        return
    if error is IntegrityError:
        raise error(f"{where}: expected names of modules, got the expression {name!r}. Pack the model again.")
    try:
        re.compile(name.removeprefix(REGEX_PREFIX))
    except re.error as cause:
        raise error(
            f"{where}: expected a regular expression after {REGEX_PREFIX!r}, got {name!r}: {cause}. Correct it."
        ) from None


def _spec(
    bits: object,
    group_size: object,
    scale_dtype: object,
    where: str,
    error: type[IntegrityError] | type[UsageError],
) -> WeightSpec:
    for key, value in (("bits", bits), ("group_size", group_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise error(f'{where}: expected "{key}" to be an integer, got {value!r}. Correct it.')
    try:
        return WeightSpec(bits, group_size, scale_dtype)  # type: ignore[arg-type]
    except UsageError as cause:
        raise error(f"{where}: {cause}") from None
