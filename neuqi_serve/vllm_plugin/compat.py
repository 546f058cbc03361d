"""Every difference between vLLM versions, and every attribute we set on vLLM's own classes."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

_REGISTERED = False


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
