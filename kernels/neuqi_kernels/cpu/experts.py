"""The C++ kernel for a whole mixture of experts: only the chosen experts are visited."""

from __future__ import annotations

import torch

from neuqi_kernels.backend import Prepared
from neuqi_kernels.cpu.library import KINDS
from neuqi_kernels.cpu.native import NATIVE, NativeBackend, call_plan
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.spec import GemmSpec

# `Activation` of csrc/layout.h, by vLLM's names.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "swigluoai": 3}
# `kMostRoutes` of csrc/experts.h.
MOST_ROUTES = 64


class NativeExperts:
    """All experts of a layer in one parallel region; the slow twin is ``experts_reference.experts``.

    The prepared ``qweight`` is int32 ``[E, ⌈N/16⌉, words of a tile]``, for each expert as ``cpu_native`` prepares one
    layer; ``scale`` and ``zero`` are empty. A result depends neither on the number of threads nor on the instruction
    set, and not on the other tokens.
    """

    name = "cpu_native"

    def __init__(self, linear: NativeBackend = NATIVE) -> None:
        self._linear = linear

    def refuse(self, spec: ExpertsSpec) -> str | None:
        """Return why such experts cannot run here, or None."""
        if spec.activation not in ACTIVATIONS:
            return f"takes the activations {tuple(ACTIVATIONS)}, not {spec.activation!r}"
        return self._linear.refuse(spec.first) or self._linear.refuse(spec.second)

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Repack into tiles, one expert after the other.

        Raises:
            ValueError: the backend refuses the layer, or the tensors do not have its shapes and dtypes.
        """
        tiles: torch.Tensor | None = None
        empty = torch.empty(0, dtype=spec.scale_dtype)
        for expert, weights in enumerate(zip(qweight, scale, zero, strict=True)):
            prepared, _, _ = self._linear.prepare(*weights, spec)
            if tiles is None:
                tiles = prepared.new_empty(qweight.shape[0], *prepared.shape)
            tiles[expert] = prepared
        if tiles is None:
            raise ValueError("expected at least one expert, got none. Use fewer ranks.")
        return tiles, empty, empty.clone()

    def run(
        self,
        x: torch.Tensor,
        first: Prepared,
        second: Prepared,
        first_bias: torch.Tensor | None,
        second_bias: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        intermediate: int,
        first_bits: int,
        first_group_size: int,
        second_bits: int,
        second_group_size: int,
        activation: str,
    ) -> torch.Tensor:
        """Return ``y [tokens, H]``; the slow twin is ``experts_reference.experts``.

        Raises:
            ValueError: the tensors do not belong together, a dtype is not supported, or memory is short.
            IndexError: an id is not below the number of experts.
        """
        library, isa = self._linear.require()
        tokens, hidden = x.shape
        count, top_k = first[0].shape[0], topk_ids.shape[1]
        scale_dtype = first[1].dtype
        shape, group, kind, scale_kind = call_plan(
            2 * intermediate, hidden, first_bits, first_group_size, x.dtype, scale_dtype
        )
        second_shape, second_group, _, _ = call_plan(
            hidden, intermediate, second_bits, second_group_size, x.dtype, second[1].dtype
        )
        # The library trusts its pointers: a wrong shape must not reach it.
        _check_tiles(first[0], (count, *shape))
        _check_tiles(second[0], (count, *second_shape))
        if (
            topk_ids.shape != (tokens, top_k)
            or topk_weights.shape != topk_ids.shape
            or not 0 < top_k <= MOST_ROUTES
            or second[1].dtype != scale_dtype
            or activation not in ACTIVATIONS
        ):
            raise ValueError(
                f"expected ids and weights [{tokens}, 1 to {MOST_ROUTES}], one dtype of all scales and an activation "
                f"of {tuple(ACTIVATIONS)}; got {list(topk_ids.shape)} and {list(topk_weights.shape)}, {scale_dtype} "
                f"and {second[1].dtype}, {activation!r}. Pass what belongs together."
            )
        bias_kind = _check_biases(first_bias, second_bias, count, 2 * intermediate, hidden)
        x = x.contiguous()
        ids = topk_ids.to(torch.int32).contiguous()
        weights = topk_weights.to(torch.float32).contiguous()
        y = torch.empty_like(x)
        failed = library.neuqi_cpu_experts(
            isa,
            x.data_ptr(),
            first[0].data_ptr(),
            None if first_bias is None else first_bias.data_ptr(),
            second[0].data_ptr(),
            None if second_bias is None else second_bias.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            y.data_ptr(),
            tokens,
            top_k,
            count,
            hidden,
            intermediate,
            first_bits,
            group,
            second_bits,
            second_group,
            kind,
            scale_kind,
            bias_kind,
            ACTIVATIONS[activation],
            torch.get_num_threads(),
        )
        if failed == 2:
            raise IndexError(
                f"expected ids below {count}, got up to {int(ids.max())}. Does the router belong to these experts?"
            )
        if failed:
            raise ValueError(f"expected memory for the activations of {tokens} tokens, got none. Free some.")
        return y


def _check_tiles(tiles: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tiles.shape != shape or not tiles.is_contiguous():
        raise ValueError(
            f"expected experts prepared as contiguous {list(shape)}, got {list(tiles.shape)}. Prepare them with the "
            "same spec."
        )


def _check_biases(
    first: torch.Tensor | None, second: torch.Tensor | None, count: int, rows: int, hidden: int
) -> int:
    given = [(bias, n) for bias, n in ((first, rows), (second, hidden)) if bias is not None]
    for bias, n in given:
        if bias.shape != (count, n) or bias.dtype != given[0][0].dtype or not bias.is_contiguous():
            raise ValueError(
                f"expected biases as contiguous [{count}, {n}] of one dtype, got {bias.dtype} {list(bias.shape)}. "
                "Convert them."
            )
    return KINDS[given[0][0].dtype] if given else 0


NATIVE_EXPERTS = NativeExperts()
