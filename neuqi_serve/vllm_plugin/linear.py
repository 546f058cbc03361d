"""The two linear methods: weights that arrive packed, and weights that are packed as they arrive."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)

from neuqi_kernels import dispatch, ops
from neuqi_kernels.backend import CompilesWhenRun
from neuqi_kernels.spec import GemmSpec
from neuqi_serve.config import WHOLE_ROW, WeightSpec
from neuqi_serve.errors import IntegrityError
from neuqi_serve.quant.quantize import quantize_packed
from neuqi_serve.vllm_plugin import compat
from neuqi_serve.vllm_plugin.report import LayerRecord

if TYPE_CHECKING:
    from neuqi_serve.vllm_plugin.config import NeuqiConfig

ops.register()

_DONE = "_already_called_process_weights_after_loading"


class NeuqiLinearMethod(LinearMethodBase):
    """What both methods share: the GEMM, the record for the metrics, and the check that every shard arrived."""

    source = ""

    def __init__(self, config: NeuqiConfig, spec: WeightSpec) -> None:
        self.config = config
        self.spec = spec
        self.backend = ""

    def _begin(self, layer: Any, k: int, partitions: list[int], dtype: torch.dtype) -> None:
        self.n, self.k, self.dtype = sum(partitions), k, dtype
        self.expected_shards = len(partitions)
        self.loaded_shards: dict[str, set[Any]] = {}
        self.record = LayerRecord(
            source=self.source,
            spec=self.spec,
            original_bytes=self.n * k * dtype.itemsize,
            created_at=time.perf_counter(),
            role=self.role(layer),
        )
        # Read by vLLM's MLA and LoRA code; a replicated layer does not set it itself.
        layer.input_size_per_partition = k

    def role(self, layer: Any) -> str:
        """Return what the layer is to the reports."""
        return "linear"

    def _noting(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a weight loader so that a shard that never arrives is noticed: vLLM itself loads on silently."""

        @functools.wraps(loader)
        def noting_loader(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            shard = args[0] if args else kwargs.get("loaded_shard_id")
            shards = shard if isinstance(shard, tuple) else (shard,)
            self.loaded_shards.setdefault(name, set()).update(shards)
            return loader(param, loaded_weight, *args, **kwargs)

        return noting_loader

    def _check_arrived(self, layer: Any, names: tuple[str, ...]) -> None:
        self.config.unused_names.warn()
        for name in names:
            shards = self.loaded_shards.get(name, set())
            if None in shards or len(shards) >= self.expected_shards:
                continue
            raise IntegrityError(
                f"expected {self.expected_shards} part(s) of {name!r} for layer {_name(layer)}, the checkpoint "
                f"has {sorted(map(str, shards)) or 'none'}. The checkpoint is incomplete: fetch or write it again."
            )
        self.loaded_shards = {}

    def _install(self, layer: Any, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Repack for the chosen kernel and register plain parameters, whose addresses reload and graphs keep."""
        started = time.perf_counter()
        spec = GemmSpec(
            n=self.n,
            k=self.k,
            bits=self.spec.bits,
            group_size=self.spec.group_size,
            device_type=qweight.device.type,
            dtype=self.dtype,
            scale_dtype=scale.dtype,
        )
        backend = dispatch.choose(spec)
        self.record.packed_bytes = qweight.nbytes
        self.record.scale_zero_bytes = scale.nbytes + zero.nbytes
        prepared = backend.prepare(qweight, scale, zero, spec)
        self.config.sanity.check(
            _name(layer), self.record.role, backend, prepared, (qweight, scale, zero), spec
        )
        for name in ("weight", "qweight", "scale", "zero"):
            if hasattr(layer, name):
                delattr(layer, name)
        for name, tensor in zip(("qweight", "scale", "zero"), prepared, strict=True):
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self.backend = backend.name
        self.gemm = backend.gemm
        self.record.backend = backend.name
        self.record.repack_seconds += time.perf_counter() - started
        self.record.finished_at = time.perf_counter()
        layer.neuqi_record = self.record
        setattr(layer, _DONE, True)
        if isinstance(backend, CompilesWhenRun):
            # Now, as a kernel that compiles while a CUDA graph is captured breaks the capture. A layer with a bias runs
            # without it too, where another rank adds it.
            for has_bias in {getattr(layer, "bias", None) is not None, False}:
                backend.warm_up(prepared, spec, has_bias)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x [..., K] · Ŵᵀ + bias`` as ``[..., N]`` in the dtype of ``x``."""
        if torch.compiler.is_compiling():
            return torch.ops.neuqi.gemm(
                x,
                layer.qweight,
                layer.scale,
                layer.zero,
                bias,
                self.n,
                self.spec.bits,
                self.spec.group_size,
                self.backend,
            )
        # Past torch's dispatcher and a module's attribute search, which together cost as much as a small product.
        held = layer._parameters
        return self.gemm(
            x,
            held["qweight"],
            held["scale"],
            held["zero"],
            bias,
            self.n,
            self.spec.bits,
            self.spec.group_size,
        )

    def dequantize_weight(self, layer: Any) -> torch.Tensor:
        """Return ``Ŵ [N, K]`` in the model's dtype (multi-head latent attention asks for it)."""
        spec = GemmSpec(
            n=self.n,
            k=self.k,
            bits=self.spec.bits,
            group_size=self.spec.group_size,
            device_type=layer.qweight.device.type,
            dtype=self.dtype,
            scale_dtype=compat.torch_dtype(self.spec.scale_dtype),
        )
        backend = dispatch.choose(spec, only=self.backend)
        return backend.dequantize(layer.qweight, layer.scale, layer.zero, spec).to(self.dtype)


@register_weight_loader_v2_supported_method
class NeuqiPackedLinearMethod(NeuqiLinearMethod):
    """A packed checkpoint: ``<name>.qweight``, ``<name>.scale``, ``<name>.zero`` in the canonical layout."""

    source = "packed"

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register empty parameters of this rank's slice: rows on N, whole groups and 32-code blocks on K."""
        k, bits = input_size_per_partition, self.spec.bits
        self._begin(layer, k, output_partition_sizes, params_dtype)
        qweight = PackedvLLMParameter(
            data=torch.empty(self.n, k * bits // 32, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=Fraction(32, bits),
            weight_loader=self._noting("qweight", extra["weight_loader"]),
        )
        layer.register_parameter("qweight", qweight)
        for name in ("scale", "zero"):
            loader = self._noting(name, extra["weight_loader"])
            layer.register_parameter(name, self._scale_parameter(k, loader))
        self.config.progress.expect(self.record.original_bytes)

    def _scale_parameter(self, k: int, loader: Callable[..., Any]) -> BasevLLMParameter:
        # Not-a-number until loaded, so that a part that never arrives cannot pass for data.
        data = torch.full(
            (self.n, self.spec.groups(k)), float("nan"), dtype=compat.torch_dtype(self.spec.scale_dtype)
        )
        if self.spec.group_size == WHOLE_ROW:
            # One scale per row belongs to every slice of the row: a class without an input dimension.
            return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
        return GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything arrived, then repack for the kernel.

        Raises:
            IntegrityError: a tensor is missing, or a scale or zero-point is not finite.
        """
        if getattr(layer, _DONE, False):
            return
        self._check_arrived(layer, ("qweight", "scale", "zero"))
        for name in ("scale", "zero"):
            bad = int((~torch.isfinite(getattr(layer, name))).sum())
            if bad:
                raise IntegrityError(
                    f"expected finite {name}s in layer {_name(layer)}, got {bad} that are not. The checkpoint is "
                    "damaged or incomplete: run `neuqi inspect --verify` on it, or write it again."
                )
        self._install(layer, layer.qweight.data, layer.scale.data, layer.zero.data)
        self.config.progress.finish(self.record.original_bytes)


@register_weight_loader_v2_supported_method
class NeuqiOnlineLinearMethod(NeuqiLinearMethod):
    """An unquantized checkpoint: a layer is quantized and its weights released as soon as its last part arrived."""

    source = "on-the-fly"
    uses_meta_device = True

    def __init__(self, config: NeuqiConfig, spec: WeightSpec, importance: torch.Tensor | None = None) -> None:
        super().__init__(config, spec)
        self.importance = importance

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register the weight on the meta device, where it costs nothing, and let vLLM defer its loading."""
        k = input_size_per_partition
        self._begin(layer, k, output_partition_sizes, params_dtype)
        if self.importance is not None and k != input_size:
            # A row-parallel layer sees its rank's inputs only.
            self.importance = self.importance.narrow(0, layer.tp_rank * k, k)
        weight = ModelWeightParameter(
            data=torch.empty(self.n, k, device="meta", dtype=params_dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=self._noting("weight", extra["weight_loader"]),
        )
        rows = getattr(layer, "num_org_embeddings_per_partition", None)
        if rows is not None:
            # The rows that fill up a vocabulary are in no checkpoint: vLLM must not wait for them.
            weight.weight_loader_numel = rows * k
        layer.register_parameter("weight", weight)
        self.config.progress.expect(self.record.original_bytes)
        compat.initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize the complete weight, repack it for the kernel and release it.

        Raises:
            IntegrityError: a part of the weight never arrived.
            UsageError: the weight has values that are not finite.
        """
        if getattr(layer, _DONE, False):
            return
        self._check_arrived(layer, ("weight",))
        self.config.progress.begin()
        started = time.perf_counter()
        packed = quantize_packed(
            layer.weight.data, self.spec, self.importance, preset=self.config.recipe.preset
        )
        self.record.quantize_seconds += time.perf_counter() - started
        self._install(layer, packed.qweight, packed.scale, packed.zero)
        self.config.progress.finish(self.record.original_bytes)


def _name(layer: Any) -> str:
    return repr(getattr(layer, "prefix", type(layer).__name__))
