"""The C++ kernel: packed codes are multiplied as they are, at the speed of memory for a few tokens."""

from __future__ import annotations

import ctypes
import functools

import torch

from neuqi_kernels.backend import Prepared
from neuqi_kernels.cpu.library import INSTRUCTION_SETS, KINDS, choose_instruction_set, load
from neuqi_kernels.env import forced_cpu_isa
from neuqi_kernels.layout import BLOCK, SUPPORTED_BITS, packed_words
from neuqi_kernels.spec import GemmSpec

_TILE = 16


class NativeBackend:
    """Tiles of 16 rows, one row per 32-bit lane; see csrc/layout.h.

    The prepared ``qweight`` is int32 ``[⌈N/16⌉, words of a tile]`` and holds scales and zero-points too, in the order
    in which the kernel reads them; the prepared ``scale`` and ``zero`` are empty and keep the dtype only.
    Activations are multiplied in fixed point, bfloat16 with 15 bits and a sign, float16 and float32 with 21 (half as
    fast again), whose last bit is relative to the largest of at most 128 neighbours; see csrc/activations.h. A token
    with activations that are not finite is computed term by term, and gets what torch gives. A result depends neither
    on the number of threads nor on the instruction set.
    """

    name = "cpu_native"

    @functools.cached_property
    def _loaded(self) -> tuple[ctypes.CDLL, int] | str:
        """The library and the number of the instruction set, or the reason why there are none."""
        library = load()
        if isinstance(library, str):
            return library
        chosen = choose_instruction_set(library, forced_cpu_isa())
        return chosen if isinstance(chosen, str) else (library, chosen)

    @property
    def detail(self) -> str:
        """The instruction set that runs, for ``dispatch.explain``."""
        if isinstance(self._loaded, str):
            return ""
        library, isa = self._loaded
        team = "torch's threads" if library.neuqi_cpu_team_is_shared() else "threads of its own"
        return f"{INSTRUCTION_SETS[isa]}, {team}"

    def refuse(self, spec: GemmSpec) -> str | None:
        """Return why the layer cannot run here, or None."""
        if spec.device_type != "cpu":
            return f"runs on the CPU, the weights are on {spec.device_type}"
        if isinstance(self._loaded, str):
            return self._loaded
        if spec.bits not in SUPPORTED_BITS:
            return f"takes {SUPPORTED_BITS} bits, not {spec.bits}"
        if spec.group % BLOCK or spec.k % spec.group:
            return f"takes groups of a multiple of {BLOCK} that divide K={spec.k}, not {spec.group}"
        if spec.dtype not in KINDS:
            return f"takes float32, float16 and bfloat16 activations, not {spec.dtype}"
        if spec.scale_dtype not in KINDS:
            return f"takes float32, float16 and bfloat16 scales, not {spec.scale_dtype}"
        return None

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Repack into tiles, in parallel.

        Raises:
            ValueError: the backend refuses the layer, or the tensors do not have its shapes and dtypes.
        """
        library, _ = self._require(spec)
        expected = ((spec.n, packed_words(spec.k, spec.bits)), (spec.n, spec.groups), (spec.n, spec.groups))
        for name, tensor, shape in zip(
            ("qweight", "scale", "zero"), (qweight, scale, zero), expected, strict=True
        ):
            dtype = torch.int32 if name == "qweight" else spec.scale_dtype
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"expected {name} as {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}. "
                    "Pass tensors in the canonical layout and the spec that belongs to them."
                )
        kind = KINDS[spec.scale_dtype]
        words = library.neuqi_cpu_tile_bytes(spec.k, spec.bits, spec.group, kind) // 4
        tiles = torch.empty(-(-spec.n // _TILE), words, dtype=torch.int32)
        # Contiguous copies must outlive the call that reads their memory.
        sources = [tensor.contiguous() for tensor in (qweight, scale, zero)]
        library.neuqi_cpu_repack(
            *(tensor.data_ptr() for tensor in sources),
            tiles.data_ptr(),
            spec.n,
            spec.k,
            spec.bits,
            spec.group,
            kind,
            torch.get_num_threads(),
        )
        empty = torch.empty(0, dtype=spec.scale_dtype)
        return tiles, empty, empty.clone()

    def gemm(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bias: torch.Tensor | None,
        n: int,
        bits: int,
        group_size: int,
    ) -> torch.Tensor:
        """Return ``x·Ŵᵀ + bias``; the slow twin is ``reference.gemm``.

        Raises:
            ValueError: the tensors do not belong together, a dtype is not supported, or memory is short.
        """
        library, isa = self.require()
        k = x.shape[-1]
        shape, group, kind, scale_kind = call_plan(n, k, bits, group_size, x.dtype, scale.dtype)
        # The library trusts its pointers: a wrong shape must not reach it.
        if qweight.shape != shape or not qweight.is_contiguous():
            raise ValueError(
                f"expected weights prepared for N={n}, K={k}, {bits} bits and groups of {group} as contiguous "
                f"{list(shape)}, got {list(qweight.shape)}. Prepare them with the same spec."
            )
        bias_pointer, bias_kind = (None, 0) if bias is None else _bias(bias, n)
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], n))
        failed = library.neuqi_cpu_gemm(
            isa,
            x.data_ptr(),
            qweight.data_ptr(),
            bias_pointer,
            y.data_ptr(),
            x.numel() // k,
            n,
            k,
            bits,
            group,
            kind,
            scale_kind,
            bias_kind,
            torch.get_num_threads(),
        )
        if failed:
            raise ValueError(
                f"expected memory for the activations of {x.numel() // k} tokens, got none. Free some."
            )
        return y

    def embedding(
        self,
        ids: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the rows ``ids [...]`` of ``Ŵ`` as ``[..., k]``; the slow twin is ``reference.embedding``.

        Raises:
            IndexError: an id is not in ``[0, n)``.
            ValueError: the tensors do not belong together, or a dtype is not supported.
        """
        library, _ = self.require()
        shape, group, kind, scale_kind = call_plan(n, k, bits, group_size, dtype, scale.dtype)
        if qweight.shape != shape or not qweight.is_contiguous():
            raise ValueError(
                f"expected weights prepared for N={n}, K={k}, {bits} bits and groups of {group} as contiguous "
                f"{list(shape)}, got {list(qweight.shape)}. Prepare them with the same spec."
            )
        rows = ids.to(torch.int64).contiguous()
        y = torch.empty((*ids.shape, k), dtype=dtype)
        failed = library.neuqi_cpu_gather(
            qweight.data_ptr(),
            rows.data_ptr(),
            y.data_ptr(),
            rows.numel(),
            n,
            k,
            bits,
            group,
            scale_kind,
            kind,
            torch.get_num_threads(),
        )
        if failed:
            raise IndexError(
                f"expected ids in [0, {n}), got {int(rows.min())} to {int(rows.max())}. Does the tokenizer belong "
                "to the model?"
            )
        return y

    def dequantize(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> torch.Tensor:
        """Return ``Ŵ [N, K]`` in float32, from tiles."""
        library, _ = self._require(spec)
        weight = torch.empty(spec.n, spec.k)
        library.neuqi_cpu_dequantize(
            qweight.data_ptr(),
            weight.data_ptr(),
            spec.n,
            spec.k,
            spec.bits,
            spec.group,
            KINDS[spec.scale_dtype],
            torch.get_num_threads(),
        )
        return weight

    def require(self) -> tuple[ctypes.CDLL, int]:
        """Return the library and the number of the instruction set.

        Raises:
            ValueError: there is no library.
        """
        loaded = self._loaded
        if isinstance(loaded, str):
            raise ValueError(f"expected a usable backend, cpu_native refuses: {loaded}. Choose another.")
        return loaded

    def _require(self, spec: GemmSpec) -> tuple[ctypes.CDLL, int]:
        reason = self.refuse(spec)
        if reason is not None or isinstance(self._loaded, str):
            raise ValueError(
                f"expected a layer that cpu_native runs, it refuses: {reason}. Choose another backend."
            )
        return self._loaded


@functools.cache
def call_plan(
    n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[tuple[int, int], int, int, int]:
    """Return the shape of the prepared weights, the group size and the kinds of activations and scales."""
    if dtype not in KINDS or scale_dtype not in KINDS:
        raise ValueError(
            f"expected float32, float16 or bfloat16 activations and scales, got activations {dtype} and scales "
            f"{scale_dtype}. Convert them."
        )
    group = k if group_size == -1 else group_size
    if group <= 0 or k % group:
        raise ValueError(
            f"expected groups that divide K={k}, got groups of {group}. Were they prepared for it?"
        )
    header = 2 * _TILE * scale_dtype.itemsize
    words = k // group * (header + group * bits * _TILE // 8) // 4
    return (-(-n // _TILE), words), group, KINDS[dtype], KINDS[scale_dtype]


def _bias(bias: torch.Tensor, n: int) -> tuple[int, int]:
    if bias.shape != (n,) or bias.dtype not in KINDS or not bias.is_contiguous():
        raise ValueError(
            f"expected bias as contiguous float [{n}], got {bias.dtype} {list(bias.shape)}. Convert it."
        )
    return bias.data_ptr(), KINDS[bias.dtype]


NATIVE = NativeBackend()
