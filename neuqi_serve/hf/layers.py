"""Packed layers as torch modules: a linear layer, an embedding, and a head that shares the embedding's weights."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_kernels import dispatch, layout, ops
from neuqi_kernels.backend import CompilesWhenRun, Prepared
from neuqi_kernels.spec import GemmSpec
from neuqi_serve.config import WeightSpec
from neuqi_serve.quant.quantize import PackedWeight, quantize_packed
from neuqi_serve.quant.storage import storage_dtype

ops.register()

# Codes are found again as round(Ŵ/scale + zero) in float32, exactly as long as zero leaves bits for the fraction.
_LARGEST_ZERO = float(1 << 18)


class PackedMatrix(nn.Module):
    """A matrix ``Ŵ [N, K]`` as ``qweight`` int32 ``[N, K·b/32]`` and ``scale``, ``zero`` ``[N, G]``.

    Buffers, so that the model's dtype is that of its parameters and casts leave them alone. At the first call the codes
    move into the layout of the kernel that ``neuqi_kernels.dispatch`` chooses; ``state_dict`` and a move to another
    device bring them back.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, rows: int, columns: int, spec: WeightSpec) -> None:
        super().__init__()
        self.rows, self.columns, self.spec = rows, columns, spec
        groups, dtype = spec.groups(columns), storage_dtype(spec)
        words = layout.packed_words(columns, spec.bits)
        self.register_buffer("qweight", torch.empty((rows, words), dtype=torch.int32))
        self.register_buffer("scale", torch.empty((rows, groups), dtype=dtype))
        self.register_buffer("zero", torch.empty((rows, groups), dtype=dtype))
        self._prepared: Prepared | None = None
        self._prepared_for: GemmSpec | None = None
        self._backend = ""

    def expect_weight(self, dtype: torch.dtype) -> None:
        """Take an unquantized ``weight [N, K]`` under that name until ``quantize`` replaces it."""
        weight = torch.empty((self.rows, self.columns), dtype=dtype, device=self.scale.device)
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    @property
    def expects_weight(self) -> bool:
        """Whether an unquantized weight was expected and has not come yet."""
        return "weight" in self._parameters

    def quantize(self, weight: Tensor, importance: Tensor | None, preset: str) -> None:
        """Fill in the codes, scales and zero-points of ``weight [N, K]``.

        Raises:
            UsageError: weights that are not finite.
        """
        self._parameters.pop("weight", None)
        self.load_packed(quantize_packed(weight, self.spec, importance, preset))

    def load_packed(self, packed: PackedWeight) -> None:
        """Take over the three tensors, on the device on which they are."""
        self._prepared = None
        for name in ("qweight", "scale", "zero"):
            self.register_buffer(name, getattr(packed, name))

    def packed(self) -> PackedWeight:
        """Return the three tensors in the canonical layout."""
        return PackedWeight(self._canonical_codes(), self.scale, self.zero)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return ``Ŵ [N, K]`` in ``dtype``."""
        prepared, spec = self._prepare(dtype)
        return dispatch.choose(spec, only=self._backend).dequantize(*prepared, spec).to(dtype)

    def _prepare(self, dtype: torch.dtype) -> tuple[Prepared, GemmSpec]:
        """The weights as the kernel for activations of ``dtype`` reads them."""
        held = self._prepared_for
        if self._prepared is not None and held is not None and held.dtype == dtype:
            return self._prepared, held
        self._restore()
        spec = GemmSpec(
            n=self.rows,
            k=self.columns,
            bits=self.spec.bits,
            group_size=self.spec.group_size,
            device_type=self.scale.device.type,
            dtype=dtype,
            scale_dtype=self.scale.dtype,
        )
        backend = dispatch.choose(spec)
        self._prepared, self._prepared_for = backend.prepare(self.qweight, self.scale, self.zero, spec), spec
        self._backend = backend.name
        if isinstance(backend, CompilesWhenRun):
            backend.warm_up(self._prepared, spec, has_bias=False)
        if self._prepared[0] is not self.qweight and self._codes_can_be_found_again():
            del self._buffers["qweight"]
        return self._prepared, spec

    def _codes_can_be_found_again(self) -> bool:
        return bool((self.scale != 0).all()) and float(self.zero.float().abs().max()) < _LARGEST_ZERO

    def _canonical_codes(self) -> Tensor:
        codes = self._buffers.get("qweight")
        if codes is not None:
            return codes
        assert self._prepared is not None
        assert self._prepared_for is not None
        backend = dispatch.choose(self._prepared_for, only=self._backend)
        weight = backend.dequantize(*self._prepared, self._prepared_for)
        grouped = weight.view(self.rows, self.scale.shape[1], -1)
        values = grouped / self.scale.float().unsqueeze(-1) + self.zero.float().unsqueeze(-1)
        found = values.round_().clamp_(0, 2**self.spec.bits - 1).to(torch.uint8)
        return layout.pack(found.view(self.rows, self.columns), self.spec.bits)

    def _restore(self) -> None:
        """Bring the codes back into the canonical layout."""
        if "qweight" not in self._buffers:
            self.register_buffer("qweight", self._canonical_codes())
        self._prepared = self._prepared_for = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrix:
        self._restore()

        def moved(tensor: Tensor) -> Tensor:
            # A cast of the model is about its activations: scales and zero-points keep their storage type.
            target = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return fn(tensor) if target.dtype == tensor.dtype else tensor.to(target.device)

        buffers = {name: moved(tensor) for name, tensor in self._buffers.items() if tensor is not None}
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, tensor in buffers.items():
                self.register_buffer(name, tensor)
        return self

    def _save_to_state_dict(
        self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        dropped = "qweight" not in self._buffers
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if dropped:
            destination[f"{prefix}qweight"] = self._canonical_codes()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return what a printed model shows of the layer."""
        return f"{self.columns}, {self.rows}, bits={self.spec.bits}, group_size={self.spec.group_size}"


class PackedLinear(PackedMatrix):
    """``y = x·Ŵᵀ + bias``, ``x [..., K]`` → ``[..., N]`` in the dtype of ``x``."""

    bias: nn.Parameter | None

    def __init__(self, rows: int, columns: int, spec: WeightSpec, bias: nn.Parameter | None) -> None:
        super().__init__(rows, columns, spec)
        self.in_features, self.out_features = columns, rows
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return _product(self, x, self.bias)


class PackedEmbedding(PackedMatrix):
    """Rows ``ids [...]`` of Ŵ as ``[..., K]`` in ``dtype``, times ``embed_scale`` if the model's class has one."""

    dtype_of_output: Tensor

    def __init__(self, rows: int, columns: int, spec: WeightSpec, dtype: torch.dtype) -> None:
        super().__init__(rows, columns, spec)
        self.num_embeddings, self.embedding_dim = rows, columns
        self.embed_scale: float | None = None
        # Follows casts of the model, as a weight would.
        self.register_buffer("dtype_of_output", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows."""
        dtype = self.dtype_of_output.dtype
        prepared, spec = self._prepare(dtype)
        y: Tensor = torch.ops.neuqi.embedding(
            ids, *prepared, spec.n, spec.k, spec.bits, spec.group_size, dtype, self._backend
        )
        return y if self.embed_scale is None else y * torch.tensor(self.embed_scale, dtype=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        followed = fn(self.dtype_of_output)
        super()._apply(fn, recurse)
        self.register_buffer("dtype_of_output", followed, persistent=False)
        return self


class TiedHead(nn.Module):
    """An output head without weights of its own: it multiplies with the embedding's, stored once."""

    bias: nn.Parameter | None

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        # In a tuple: a module attribute would list the embedding's tensors a second time.
        self._embedding = (embedding,)
        self.in_features, self.out_features = embedding.columns, embedding.rows
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x·Ŵᵀ + bias``, Ŵ being the embedding."""
        return _product(self._embedding[0], x, self.bias)


def _product(matrix: PackedMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
    prepared, spec = matrix._prepare(x.dtype)
    y: Tensor = torch.ops.neuqi.gemm(x, *prepared, bias, spec.n, spec.bits, spec.group_size, matrix._backend)
    return y
