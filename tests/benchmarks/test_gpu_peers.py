"""What the peers of the GPU benchmark do without a GPU: they pack as their owners do, and say why they cannot run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuqi_kernels import reference

HERE = Path(__file__).resolve().parent
PEERS = {
    "gemlite": "GEMLITE",
    "humming": "HUMMING",
    "marlin": "MARLIN",
    "machete": "MACHETE",
    "triton_w4a16": "TRITON_W4A16",
    "awq_triton": "AWQ_TRITON",
}
# float16 activations and products; the scale of one of the kernels keeps the 8 bits of bf16.
KERNEL_TOLERANCE = 4e-3
# bf16 rounds by 2^-9: the scale once, the shift three times (scale, zero-point, their product).
BF16_TOLERANCE = 4 * 2.0**-9


@pytest.fixture
def layer(load):
    module = load("gpu_peers.layer")
    return module.Layer.random(module.Case(64, 160, 4, 32), "cpu")


def worker(name: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, str(HERE / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {line[0]: float(line[1]) for line in lines if len(line) == 2}


def test_the_weight_of_a_layer_is_the_definition(load, layer):
    packing = load("neuqi_kernels.layout")
    expected = reference.dequantize(packing.pack(layer.codes, 4), layer.scale, layer.zero, 4, 32)
    assert torch.equal(layer.weight(dtype=torch.float32), expected)
    assert torch.equal(layer.weight(torch.tensor([5, 2]), torch.float32), expected[[5, 2]])


def test_the_error_is_seen(layer):
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(0))
    right = x.double() @ layer.weight().t()
    assert layer.error(right, x) < 1e-12
    assert layer.error(right.roll(1, 1), x) > 0.5
    assert layer.error(x.double() @ layer.with_integer_zeros().weight().t(), x) > 0.01


def test_integer_zeros_are_codes(layer):
    zeros = layer.with_integer_zeros().zero
    assert torch.equal(zeros, zeros.round())
    assert zeros.min() >= 0
    assert zeros.max() == 15
    assert (zeros - layer.zero).abs().max() <= 1


def test_words_are_those_of_vllm(load, layer):
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")
    packing = load("gpu_peers.packing")
    n, k = layer.codes.shape
    codes = layer.codes.t().contiguous().int()
    assert torch.equal(packing.along_k(layer.codes), utils.pack_rows(codes, 4, k, n))
    assert torch.equal(packing.along_n(layer.codes), utils.pack_cols(codes, 4, k, n))
    assert torch.equal(packing.along_n_awq(layer.codes), utils.awq_pack(codes, 4, k, n))


def test_vllms_triton_kernels_read_what_is_prepared():
    pytest.importorskip("vllm")
    errors = worker("vllm_triton_worker.py")
    assert set(errors) == {"w4a16", "awq"}
    assert all(error < KERNEL_TOLERANCE for error in errors.values()), errors


@pytest.mark.skipif(importlib.util.find_spec("gemlite") is None, reason="gemlite is not installed")
def test_gemlite_packs_the_layer():
    deviations = worker("gemlite_worker.py")
    assert set(deviations) == {"2", "4"}
    assert all(deviation < BF16_TOLERANCE for deviation in deviations.values()), deviations


def test_marlins_parameters_are_those_of_the_layer_in_its_order(load, layer):
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.marlin_utils")
    layer = layer.with_integer_zeros()
    scales, zeros = load("gpu_peers.marlin").prepare_parameters(layer)
    inverse = torch.argsort(torch.tensor(utils.get_scale_perms()[0]))
    assert torch.equal(scales.view(-1, 64)[:, inverse].view(5, 64), layer.scale.bfloat16().t())
    # Within a word the zero-points are interleaved as its codes are.
    words = utils.unpack_cols(zeros, 4, 5, 64).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]]
    assert torch.equal(words.reshape(-1, 64)[:, inverse].view(5, 64), layer.zero.t().int())


def test_machete_gets_the_shift_of_each_group(load, layer):
    machete = load("gpu_peers.machete")
    scales, shift = machete.prepare_parameters(layer)
    grouped = layer.codes.view(64, 5, 32).float()
    weight = grouped * scales.t().unsqueeze(-1).float() + shift.t().unsqueeze(-1).float()
    expected = layer.weight(dtype=torch.float32)
    assert (weight.view(64, 160) - expected).abs().max() < BF16_TOLERANCE * 0.03 * 16
    words = torch.arange(12).view(3, 4)
    assert machete.column_major(words).stride() == (1, 3)
    assert torch.equal(machete.column_major(words), words)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_refuses_with_a_reason(load, name):
    case = load("gpu_peers.layer").Case
    peer = getattr(load(f"gpu_peers.{name}"), PEERS[name])
    if not torch.cuda.is_available() and name in ("marlin", "machete", "humming"):
        assert peer.refuse(case(256, 256, 4, 128)) is not None
    if name not in ("gemlite", "humming"):
        assert "3" in peer.refuse(case(256, 256, 3, 128))
        assert "the layer has 16" in peer.refuse(case(256, 256, 4, 16))
    if name == "gemlite":
        assert "the layer has 3" in peer.refuse(case(256, 256, 3, 128))


def test_a_missing_package_is_the_reason(load):
    needs = load("gpu_peers.contender").needs
    assert needs("json", "no_such_package") == (
        "no_such_package does not import: ModuleNotFoundError: No module named 'no_such_package'"
    )
    assert needs("json") is None


def test_copies_fill_more_than_the_cache(load, layer):
    contender = load("gpu_peers.contender")
    tensors = [torch.arange(100), torch.arange(12.0).view(3, 4).t()]
    found = contender.copies_of(layer, tensors, lambda x, a, b: (a, b), 3 * 848 - 1, 0.1)
    assert found.layer_bytes == 848
    assert len(found.copies) == 3
    first, last = found.copies[0](None), found.copies[2](None)
    assert first[0].data_ptr() != last[0].data_ptr()
    assert torch.equal(first[1], last[1])
    assert last[1].stride() == (1, 4)
    assert len(contender.copies_of(layer, tensors, print, 10, 0.1).copies) == 2
