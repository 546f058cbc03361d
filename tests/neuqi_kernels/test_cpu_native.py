"""The C++ kernel against float64: every instruction set that this machine has, every format, adversarial inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from neuqi_kernels import layout, reference
from neuqi_kernels.cpu import library
from neuqi_kernels.cpu.native import NATIVE, NativeBackend
from neuqi_kernels.spec import GemmSpec

pytestmark = pytest.mark.skipif(isinstance(library.load(), str), reason=f"the C++ library: {library.load()}")

# Unit roundoff of the result.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# Sums of codes times activations in fixed point are exact. Each group of at most 128 input features then takes a few
# float32 steps: conversions, zero-point, scale, sum. Each rounds by 2^-24 of the sums' magnitude at most.
SUM_ROUNDOFF = 2.0**-24
STEPS_PER_SEGMENT = 8
EXTRA_STEPS = 16
# Half a step of the fixed point, as a part of the largest activation among the neighbours that share it.
FIXED_POINT = {torch.bfloat16: 2.0**-15, torch.float16: 2.0**-22, torch.float32: 2.0**-22}
# Half of the smallest positive float32, which bounds what is lost where results are subnormal.
TINY = 2.0**-149
GROUP_SIZES = (32, 64, 128, -1)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=library.INSTRUCTION_SETS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeBackend:
    monkeypatch.setenv("NEUQI_CPU_ISA", request.param)
    forced = NativeBackend()
    if isinstance(forced._loaded, str):
        pytest.skip(forced._loaded)
    return forced


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors are filled with NaN, so that an element that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only where a test is about them: tiny products on a busy machine would wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Layer:
    """A random layer, its prepared form and its exact product."""

    def __init__(
        self,
        backend: NativeBackend,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        **changes: object,
    ) -> None:
        scale_dtype = changes.pop("scale_dtype", torch.float16)
        self.backend, self.spec = backend, GemmSpec(n, k, bits, group_size, "cpu", dtype, scale_dtype)
        generator = torch.Generator().manual_seed(n + k + bits)
        groups = self.spec.groups
        self.codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
        self.scale = (torch.rand(n, groups, generator=generator) * 0.1 + 0.01).to(scale_dtype)
        self.zero = (torch.rand(n, groups, generator=generator) * (1 << bits) - 0.5).to(scale_dtype)
        for name, value in changes.items():
            getattr(self, name).copy_(value)
        self.qweight = layout.pack(self.codes, bits)
        self.prepared = backend.prepare(self.qweight, self.scale, self.zero, self.spec)

    @property
    def segment(self) -> int:
        """Input features whose activations share a fixed-point scale."""
        return next(size for size in (128, 64, 32) if self.spec.group % size == 0)

    def gemm(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        spec = self.spec
        return self.backend.gemm(x, *self.prepared, bias, spec.n, spec.bits, spec.group_size)

    def check(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Hold the result against float64, element by element."""
        y = self.gemm(x, bias)
        assert y.dtype == x.dtype
        codes = self.codes.double().view(self.spec.n, self.spec.groups, -1)
        scale, zero = self.scale.double().unsqueeze(-1), self.zero.double().unsqueeze(-1)
        weight = ((codes - zero) * scale).view(self.spec.n, -1)
        size = ((codes + zero.abs()) * scale.abs()).view(self.spec.n, -1)
        expected, magnitude = x.double() @ weight.t(), x.double().abs() @ size.t()
        if bias is not None:
            expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
        largest = x.double().view(len(x), -1, self.segment).abs().amax(-1)
        widths = weight.view(len(weight), -1, self.segment).abs().sum(-1)
        segments = self.spec.k // self.segment
        steps = STEPS_PER_SEGMENT * segments + EXTRA_STEPS
        bound = ROUNDOFF[x.dtype] * expected.abs() + steps * SUM_ROUNDOFF * magnitude
        bound += FIXED_POINT[x.dtype] * largest @ widths.t() + segments * TINY
        error = (y.double() - expected).abs()
        assert (error <= bound).all(), f"{(error / bound).max().item():.3g} times the bound"


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
def test_gemm_is_within_rounding_of_float64(
    backend: NativeBackend, bits: int, group_size: int, dtype: torch.dtype
) -> None:
    # Rows that end in the middle of a tile, whole tiles, an odd number of tiles.
    for n, k in ((17, 128), (48, 384), (63, 256)):
        layer = Layer(backend, n, k, bits, group_size, dtype)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype)
        for m in (1, 3, 8):
            layer.check(activations(m, k, dtype), bias)


@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
def test_every_number_of_tokens_agrees_with_float64(backend: NativeBackend, bits: int) -> None:
    # One panel, several, several that share an unpacked block, more than one chunk of tokens.
    layer = Layer(backend, 80, 96, bits, 32, torch.bfloat16)
    for m in (*range(1, 71), 256, 257, 300):
        layer.check(activations(m, 96, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_split_activations_agree_with_float64_for_many_tokens(
    backend: NativeBackend, dtype: torch.dtype
) -> None:
    layer = Layer(backend, 33, 128, 3, 64, dtype)
    for m in (2, 5, 11, 16, 31, 259):
        layer.check(activations(m, 128, dtype))


@pytest.mark.parametrize("k", [32, 544, 640, 1184])
def test_a_group_of_a_whole_row_may_have_any_number_of_blocks(backend: NativeBackend, k: int) -> None:
    layer = Layer(backend, 21, k, 2, -1, torch.bfloat16)
    for m in (1, 7, 50):
        layer.check(activations(m, k, torch.bfloat16))


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_scales_of_every_dtype_are_exact(backend: NativeBackend, scale_dtype: torch.dtype) -> None:
    layer = Layer(backend, 37, 128, 4, 32, torch.float32, scale_dtype=scale_dtype)
    layer.check(activations(3, 128, torch.float32))
    layer.check(activations(30, 128, torch.float32))


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize(
    "changes",
    [
        {"zero": torch.tensor(60000.0)},
        {"zero": torch.tensor(-1234.5)},
        {"scale": torch.tensor(0.0)},
        {"scale": torch.tensor(-0.03)},
        # A subnormal float16.
        {"scale": torch.tensor(3e-7)},
        {"codes": torch.tensor(0)},
        {"codes": torch.tensor(7)},
    ],
    ids=lambda change: "-".join(f"{name}={value.item():g}" for name, value in change.items()),
)
def test_extreme_weights_agree_with_float64(
    backend: NativeBackend, changes: dict[str, torch.Tensor], m: int
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        layer = Layer(backend, 35, 192, 3, 64, dtype, **changes)
        layer.check(activations(m, 192, dtype))


@pytest.mark.parametrize("m", [1, 40])
def test_extreme_activations_agree_with_float64(backend: NativeBackend, m: int) -> None:
    layer = Layer(backend, 35, 192, 2, 64, torch.float32)
    alternating = torch.ones(m, 192)
    alternating[:, ::2] = -1
    outlier = activations(m, 192, torch.float32)
    outlier[:, 77] = 3e4
    for x in (torch.zeros(m, 192), alternating, outlier, activations(m, 192, torch.float32) * 1e30):
        layer.check(x)
        layer.check(x.to(torch.bfloat16))
    layer.check(outlier.half())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 40])
def test_an_activation_that_is_not_finite_spoils_its_own_token_only(
    backend: NativeBackend, m: int, value: float
) -> None:
    for dtype in DTYPES:
        layer = Layer(backend, 21, 96, 4, 32, dtype)
        x = activations(m, 96, dtype)
        x[1, 40] = value
        y = layer.gemm(x)
        assert not y[1].isfinite().any()
        assert y[torch.arange(m) != 1].isfinite().all()


@pytest.mark.parametrize("name", ["scale", "zero"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_a_weight_that_is_not_finite_spoils_its_own_row_only(
    backend: NativeBackend, name: str, scale_dtype: torch.dtype
) -> None:
    for value in (float("nan"), float("inf")):
        damaged = torch.full((21, 3), 1.5)
        damaged[13, 1] = value
        layer = Layer(backend, 21, 96, 4, 32, torch.float32, scale_dtype=scale_dtype, **{name: damaged})
        for m in (1, 40):
            y = layer.gemm(activations(m, 96, torch.float32))
            assert not y[:, 13].isfinite().any()
            assert y[:, torch.arange(21) != 13].isfinite().all()


def test_the_result_does_not_depend_on_the_number_of_threads(backend: NativeBackend) -> None:
    layers = [Layer(backend, 100, 256, bits, 64, torch.bfloat16) for bits in layout.SUPPORTED_BITS]
    for m in (1, 4, 33):
        x = activations(m, 256, torch.bfloat16)
        torch.set_num_threads(1)
        alone = [layer.gemm(x) for layer in layers]
        for count in range(2, 9):
            torch.set_num_threads(count)
            assert all(torch.equal(layer.gemm(x), y) for layer, y in zip(layers, alone, strict=True))


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_dequantize_restores_exactly_what_was_prepared(
    bits: int, group_size: int, scale_dtype: torch.dtype
) -> None:
    for n in (1, 16, 47):
        layer = Layer(NATIVE, n, 160, bits, group_size, torch.bfloat16, scale_dtype=scale_dtype)
        expected = reference.dequantize(layer.qweight, layer.scale, layer.zero, bits, group_size)
        assert torch.equal(NATIVE.dequantize(*layer.prepared, layer.spec), expected)


def test_prepare_takes_slices_of_a_larger_weight() -> None:
    whole = Layer(NATIVE, 64, 128, 3, 32, torch.float32)
    # Columns 32 to 96, as a tensor-parallel rank receives them: views that are not contiguous.
    parts = (whole.qweight[:, 3:9], whole.scale[:, 1:3], whole.zero[:, 1:3])
    spec = GemmSpec(64, 64, 3, 32, "cpu", torch.float32)
    weight = NATIVE.dequantize(*NATIVE.prepare(*parts, spec), spec)
    full = reference.dequantize(whole.qweight, whole.scale, whole.zero, 3, 32)
    assert torch.equal(weight, full[:, 32:96])


@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
def test_one_activation_reads_its_column_exactly(backend: NativeBackend, bits: int) -> None:
    # A power of two and codes minus zero-points that float32 holds: every step is exact, whatever is misplaced shows.
    layer = Layer(backend, 19, 192, bits, 64, torch.float32, scale=torch.tensor(0.5), zero=torch.tensor(1.25))
    x = torch.eye(192)
    expected = reference.dequantize(layer.qweight, layer.scale, layer.zero, bits, 64).t()
    assert torch.equal(layer.gemm(x), expected)
    assert torch.equal(torch.cat([layer.gemm(row.unsqueeze(0)) for row in x]), expected)


def test_subnormal_and_smallest_activations_are_kept(backend: NativeBackend) -> None:
    layer = Layer(backend, 21, 96, 3, 32, torch.float32)
    tiny = torch.randint(-9, 10, (3, 96), generator=torch.Generator().manual_seed(3)).float() * 2.0**-149
    for x in (tiny, tiny * 2.0**20, tiny.bfloat16() * 2.0**16):
        layer.check(x)
    # The same numbers beside one of ordinary size are lost in its fixed point, within the bound.
    tiny[:, 5] = 1.0
    layer.check(tiny)


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_that_is_not_finite_gives_what_torch_gives(
    backend: NativeBackend, dtype: torch.dtype, m: int
) -> None:
    # Zero-points between codes: no weight is zero, so an infinite activation gives infinities of both signs.
    layer = Layer(backend, 21, 96, 4, 32, dtype, zero=torch.tensor(7.5))
    weight = reference.dequantize(layer.qweight, layer.scale, layer.zero, 4, 32)
    for values in ([float("inf")], [float("-inf")], [float("inf"), float("-inf")], [float("nan")]):
        x = activations(m, 96, dtype)
        for i, value in enumerate(values):
            x[0, 40 + i] = value
        expected = x.float() @ weight.t()
        y = layer.gemm(x).float()
        assert torch.equal(y[0].isnan(), expected[0].isnan())
        infinite = expected[0].isinf()
        assert torch.equal(y[0, infinite], expected[0, infinite])
        assert y[1:].isfinite().all()


def test_pointers_need_only_the_alignment_of_their_elements(backend: NativeBackend) -> None:
    layer = Layer(backend, 21, 96, 3, 32, torch.bfloat16)
    x, bias = activations(5, 96, torch.bfloat16), torch.randn(22).bfloat16()
    shifted = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(5, 96)
    assert shifted.data_ptr() % 4 == 2
    assert torch.equal(layer.gemm(shifted, bias[1:]), layer.gemm(x, bias[1:].clone()))


def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = []
    for name in library.INSTRUCTION_SETS:
        monkeypatch.setenv("NEUQI_CPU_ISA", name)
        backend = NativeBackend()
        if not isinstance(backend._loaded, str):
            backends.append(backend)
    assert len(backends) >= 1
    for bits in layout.SUPPORTED_BITS:
        for group_size in GROUP_SIZES:
            for dtype in DTYPES:
                layers = [Layer(backend, 85, 256, bits, group_size, dtype) for backend in backends]
                for m in (1, 2, 5, 31):
                    first, *others = (layer.gemm(activations(m, 256, dtype)) for layer in layers)
                    assert all(torch.equal(first, other) for other in others)


def test_gemm_takes_a_view_of_the_activations(backend: NativeBackend) -> None:
    layer = Layer(backend, 17, 64, 4, 32, torch.bfloat16)
    wide = activations(5, 100, torch.bfloat16)
    assert torch.equal(layer.gemm(wide[:, 10:74]), layer.gemm(wide[:, 10:74].contiguous()))


def test_prepared_weights_are_only_padded_to_whole_tiles() -> None:
    layer = Layer(NATIVE, 50, 256, 3, 64, torch.bfloat16)
    packed = layer.qweight.nbytes + layer.scale.nbytes + layer.zero.nbytes
    assert sum(tensor.nbytes for tensor in layer.prepared) * 50 == packed * 64


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_type": "cuda"}, "the weights are on cuda"),
        ({"bits": 5}, "not 5"),
        ({"group_size": 48}, "not 48"),
        ({"group_size": 64}, "divide K=96, not 64"),
        ({"dtype": torch.float64}, "activations, not torch.float64"),
        ({"scale_dtype": torch.float64}, "scales, not torch.float64"),
    ],
)
def test_refuse_gives_the_reason(changes: dict[str, object], reason: str) -> None:
    fields = {"n": 17, "k": 96, "bits": 3, "group_size": 32, "device_type": "cpu", "dtype": torch.bfloat16}
    assert reason in (NATIVE.refuse(GemmSpec(**(fields | changes))) or "")


def test_prepare_refuses_tensors_that_do_not_belong_to_the_spec() -> None:
    layer = Layer(NATIVE, 17, 64, 3, 32, torch.bfloat16)
    tensors = (layer.qweight, layer.scale, layer.zero)
    with pytest.raises(ValueError, match=r"expected scale as torch\.bfloat16"):
        NATIVE.prepare(*tensors, GemmSpec(17, 64, 3, 32, "cpu", torch.bfloat16, torch.bfloat16))
    with pytest.raises(
        ValueError, match=r"expected qweight as torch.int32 \[17, 8\], got torch.int32 \[17, 6\]"
    ):
        NATIVE.prepare(*tensors, GemmSpec(17, 64, 4, 32, "cpu", torch.bfloat16))
    with pytest.raises(ValueError, match=r"it refuses: .*not 5"):
        NATIVE.prepare(*tensors, GemmSpec(17, 64, 5, 32, "cpu", torch.bfloat16))


def test_gemm_refuses_what_would_read_foreign_memory() -> None:
    layer = Layer(NATIVE, 17, 64, 3, 32, torch.bfloat16)
    x = activations(2, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="prepared for N=40"):
        NATIVE.gemm(x, *layer.prepared, None, 40, 3, 32)
    with pytest.raises(ValueError, match="4 bits and groups of 32"):
        NATIVE.gemm(x, *layer.prepared, None, 17, 4, 32)
    with pytest.raises(ValueError, match="groups of 64"):
        NATIVE.gemm(x, *layer.prepared, None, 17, 3, 64)
    with pytest.raises(ValueError, match="groups that divide K=64, got groups of 48"):
        NATIVE.gemm(x, *layer.prepared, None, 17, 3, 48)
    with pytest.raises(ValueError, match="K=96"):
        NATIVE.gemm(activations(2, 96, torch.bfloat16), *layer.prepared, None, 17, 3, 32)
    with pytest.raises(ValueError, match=r"expected bias as contiguous float \[17\]"):
        layer.gemm(x, torch.zeros(18))
    with pytest.raises(ValueError, match=r"got activations torch\.float64"):
        layer.gemm(x.double())
