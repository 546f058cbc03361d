"""A kustomization for one model, computed from its plan: nothing is left to edit by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuqi_serve.errors import UsageError
from neuqi_serve.plan.plan import Option, Plan
from neuqi_serve.server.defaults import RUNTIME_BYTES

BASE = Path(__file__).with_name("base")
IMAGE = "ghcr.io/neuqi-serve/neuqi-serve"
MIB = 1 << 20
GIB = 1 << 30
# A name of Kubernetes (RFC 1123 label).
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# Slower than most networks and disks, and than the search on one core: a pod must not be killed for being slow.
_DOWNLOAD_BYTES_PER_SECOND = 20e6
_SEARCH_SECONDS_PER_WEIGHT = 50e-9
_START_SECONDS = 120
_MARGIN = 2.0
_PROBE_SECONDS = 10
# Host memory of a pod whose weights are on a GPU: CUDA, pinned buffers, the page cache's share.
_GPU_HOST_BYTES = 6 * GIB


@dataclass(frozen=True)
class Deployment:
    """What the overlay is for, beside the plan. ``image``: with its tag or digest, None for the published one."""

    namespace: str
    replicas: int = 1
    image: str | None = None
    cores: int = 4

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.namespace):
            raise UsageError(
                "expected a namespace of at most 63 lower-case letters, digits and dashes, got "
                f"{self.namespace!r}. Correct --namespace."
            )
        for option, value in (("--replicas", self.replicas), ("--cores", self.cores)):
            if value < 1:
                raise UsageError(f"expected {option} of at least 1, got {value}. Correct it.")


def files_of(plan: Plan, option: Option, model: str, deployment: Deployment) -> dict[str, str]:
    """Return path → content of the kustomization: the base, copied, and what changes it.

    ``model``: what the pod is told to serve, a name on the hub or a path in its volumes.
    """
    files = {f"base/{path.name}": path.read_text(encoding="utf-8") for path in sorted(BASE.glob("*.yaml"))}
    files["namespace.yaml"] = _yaml(_namespace(deployment.namespace))
    files["server.yaml"] = _yaml(_server(plan, option, model, deployment))
    files["cache.yaml"] = _yaml(_cache(plan, option))
    files["kustomization.yaml"] = _yaml(_kustomization(plan, deployment))
    return files


def startup_seconds(plan: Plan, option: Option, cores: int) -> float:
    """Seconds that a first start may take: to download, to search and to load, doubled."""
    weights = option.weights.linear_weights * plan.request.ranks
    download = option.weights.original * plan.request.ranks / _DOWNLOAD_BYTES_PER_SECOND
    search = weights * _SEARCH_SECONDS_PER_WEIGHT / cores
    return _MARGIN * (_START_SECONDS + download + search)


def memory_bytes(plan: Plan, option: Option) -> int:
    """Host memory of the pod: on CPUs everything, or the peak of packing; on GPUs that peak without the weights."""
    if plan.device.is_cpu:
        return math.ceil(1.1 * max(option.needed, option.load_peak))
    ranks = plan.request.ranks
    return _GPU_HOST_BYTES + ranks * (RUNTIME_BYTES + 2 * option.weights.largest_layer)


def _namespace(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def _server(plan: Plan, option: Option, model: str, deployment: Deployment) -> dict[str, Any]:
    memory = f"{math.ceil(memory_bytes(plan, option) / MIB)}Mi"
    requests: dict[str, str] = {"cpu": str(deployment.cores), "memory": memory}
    limits: dict[str, str] = {"memory": memory}
    container: dict[str, Any] = {"name": "server", "args": _arguments(plan, option, model)}
    pod: dict[str, Any] = {"containers": [container]}
    if plan.device.is_cpu:
        limits["cpu"] = str(deployment.cores)
    else:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(plan.request.ranks)
        # The container runtime writes device files and libraries into the root file system.
        container["securityContext"] = {"readOnlyRootFilesystem": False}
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    container["resources"] = {"requests": requests, "limits": limits}
    attempts = math.ceil(startup_seconds(plan, option, deployment.cores) / _PROBE_SECONDS)
    container["startupProbe"] = {"failureThreshold": attempts}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "neuqi-serve"},
        "spec": {"replicas": deployment.replicas, "template": {"spec": pod}},
    }


def _arguments(plan: Plan, option: Option, model: str) -> list[str]:
    request = plan.request
    arguments = [
        "serve",
        model,
        f"--bits={option.spec.bits}",
        f"--group-size={option.spec.group_size}",
        f"--max-model-len={request.context}",
        f"--max-num-seqs={request.concurrency}",
        f"--kv-cache-memory-bytes={plan.cache_bytes}",
        "--host=0.0.0.0",
        "--port=8000",
        "--status-port=9000",
        "--drain-timeout=45",
        "--api-key-file=/etc/neuqi-serve/keys/keys",
    ]
    if request.cache_dtype_bytes == 1:
        arguments.append("--kv-cache-dtype=fp8")
    if request.ranks > 1:
        arguments.append(f"--tensor-parallel-size={request.ranks}")
    return arguments


def _cache(plan: Plan, option: Option) -> dict[str, Any]:
    ranks = plan.request.ranks
    size = math.ceil(1.2 * ranks * (option.weights.original + option.weights.total) / GIB) + 2
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "neuqi-cache"},
        "spec": {"resources": {"requests": {"storage": f"{size}Gi"}}},
    }


def _kustomization(plan: Plan, deployment: Deployment) -> dict[str, Any]:
    from neuqi_serve._version import VERSION

    image = deployment.image or f"{IMAGE}:{VERSION}-{'cpu' if plan.device.is_cpu else 'cuda'}"
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": deployment.namespace,
        "resources": ["namespace.yaml", "base"],
        "images": [{"name": "neuqi-serve", **_image_parts(image)}],
        "patches": [{"path": "server.yaml"}, {"path": "cache.yaml"}],
    }


def _image_parts(image: str) -> dict[str, str]:
    name, at, digest = image.partition("@")
    if at:
        return {"newName": name, "digest": digest}
    # A colon before the last slash belongs to a registry's port.
    head, slash, last = image.rpartition("/")
    last, colon, tag = last.partition(":")
    return {"newName": head + slash + last, **({"newTag": tag} if colon else {})}


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=False, width=120))
