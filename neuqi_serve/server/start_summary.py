"""What a start says before the engine begins."""

from __future__ import annotations

from collections.abc import Sequence

from neuqi_serve.config import EMBEDDING, LM_HEAD, UNQUANTIZED_BITS, WeightSpec
from neuqi_serve.format.quantization_config import is_name_of
from neuqi_serve.server.cached_weights import CachedWeights
from neuqi_serve.server.command_line import OwnOptions
from neuqi_serve.server.machine import Machine
from neuqi_serve.server.served_model import ServedModel


def print_summary(
    machine: Machine,
    model: ServedModel,
    own: OwnOptions,
    chosen: Sequence[str],
    why_spawned: str | None,
    cached: CachedWeights | None,
) -> None:
    """Print what is served, from where, and which options were chosen for this machine and why."""
    lines = [f"neuqi serve {model.name}: {_weights(model, own)}"]
    if cached is not None:
        lines.append(
            f"cache: {cached.detail}" if cached.reason is None else f"cache not used: {cached.reason}"
        )
    if machine.runs_on_cpu:
        lines.append(
            f"chosen for {machine.cores} cores and {machine.available_bytes / (1 << 30):.1f} GiB free:"
        )
    lines += [f"  {line}" for line in chosen]
    if machine.runs_on_cpu and why_spawned:
        lines.append(f"  engine process started anew, which takes longer: {why_spawned}")
    print("\n".join(lines), flush=True)


def _weights(model: ServedModel, own: OwnOptions) -> str:
    if model.kind == "packed" and model.spec is not None:
        stored = vocabulary_width(model, LM_HEAD), vocabulary_width(model, EMBEDDING)
        return f"packed with {_widths(model, model.spec)}{_vocabulary(*stored)}"
    if model.kind == "foreign":
        return f"quantized with {model.method!r}, served by vLLM as it is"
    if not own.quantize:
        return "unquantized"
    spec = own.spec()
    chosen = own.vocabulary().resolved(model.is_tied)
    return f"quantized while it loads to {spec.bits} bits, group size {spec.group_size}{_vocabulary(*chosen)}"


def _widths(model: ServedModel, default: WeightSpec) -> str:
    """Bits and group size of the linear layers, which may have several."""
    named = model.recipe.modules.items() if model.recipe is not None else ()
    specs = {default, *(s for name, s in named if not any(is_name_of(v, name) for v in (LM_HEAD, EMBEDDING)))}
    bits = sorted({spec.bits for spec in specs})
    if len(specs) == 1:
        return f"{default.bits} bits, group size {default.group_size}"
    span = f"{bits[0]} bits" if len(bits) == 1 else f"{bits[0]} to {bits[-1]} bits"
    return f"{span}, a width and group size for each layer"


def _vocabulary(head: int, embedding: int) -> str:
    return f"; output head {head} bits, embedding {embedding} bits"


def vocabulary_width(model: ServedModel, module: str) -> int:
    """Return the bits of the output head or the embedding of a packed model."""
    spec = model.recipe.vocabulary_spec(module) if model.recipe is not None else None
    return UNQUANTIZED_BITS if spec is None else spec.bits
