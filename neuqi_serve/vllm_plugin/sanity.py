"""Does a kernel compute what its definition does? Asked at every load, once for each kind of layer.

A kernel that is wrong on one machine (a driver, a compiler, an instruction set that nobody has tested) otherwise shows
as a server that answers nonsense. A sample of a layer's rows is multiplied with random activations by the kernel and
by ``neuqi_kernels.reference``, which is the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger

from neuqi_kernels import experts_reference, reference
from neuqi_kernels.backend import Backend, Prepared
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.spec import GemmSpec
from neuqi_serve.config import EMBEDDING
from neuqi_serve.env import sanity_check
from neuqi_serve.errors import KernelError
from neuqi_serve.vllm_plugin.expert_runs import ExpertRun

logger = init_logger("vllm.neuqi")

# Of the norm of the result. The tests hold every kernel to 0.016 or less, which is what bf16 scales cost; a zero-point
# that is off by one code gives 0.2, a wrong layout 1.4.
TOLERANCE = 0.02
# Tokens at once: the kernels for decoding, for a few, and for prompts are different ones.
TOKENS = {"cpu": (1, 9), "cuda": (1, 17, 300)}
ROWS = 64


class SanityCheck:
    """Checks the first layer of each kind while a model loads; ``mode``: ``refuse``, ``warn`` or ``off``."""

    def __init__(self, mode: str | None = None) -> None:
        self.mode = sanity_check() if mode is None else mode
        self._seen: set[tuple[str, str, GemmSpec | ExpertsSpec]] = set()

    def check(
        self, name: str, role: str, backend: Backend, prepared: Prepared, canonical: Prepared, spec: GemmSpec
    ) -> None:
        """Compare ``prepared`` on its kernel with ``canonical`` by definition, unless this kind was seen before.

        ``role`` is ``neuqi_serve.vllm_plugin.report``'s, ``name`` how vLLM calls the layer.

        Raises:
            KernelError: they differ, and the mode is ``refuse``.
        """
        kind = role, backend.name, spec
        if self.mode == "off" or kind in self._seen or canonical[0].is_meta:
            return
        self._seen.add(kind)
        error = gemm_error(backend, prepared, canonical, spec)
        if role == EMBEDDING:
            error = max(error, embedding_error(backend, prepared, canonical, spec))
        if error <= TOLERANCE:
            return
        self._report(
            f"expected the kernel {backend.name!r} to compute what its definition does on layer {name} ({role}, "
            f"{spec.bits} bits, group {spec.group_size}, N={spec.n}, K={spec.k}), got a relative error of "
            f"{error:.2g}, above {TOLERANCE}: its answers would be wrong. Choose another kernel, e.g. "
            "NEUQI_KERNEL_BACKEND=reference, and report this; --sanity-check warn serves all the same."
        )

    def wants_experts(self, run: ExpertRun, spec: ExpertsSpec) -> bool:
        """Whether a layer of such experts was not checked yet: then one of them has to be kept in canonical form."""
        kind = "experts", run.name, spec
        if self.mode == "off" or kind in self._seen:
            return False
        self._seen.add(kind)
        return True

    def check_experts(
        self, name: str, run: ExpertRun, layer: Any, spec: ExpertsSpec, first: Prepared, second: Prepared
    ) -> None:
        """Compare the layer's last expert with its definition; ``first``, ``second``: its canonical ``[1, N, …]``.

        Raises:
            KernelError: they differ, and the mode is ``refuse``.
        """
        error = experts_error(run, layer, spec, first, second)
        if error <= TOLERANCE:
            return
        bits = spec.first.bits
        self._report(
            f"expected the kernel {run.name!r} to compute what its definition does on the experts {name} ({bits} bits, "
            f"N={spec.first.n}, K={spec.first.k}), got a relative error of {error:.2g}, above {TOLERANCE}: its answers "
            "would be wrong. Choose another kernel, e.g. NEUQI_KERNEL_BACKEND=reference, and report this; "
            "--sanity-check warn serves all the same."
        )

    def _report(self, message: str) -> None:
        if self.mode == "refuse":
            raise KernelError(message)
        logger.warning("neuqi: %s", message)


def _sampled_rows(n: int, device: torch.device) -> torch.Tensor:
    """Return the first, the last and some rows between; the same for each layer of this size."""
    if n <= ROWS:
        return torch.arange(n, device=device)
    between = torch.randperm(n, generator=torch.Generator().manual_seed(n))[: ROWS - 2]
    return torch.cat([torch.tensor([0, n - 1]), between]).to(device)


def gemm_error(backend: Backend, prepared: Prepared, canonical: Prepared, spec: GemmSpec) -> float:
    """Return the largest relative error of the product, over the kernels for different numbers of tokens.

    Infinite where something is not finite.
    """
    device = canonical[0].device
    rows = _sampled_rows(spec.n, device)
    qweight, scale, zero = (tensor[rows] for tensor in canonical)
    worst = 0.0
    for tokens in TOKENS.get(spec.device_type, TOKENS["cpu"]):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, spec.k, generator=generator).to(device, spec.dtype)
        expected = reference.gemm(x.float(), qweight, scale, zero, None, spec.bits, spec.group_size)
        # Large weights must not run over in float16: a power of two changes nothing else.
        _, exponent = torch.frexp(expected.abs().max())
        x = torch.ldexp(x.float(), -exponent.clamp(min=0)).to(spec.dtype)
        expected = reference.gemm(x.float(), qweight, scale, zero, None, spec.bits, spec.group_size)
        y = backend.gemm(x, *prepared, None, spec.n, spec.bits, spec.group_size)
        worst = max(worst, _relative(y[:, rows].float(), expected))
    return worst


def embedding_error(backend: Backend, prepared: Prepared, canonical: Prepared, spec: GemmSpec) -> float:
    """Return the relative error of looked-up rows; infinite where something is not finite."""
    rows = _sampled_rows(spec.n, canonical[0].device)
    y = backend.embedding(rows, *prepared, spec.n, spec.k, spec.bits, spec.group_size, spec.dtype)
    expected = reference.embedding(rows, *canonical, spec.bits, spec.group_size, torch.float32)
    return _relative(y.float(), expected)


def experts_error(run: ExpertRun, layer: Any, spec: ExpertsSpec, first: Prepared, second: Prepared) -> float:
    """Return the largest relative error of the last expert of this rank, over numbers of tokens.

    Infinite where something is not finite. The other experts of a token have the weight 0.
    """
    device = first[0].device
    ids = torch.arange(spec.experts, device=device)
    if layer.expert_map is not None:
        # The numbers that this rank's experts have among those of all ranks, in this rank's order.
        mine = (layer.expert_map >= 0).nonzero().flatten()
        ids = mine[layer.expert_map[mine].argsort()]
    chosen = ids.flip(0)[: layer.top_k].to(torch.int32)
    worst = 0.0
    for tokens in TOKENS.get(spec.first.device_type, TOKENS["cpu"]):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, spec.first.k, generator=generator).to(device, spec.first.dtype)
        weights = torch.zeros(tokens, len(chosen), device=device)
        weights[:, 0] = 1.0
        y = run(layer, x, weights, chosen.expand(tokens, -1).contiguous())
        alone = torch.zeros(tokens, 1, dtype=torch.int64, device=device)
        expected = experts_reference.experts(
            x.float(),
            first,
            second,
            None,
            None,
            torch.ones(tokens, 1, device=device),
            alone,
            spec.first.bits,
            spec.first.group_size,
            spec.second.bits,
            spec.second.group_size,
            spec.activation,
        )
        worst = max(worst, _relative(y.float(), expected))
    return worst


def _relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm(expected)
    error = float(torch.linalg.vector_norm(y - expected) / norm) if norm > 0 else float(y.abs().max())
    return error if error == error else float("inf")


def logits_are_finite(runner: object) -> bool | None:
    """Run a few tokens through the whole model; None where this version of vLLM cannot do that.

    ``runner`` is a worker's model runner. Attention is left out, as in vLLM's own dummy runs: it is vLLM's.
    """
    try:
        _, last = runner._dummy_run(4, force_attention=True)  # type: ignore[attr-defined]
        logits = runner.model.compute_logits(last)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return None
    # Ranks that do not gather the logits have none. Some models rule tokens out with minus infinity.
    if not isinstance(logits, torch.Tensor):
        return None
    return not bool((logits.isnan() | logits.isposinf()).any())
