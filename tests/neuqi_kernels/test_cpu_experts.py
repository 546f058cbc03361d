"""The C++ kernel for a mixture of experts against its definition, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from neuqi_kernels import experts, experts_reference, layout, ops
from neuqi_kernels.cpu import library
from neuqi_kernels.cpu.experts import NativeExperts
from neuqi_kernels.cpu.native import NativeBackend
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.spec import GemmSpec

pytestmark = pytest.mark.skipif(isinstance(library.load(), str), reason=f"the C++ library: {library.load()}")
ops.register()

# Relative to the largest result. The activation is rounded to the dtype of x, as is the result: two roundings of 2^-8
# (2^-11), of which a sum over hundreds of terms shows less than one; float32 differs by the fixed point of 2^-21.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-18}


@pytest.fixture(params=library.INSTRUCTION_SETS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeExperts:
    monkeypatch.setenv("NEUQI_CPU_ISA", request.param)
    linear = NativeBackend()
    if isinstance(linear._loaded, str):
        pytest.skip(linear._loaded)
    return NativeExperts(linear)


@pytest.fixture(autouse=True)
def poisoned_memory_and_one_thread() -> Iterator[None]:
    """New tensors are filled with NaN, so that an element that is never written shows."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


class Layer:
    """Random experts with routes: of 7 experts, the last is chosen by nobody."""

    def __init__(self, tokens: int, top_k: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        self.hidden, self.intermediate = options.get("hidden", 96), options.get("intermediate", 160)
        self.bits, self.groups = options.get("bits", (3, 4)), options.get("groups", (32, 32))
        self.activation, self.count = options.get("activation", "silu"), 7
        generator = torch.Generator().manual_seed(tokens + top_k)
        rows = ((2 * self.intermediate, self.hidden), (self.hidden, self.intermediate))
        self.specs = [
            GemmSpec(n, k, bits, group, "cpu", dtype)
            for (n, k), bits, group in zip(rows, self.bits, self.groups, strict=True)
        ]
        self.weights = [self._random(spec, generator) for spec in self.specs]
        self.biases: list[torch.Tensor | None] = [None, None]
        if options.get("bias"):
            self.biases = [torch.randn(self.count, s.n, generator=generator).to(dtype) for s in self.specs]
        self.x = torch.randn(tokens, self.hidden, generator=generator).to(dtype)
        scores = torch.rand(tokens, self.count - 1, generator=generator)
        self.topk_weights, ids = scores.topk(top_k)
        self.topk_ids = ids.to(torch.int32)

    def _random(self, spec: GemmSpec, generator: torch.Generator) -> list[torch.Tensor]:
        shape, high = (self.count, spec.n, spec.groups), 1 << spec.bits
        codes = torch.randint(0, high, (self.count * spec.n, spec.k), dtype=torch.uint8, generator=generator)
        scale = (torch.rand(shape, generator=generator) + 0.5).mul(0.3 / high).half()
        zero = (torch.rand(shape, generator=generator) * high).half()
        return [layout.pack(codes, spec.bits).view(self.count, spec.n, -1), scale, zero]

    def keep(self, tokens: slice) -> None:
        self.x, self.topk_ids = self.x[tokens], self.topk_ids[tokens]
        self.topk_weights = self.topk_weights[tokens]

    @property
    def options(self) -> tuple[Any, ...]:
        return (self.bits[0], self.groups[0], self.bits[1], self.groups[1], self.activation)

    def expected(self) -> torch.Tensor:
        routes = (self.topk_weights, self.topk_ids)
        return experts_reference.experts(self.x, *self.weights, *self.biases, *routes, *self.options)

    def prepared(self, backend: NativeExperts) -> list[Any]:
        return [backend.prepare(*w, spec) for w, spec in zip(self.weights, self.specs, strict=True)]

    def run(self, backend: NativeExperts) -> torch.Tensor:
        routes = (self.topk_weights, self.topk_ids)
        return backend.run(
            self.x, *self.prepared(backend), *self.biases, *routes, self.intermediate, *self.options
        )

    def check(self, backend: NativeExperts) -> torch.Tensor:
        y, expected = self.run(backend), self.expected()
        assert y.dtype == self.x.dtype
        error = (y.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error <= TOLERANCE[self.x.dtype]
        return y


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 5), (2, 2), (17, 3), (63, 6)])
def test_experts_agree_with_the_definition(
    backend: NativeExperts, dtype: torch.dtype, tokens: int, top_k: int
) -> None:
    Layer(tokens, top_k, dtype).check(backend)


@pytest.mark.parametrize("activation", experts_reference.ACTIVATIONS)
@pytest.mark.parametrize("bits", [(2, 2), (4, 3), (8, 4)])
def test_every_activation_with_biases_and_widths_of_their_own(
    backend: NativeExperts, activation: str, bits: tuple[int, int]
) -> None:
    groups = (-1, 64)
    layer = Layer(
        5, 2, torch.float32, activation=activation, bits=bits, groups=groups, intermediate=192, bias=True
    )
    layer.check(backend)


def test_the_bits_depend_on_nothing_but_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(63, 4)
    results = []
    for name in library.INSTRUCTION_SETS:
        monkeypatch.setenv("NEUQI_CPU_ISA", name)
        linear = NativeBackend()
        if isinstance(linear._loaded, str):
            continue
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(layer.run(NativeExperts(linear)))
    assert len(results) >= 2
    for result in results[1:]:
        assert torch.equal(result, results[0])
    monkeypatch.delenv("NEUQI_CPU_ISA")
    for token in (0, 40):
        one = Layer(63, 4)
        one.keep(slice(token, token + 1))
        assert torch.equal(one.run(NativeExperts(NativeBackend()))[0], results[0][token])


def test_many_tokens_go_in_chunks(backend: NativeExperts) -> None:
    """More scratch memory than one chunk may have: about 8 KB a route."""
    layer = Layer(900, 6, hidden=512, intermediate=512)
    y = layer.check(backend)
    layer.keep(slice(-3, None))
    assert torch.equal(layer.run(backend), y[-3:])


def test_experts_that_nobody_chose_are_not_looked_at(backend: NativeExperts) -> None:
    layer = Layer(9, 2)
    expected = layer.run(backend)
    layer.topk_ids.clamp_(max=2)
    chosen = layer.run(backend)
    for _, scale, zero in layer.weights:
        scale[3:] = torch.nan
        zero[3:] = torch.nan
    assert torch.equal(layer.run(backend), chosen)
    assert chosen.isfinite().all()
    # The poison works where it is looked at.
    layer.topk_ids[4, 0] = 5
    assert layer.run(backend)[4].isnan().all()
    assert expected.isfinite().all()


@pytest.mark.parametrize("ids", [[[4, 4]], [[2, 4, 2]], [[2, 4], [2, 2], [4, 4]]])
def test_a_token_may_come_to_an_expert_twice(backend: NativeExperts, ids: list[list[int]]) -> None:
    layer = Layer(len(ids), len(ids[0]))
    layer.topk_ids = torch.tensor(ids, dtype=torch.int32)
    layer.check(backend)


def test_experts_of_another_rank_count_nothing(backend: NativeExperts) -> None:
    layer = Layer(8, 3)
    layer.topk_ids[2] = -1
    layer.topk_ids[5, 1] = -1
    y = layer.check(backend)
    assert (y[2] == 0).all()


def test_activations_that_are_not_finite_stay_in_their_token(backend: NativeExperts) -> None:
    layer = Layer(6, 2)
    clean = layer.run(backend)
    layer.x[3, 7] = torch.nan
    y = layer.run(backend)
    assert y[3].isnan().all()
    others = torch.arange(6) != 3
    assert torch.equal(y[others], clean[others])


def test_bad_calls_are_refused(backend: NativeExperts) -> None:
    layer = Layer(4, 2)
    layer.topk_ids[1, 1] = 7
    with pytest.raises(IndexError, match="expected ids below 7, got up to 7"):
        layer.run(backend)
    layer = Layer(4, 2)
    layer.intermediate = 128
    with pytest.raises(ValueError, match="expected experts prepared as contiguous"):
        layer.run(backend)
    layer = Layer(4, 2)
    layer.topk_weights = layer.topk_weights[:2]
    with pytest.raises(ValueError, match="expected ids and weights"):
        layer.run(backend)
    spec = ExpertsSpec(7, *layer.specs, "relu2_no_mul")
    assert "takes the activations" in (backend.refuse(spec) or "")


def test_the_operator_passes_torchs_own_checks_and_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUQI_CPU_ISA", raising=False)
    monkeypatch.delenv("NEUQI_KERNEL_BACKEND", raising=False)
    torch.use_deterministic_algorithms(False)
    layer = Layer(4, 2)
    chosen = experts.choose(ExpertsSpec(7, *layer.specs, "silu"))
    assert chosen.name == "cpu_native"
    first, second = (chosen.prepare(*w, s) for w, s in zip(layer.weights, layer.specs, strict=True))
    routes = (layer.topk_weights, layer.topk_ids)
    more = (None, None, *routes, layer.intermediate, *layer.options, chosen.name)
    torch.library.opcheck(
        torch.ops.neuqi.experts.default,
        (layer.x, *first, *second, *more),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(
        lambda x: torch.ops.neuqi.experts(x, *first, *second, *more) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(layer.x), layer.run(NativeExperts(NativeBackend())) + 1)


def test_without_the_kernel_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(4, 2)
    spec = ExpertsSpec(7, *layer.specs, "gelu")
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "cpu_blocks")
    assert experts.choose(spec).name == "reference"
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "cpu_native")
    assert experts.choose(spec).name == "cpu_native"
    with pytest.raises(ValueError, match="all refuse: cpu_native: takes the activations"):
        experts.choose(ExpertsSpec(7, *layer.specs, "swiglustep"))
