"""A layer of experts as the recipe sees it: the unfused names of its matrices, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.vllm_plugin import compat

# vLLM's activations that have gates and ups in two halves, and no constants of a model's own.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class ExpertLayer:
    """``prefix``: vLLM's name of the layer. ``projections``: vLLM's name of a matrix → the checkpoint's name of it.

    ``first``: spec of gate and up (``w1``, ``w3``). ``second``: of down (``w2``).
    """

    prefix: str
    projections: dict[str, str]
    first: WeightSpec
    second: WeightSpec

    def name(self, shard: str, expert: int) -> str:
        """Return the checkpoint's name of a matrix of an expert (counted over all ranks)."""
        return matrix_name(self.prefix, self.projections, shard, expert)


def matrix_names(layer: Any, prefix: str) -> list[str]:
    """Return the checkpoint's names of all matrices of vLLM's layer, over all ranks."""
    projections = compat.expert_projections(layer)
    experts = range(compat.expert_count(layer))
    return [matrix_name(prefix, projections, shard, e) for e in experts for shard in projections]


def matrix_name(prefix: str, projections: dict[str, str], shard: str, expert: int) -> str:
    """Return the unfused name: ``….experts``, ``w1``, 3 → ``….experts.3.gate_proj``."""
    return f"{prefix}.{expert}.{projections[shard]}"


def expert_layer(layer: Any, prefix: str, recipe: QuantizationRecipe) -> ExpertLayer | None:
    """Return what the recipe says of vLLM's layer, None if its experts stay unquantized.

    Raises:
        UnsupportedModelError: the recipe treats experts of one layer, or gate and up, differently.
    """
    if recipe.keeps(prefix):
        return None
    projections = compat.expert_projections(layer)
    experts = range(compat.expert_count(layer))

    def names(shards: Iterable[str]) -> list[str]:
        return [matrix_name(prefix, projections, shard, e) for e in experts for shard in shards]

    everything = names(projections)
    kept = [name for name in everything if recipe.keeps(name)]
    if len(kept) == len(everything):
        return None
    if kept:
        raise UnsupportedModelError(
            f"expected all or none of the {len(everything)} matrices of the experts {prefix!r} to be left unquantized, "
            f"because vLLM keeps them in one layer; the recipe names {len(kept)} of them, e.g. {kept[0]}. Name all of "
            "them, or none."
        )
    specs = []
    for shards in (("w1", "w3"), ("w2",)):
        found: dict[WeightSpec, str] = {}
        for name in names(shards):
            # What is said of the layer holds for its matrices, unless they are named themselves.
            found.setdefault(recipe.exception_of(name) or recipe.spec_of(prefix), name)
        if len(found) > 1:
            listed = ", ".join(f"{name}: {s.bits} bits g{s.group_size}" for s, name in found.items())
            raise UnsupportedModelError(
                f"expected one width for {' and '.join(projections[s] for s in shards)} of all experts of {prefix!r}, "
                f"which vLLM stacks into one tensor; got {listed}. Quantize them alike."
            )
        specs.append(next(iter(found)))
    return ExpertLayer(prefix, projections, specs[0], specs[1])


def check_layer(layer: Any, experts: ExpertLayer, hidden: int, intermediate: int) -> None:
    """Check that the kernels can run such experts; ``intermediate`` is this rank's slice.

    Raises:
        UnsupportedModelError: what the kernels do not have.
        UsageError: a group size that does not divide the rows of this rank's slice.
    """
    moe = layer.moe_config
    constants = [getattr(layer, name, None) for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")]
    activation = compat.activation_name(layer)
    whole = int(moe.intermediate_size)
    reasons = {
        "biases": bool(moe.has_bias),
        "matrices that a kernel fills up": intermediate * int(moe.tp_size) != whole,
        f"the activation {activation!r} (they have {', '.join(ACTIVATIONS)})": activation not in ACTIVATIONS,
        "an activation with limits": any(constant is not None for constant in constants),
        "several experts of a token that scale its input": bool(
            getattr(layer, "apply_router_weight_on_input", False) and layer.top_k != 1
        ),
    }
    lacking = [what for what, there in reasons.items() if there]
    if lacking:
        hint = ""
        if "matrices that a kernel fills up" in lacking:
            hint = f" ({whole} is not divided evenly by {moe.tp_size} ranks: use another number)"
        raise UnsupportedModelError(
            f"expected experts that the kernels can run, got {', '.join(lacking)} in {experts.prefix!r}{hint}. Leave "
            f'them unquantized: "modules_to_not_convert": ["experts", …], or serve without --quantization neuqi.'
        )
    for spec, k, shard in ((experts.first, hidden, "w1"), (experts.second, intermediate, "w2")):
        _check_groups(spec, experts, k, shard, whole if shard == "w2" else hidden)


def _check_groups(spec: WeightSpec, experts: ExpertLayer, k: int, shard: str, whole: int) -> None:
    try:
        spec.groups(k)
    except UsageError as error:
        hint = ""
        if k != whole:
            hint = (
                f" This is one tensor-parallel slice of {whole}: use fewer ranks, or share whole experts among them "
                "with --enable-expert-parallel."
            )
        raise UsageError(f"experts {experts.name(shard, 0)!r}: {error}{hint}") from error
