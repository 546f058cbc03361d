"""Importance measured here: the mean square of every input of the linear layers, on a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from neuqi_serve.config import UNQUANTIZED_BITS, WHOLE_ROW, VocabularyBits, WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.importance import write_sidecar
from neuqi_serve.format.source import open_source
from neuqi_serve.pipeline.progress import Progress
from neuqi_serve.pipeline.selection import select_modules

DEFAULT_TOKENS = 65536
DEFAULT_WINDOW = 512


def input_squares(
    model: Any,
    layers: Mapping[str, nn.Module],
    windows: Sequence[Tensor],
    done: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Run a model over token ids, one window ``[T]`` at a time; return layer → mean squared input, float32 ``[K]``.

    ``done`` is called with the tokens of each window.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            squares = rows.square().sum(0)
            sums[name] = squares + sums[name] if name in sums else squares
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for window in windows:
                model(input_ids=window.unsqueeze(0).to(model.device), use_cache=False)
                if done is not None:
                    done(len(window))
    finally:
        for handle in hooks:
            handle.remove()
    return {name: (total / counts[name]).float() for name, total in sums.items()}


def measure_importance(
    model_folder: Path,
    text: Path,
    destination: Path,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    stream: TextIO | None = None,
) -> int:
    """Write the sidecar of a model: mean squared inputs over the first ``tokens`` tokens of a text file.

    The model runs in its own dtype through transformers. Returns the number of tokens that were there.

    Raises:
        UsageError: no such text, or one without two tokens; a number below 1.
        UnsupportedModelError: no model there, or one that cannot be packed.
    """
    if tokens < 2 or window < 2:
        raise UsageError(f"expected at least 2 tokens in all and in a window, got {tokens} and {window}.")
    if not text.is_file():
        raise UsageError(f"expected a text file, got {text}. Check the path.")
    # Output head and embedding are packed without an importance.
    whole_rows = WeightSpec(group_size=WHOLE_ROW)
    selection = select_modules(
        open_source(model_folder), whole_rows, VocabularyBits(UNQUANTIZED_BITS, UNQUANTIZED_BITS)
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    # A token is a few characters long: most of a long file need not be tokenized.
    ids = tokenizer.encode(text.read_text(encoding="utf-8", errors="replace")[: 16 * tokens])[:tokens]
    windows = [torch.tensor(ids[i : i + window]) for i in range(0, len(ids), window)]
    windows = [part for part in windows if len(part) > 1]
    if not windows:
        raise UsageError(
            f"expected a text of at least 2 tokens, got {len(ids)} in {text}. Give a longer one."
        )
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    layers = _layers(model, selection.modules)
    progress = Progress(sum(map(len, windows)), "tokens", stream) if stream is not None else None
    try:
        means = input_squares(
            model, layers, windows, None if progress is None else lambda n: progress.advance(n, text.name)
        )
    finally:
        if progress is not None:
            progress.close()
    count = sum(map(len, windows))
    described = {"statistic": "mean of squared inputs", "model": model_folder.resolve().name}
    described |= {"text": text.name, "tokens": str(count)}
    write_sidecar(destination, means, described)
    return count


def _layers(model: nn.Module, names: Mapping[str, object]) -> dict[str, nn.Module]:
    """The model's layers by their names in the checkpoint, which may lack the prefix of the base model."""
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in names:
        layer = modules.get(name) or modules.get(f"model.{name}") or modules.get(name.removeprefix("model."))
        if layer is None:
            raise UnsupportedModelError(
                f"expected the layer {name} of the checkpoint in {type(model).__name__}, got none of this name. "
                "This architecture cannot be measured; use an importance matrix of llama.cpp."
            )
        found[name] = layer
    return found
