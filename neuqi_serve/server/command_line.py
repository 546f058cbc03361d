"""The arguments of ``neuqi serve``: a few of our own, and every flag of ``vllm serve``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from neuqi_serve.budget.budget import Budget, budget_of, parse_bits
from neuqi_serve.config import (
    DEFAULT_EMBEDDING_BITS,
    DEFAULT_LM_HEAD_BITS,
    DEFAULT_PRESET,
    PRESETS,
    SCALE_DTYPES,
    SUPPORTED_BITS,
    SUPPORTED_GROUP_SIZES,
    VOCABULARY_BITS,
    VocabularyBits,
    WeightSpec,
)
from neuqi_serve.format.online_settings import HF_OVERRIDES, merge_settings, settings_object
from neuqi_serve.server.listen_address import ListenAddress
from neuqi_serve.server.operation import Operation, add_operation_options

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DESCRIPTION = """Serve MODEL over vLLM's OpenAI-compatible API. An unquantized model is quantized while it loads; one
packed by `neuqi quantize` is served as it is."""
EPILOG = """Every flag of `vllm serve` works too:
  --help=all             all of them
  --help=Frontend        one section, e.g. host, port, TLS
  --help=max-model-len   one flag

examples:
  neuqi serve demo
  neuqi serve Qwen/Qwen3-0.6B --bits 3 --group-size 64 --port 8080"""

# Our options that are settings for quantizing while loading.
SETTINGS = ("bits", "group_size", "scale_dtype", "preset", "importance", "lm_head_bits", "embedding_bits")
# Options of vLLM that name something the Hugging Face hub may have to give.
_HUB_OPTIONS = (
    "tokenizer",
    "hf-config-path",
    "speculative-config",
    "lora-modules",
    "generation-config",
    "config",
)


@dataclass(frozen=True)
class OwnOptions:
    """Our own options; None where the user gave nothing."""

    bits: int | float | None = None
    group_size: int | None = None
    scale_dtype: str | None = None
    quantize: bool = True
    preset: str | None = None
    importance: Path | None = None
    cache: bool = True
    lm_head_bits: int | None = None
    embedding_bits: int | None = None
    fit: str | None = None

    @classmethod
    def from_namespace(cls, args: argparse.Namespace) -> OwnOptions:
        """Take them from parsed arguments."""
        return cls(
            args.bits,
            args.group_size,
            args.scale_dtype,
            not args.no_quantize,
            args.preset,
            args.importance,
            not args.no_cache,
            args.lm_head_bits,
            args.embedding_bits,
            args.fit,
        )

    def settings(self) -> dict[str, Any]:
        """Return what the user gave, as the settings travel in vLLM's configuration."""
        given = {key: getattr(self, key) for key in SETTINGS if getattr(self, key) is not None}
        if self.importance is not None:
            # The engine may run in another folder.
            given["importance"] = str(self.importance.resolve())
        return given

    def completed_by(self, settings: Mapping[str, Any]) -> OwnOptions:
        """Return these options with ``settings`` (those of the environment) where the user gave nothing."""
        missing = {key: settings[key] for key in SETTINGS if key in settings and getattr(self, key) is None}
        if self.fit is not None:
            missing.pop("bits", None)
        if "importance" in missing:
            missing["importance"] = Path(missing["importance"])
        return replace(self, **missing)

    def spec(self) -> WeightSpec:
        """Return the spec to quantize with, defaults filled in.

        Raises:
            UsageError: a value outside the supported set.
        """
        default = WeightSpec()
        return WeightSpec(
            self.bits if isinstance(self.bits, int) else default.bits,
            default.group_size if self.group_size is None else self.group_size,
            self.scale_dtype or default.scale_dtype,
        )

    def budget(self) -> Budget | None:
        """Return the budget under which layers get widths of their own; None for one width.

        Raises:
            UsageError: ``--bits`` and ``--fit`` both, or a value outside what is possible.
        """
        return budget_of(self.bits, self.fit)

    def vocabulary(self) -> VocabularyBits:
        """Return the widths of output head and embedding that the user gave.

        Raises:
            UsageError: a value outside the supported set.
        """
        return VocabularyBits(self.lm_head_bits, self.embedding_bits)


@dataclass(frozen=True)
class EarlyArguments:
    """What can be read from the command line before vLLM's parser is imported; ``model`` is None if unclear.

    ``options``: the long names of all options given, without dashes.
    """

    model: str | None
    own: OwnOptions
    address: ListenAddress
    revision: str | None
    method: str | None
    headless: bool
    hub_free: bool
    options: frozenset[str] = frozenset()
    operation: Operation = field(default_factory=Operation)


def add_own_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--bits`` and its kin to vLLM's parser or to our own."""
    group = parser.add_argument_group("NeUQI", "Bits and groups of the weights.")
    default = WeightSpec()
    # Values are checked by WeightSpec, whose messages say what to do.
    group.add_argument(
        "--bits",
        type=parse_bits,
        metavar=_choices(SUPPORTED_BITS),
        help=f"bits per weight; a decimal number, e.g. 2.5, gives each layer its own (default: {default.bits})",
    )
    group.add_argument(
        "--fit",
        metavar="SIZE",
        help="the most that all weights may take, e.g. 8GiB: gives each layer its own bits, in place of --bits",
    )
    group.add_argument(
        "--group-size",
        type=int,
        metavar=_choices(SUPPORTED_GROUP_SIZES),
        help=f"weights that share a scale and a zero-point, -1 for the whole row (default: {default.group_size})",
    )
    group.add_argument(
        "--scale-dtype",
        choices=SCALE_DTYPES,
        help=f"storage of scales and zero-points (default: {default.scale_dtype})",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help=f"how thorough the search for scales and zero-points is (default: {DEFAULT_PRESET})",
    )
    group.add_argument(
        "--importance",
        type=Path,
        metavar="FILE",
        help="mean squares of the layers' inputs: an importance matrix of llama.cpp, or what `neuqi importance` wrote",
    )
    group.add_argument(
        "--lm-head-bits",
        type=int,
        metavar=_choices(VOCABULARY_BITS),
        help=f"bits of the output head, 16 leaves it as it is (default: {DEFAULT_LM_HEAD_BITS})",
    )
    group.add_argument(
        "--embedding-bits",
        type=int,
        metavar=_choices(VOCABULARY_BITS),
        help=f"bits of the embedding; a tied one has those of the head (default: {DEFAULT_EMBEDDING_BITS})",
    )
    group.add_argument(
        "--no-quantize", action="store_true", help="serve an unquantized model as it is, e.g. to compare"
    )
    group.add_argument(
        "--no-cache",
        action="store_true",
        help="quantize while loading, and keep nothing for the next start (default: pack once into the cache)",
    )
    add_operation_options(parser)


def own_parser() -> argparse.ArgumentParser:
    """Return the parser of our own options and of those that are checked before vLLM is imported."""
    parser = argparse.ArgumentParser(
        prog="neuqi serve",
        usage="neuqi serve MODEL [--bits 2|3|4|8] [--group-size 128] [any flag of vllm serve]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, name on the Hugging Face hub, or 'demo'"
    )
    add_own_options(parser)
    listen = parser.add_argument_group("address")
    listen.add_argument("--host", default=DEFAULT_HOST, help="address to listen on (default: %(default)s)")
    listen.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port to listen on (default: %(default)s)"
    )
    for option in ("--uds", "--ssl-keyfile", "--revision", "--quantization", "-q"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    parser.add_argument("--headless", action="store_true", help=argparse.SUPPRESS)
    return parser


def read_early(arguments: Sequence[str]) -> EarlyArguments:
    """Read what is needed for the checks before the start. ``MODEL`` counts when it comes first, as it should.

    Raises:
        UsageError: bits, group size or an option of the operation outside the supported set.
    """
    words = [_dashed(word) for word in arguments]
    names = {word.partition("=")[0] for word in words}
    first = words[0] if words and not words[0].startswith("-") else None
    # Elsewhere a word may be the value of a flag that only vLLM's parser knows.
    args, _ = own_parser().parse_known_args(words[1:] if first else words)
    own = OwnOptions.from_namespace(args)
    own.spec()
    own.vocabulary()
    return EarlyArguments(
        model=first,
        own=own,
        address=ListenAddress(args.host, args.port, args.uds, bool(args.ssl_keyfile)),
        revision=args.revision,
        method=args.quantization or args.q,
        headless=args.headless,
        hub_free=not any(f"--{option}" in names for option in _HUB_OPTIONS),
        options=frozenset({"-q": "quantization"}.get(n, n.removeprefix("--")) for n in names if n[:1] == "-"),
        operation=Operation.from_namespace(args),
    )


def merged_overrides(
    given: Any,
    own: OwnOptions,
    others: Sequence[tuple[str, Mapping[str, Any]]] = (),
    environment: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the user's ``--hf-overrides`` with the on-the-fly settings in ``quantization_config``.

    ``others``: name and settings of further sources. They travel here because vLLM's compile-cache key covers it, as it
    does not cover the environment.

    Raises:
        UsageError: a source names another method, or two give different values (``format.online_settings``).
    """
    overrides = dict(given or {})
    settings = merge_settings(
        [
            *((f"--{_option(key)}", {key: value}) for key, value in own.settings().items()),
            (HF_OVERRIDES, settings_object(overrides.get("quantization_config"), HF_OVERRIDES)),
            *others,
        ]
    )
    default = WeightSpec()
    # What is not here is left to the engine: its default depends on whether the model ties head and embedding.
    defaults = {
        "quant_method": "neuqi",
        "bits": default.bits,
        "group_size": default.group_size,
        "scale_dtype": default.scale_dtype,
        "preset": DEFAULT_PRESET,
        "online": True,
    }
    return {**overrides, "quantization_config": {**defaults, **environment, **settings}}


def _option(key: str) -> str:
    return key.replace("_", "-")


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("_", "-") + equals + value


def _choices(values: Sequence[int]) -> str:
    return "|".join(map(str, values))
