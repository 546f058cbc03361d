"""The golden checkpoint: FORMAT.md as bytes.

``python tests/format/test_golden.py`` writes it anew; only a new format version is a reason to.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch

from neuqi_kernels import layout
from neuqi_kernels.reference import dequantize
from neuqi_serve.config import WeightSpec
from neuqi_serve.format.manifest import PackedModule
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.safetensors_file import TensorSpec
from neuqi_serve.format.writer import write_checkpoint
from neuqi_serve.quant.quantize import PackedWeight

GOLDEN = Path(__file__).parent / "golden"
FORMAT = Path(__file__).parents[2] / "neuqi_serve" / "format" / "FORMAT.md"
DEFAULT = WeightSpec(3, 32)
MODULES = {
    "model.layers.0.a": (WeightSpec(2, 64), (3, 128)),
    "model.layers.0.b": (WeightSpec(3, 32), (5, 96)),
    "model.layers.0.c": (WeightSpec(4, -1), (1, 160)),
    "model.layers.0.d": (WeightSpec(8, 128), (2, 128)),
}
MAX_BYTES = 20_000


def code(bits: int, n: int, k: int) -> int:
    return (11 * k + 5 * n + k * k) % 2**bits


def parameter(n: int, j: int) -> tuple[float, float]:
    """Scale and zero-point of row n, group j: exact in float16, the zero-point also negative and beyond the codes."""
    return 2.0 ** -(n + j % 4), 4.25 * j - n - 0.5


def packed_weight(spec: WeightSpec, shape: tuple[int, int]) -> PackedWeight:
    out_features, in_features = shape
    codes = torch.tensor([[code(spec.bits, n, k) for k in range(in_features)] for n in range(out_features)])
    pairs = [[parameter(n, j) for j in range(spec.groups(in_features))] for n in range(out_features)]
    scale, zero = torch.tensor(pairs, dtype=torch.float16).unbind(-1)
    return PackedWeight(layout.pack(codes.to(torch.uint8), spec.bits), scale, zero)


def write(folder: Path) -> None:
    modules = {name: PackedModule(spec, shape, "BF16") for name, (spec, shape) in MODULES.items()}
    kept = {
        "model.embed_tokens.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).to(torch.bfloat16)
        / 4,
        "model.norm.weight": torch.tensor([1.0, -2.0, 0.5]),
    }
    tensors = {
        f"{name}.{part}": spec for name, module in modules.items() for part, spec in module.tensors.items()
    }
    tensors["model.embed_tokens.weight"] = TensorSpec("BF16", (2, 3))
    tensors["model.norm.weight"] = TensorSpec("F32", (3,))
    exceptions = {name: spec for name, (spec, _) in MODULES.items() if spec != DEFAULT}
    with write_checkpoint(folder, tensors, overwrite=True) as writer:
        for name, (spec, shape) in MODULES.items():
            writer.write_module(name, packed_weight(spec, shape))
        for name, tensor in kept.items():
            writer.write(name, tensor)
        recipe = QuantizationRecipe(DEFAULT, exceptions, ("embed_tokens",))
        writer.finish({"architectures": ["GoldenForCausalLM"]}, recipe, modules, {}, {})


def test_golden_is_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) <= MAX_BYTES


def test_golden_verifies() -> None:
    open_checkpoint(GOLDEN).verify()


def test_writer_writes_the_golden_bytes(tmp_path: Path) -> None:
    write(tmp_path / "golden")
    assert {path.name for path in (tmp_path / "golden").iterdir()} == {path.name for path in GOLDEN.iterdir()}
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "golden" / name).read_bytes() == (GOLDEN / name).read_bytes()
    manifests = [
        json.loads((folder / "neuqi_manifest.json").read_text()) for folder in (tmp_path / "golden", GOLDEN)
    ]
    for manifest in manifests:
        manifest.pop("producer")  # names the release that wrote it
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("name", MODULES)
def test_golden_decodes_by_the_text_of_the_format_alone(name: str) -> None:
    spec, (out_features, in_features) = MODULES[name]
    content = (GOLDEN / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    begin, end = header[f"{name}.qweight"]["data_offsets"]
    data = content[8 + length + begin : 8 + length + end]
    row_bytes = in_features * spec.bits // 8
    assert len(data) == out_features * row_bytes
    for n in range(out_features):
        stream = int.from_bytes(data[n * row_bytes : (n + 1) * row_bytes], "little")
        codes = [stream >> (k * spec.bits) & (2**spec.bits - 1) for k in range(in_features)]
        assert codes == [code(spec.bits, n, k) for k in range(in_features)]


@pytest.mark.parametrize("name", MODULES)
def test_golden_values_are_code_minus_zero_times_scale(name: str) -> None:
    spec, (out_features, in_features) = MODULES[name]
    module = open_checkpoint(GOLDEN).read_module(name)
    group = in_features // spec.groups(in_features)
    expected = [
        [
            (code(spec.bits, n, k) - parameter(n, k // group)[1]) * parameter(n, k // group)[0]
            for k in range(in_features)
        ]
        for n in range(out_features)
    ]
    values = dequantize(module.qweight, module.scale, module.zero, spec.bits, spec.group_size)
    assert torch.equal(values, torch.tensor(expected))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layout_agrees_with_the_worked_example(bits: int) -> None:
    match = re.search(
        rf"^\| {bits} \| `([0-9a-f ]+)` \| `([0-9a-f …]+)` \|$", FORMAT.read_text(), re.MULTILINE
    )
    assert match is not None
    codes = (torch.arange(32) % 2**bits).to(torch.uint8)[None]
    packed = layout.pack(codes, bits)
    assert " ".join(f"{word & 0xFFFFFFFF:08x}" for word in packed[0].tolist()) == match.group(1)
    on_disk = struct.pack(f"<{packed.shape[1]}i", *packed[0].tolist()).hex(" ")
    start, _, end = match.group(2).partition(" … ")
    assert on_disk.startswith(start)
    assert on_disk.endswith(end)


if __name__ == "__main__":
    write(GOLDEN)
