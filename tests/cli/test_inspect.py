from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from neuqi_serve.cli.main import main
from neuqi_serve.config import WeightSpec
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint


@pytest.fixture
def packed(write_llama: Callable[..., Path], tmp_path: Path) -> Path:
    settings = QuantizationSettings(WeightSpec(3, 32), preset="minmax")
    quantize_checkpoint(write_llama(), tmp_path / "packed", settings)
    return tmp_path / "packed"


def test_inspect_prints_a_table_and_what_was_checked(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layers")
    assert lines[-1] == "integrity: headers valid (checksums: --verify)"


def test_inspect_lists_every_layer_on_request(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed), "--layers"]) == 0
    assert "model.layers.1.self_attn.q_proj" in capsys.readouterr().out


def test_inspect_as_json_carries_bits_and_bytes_per_layer(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(packed), "--json", "--verify"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["integrity"] == "verified"
    assert body["quantization_config"]["bits"] == 3
    assert len(body["modules"]) == body["layers"] == 16
    assert body["modules"]["model.layers.0.mlp.up_proj"]["bits_per_weight"] == 4.0
    size = sum(tensor.nbytes for tensor in load_file(packed / "model.safetensors").values())
    assert body["bytes_after"] == size
    assert sum(module["bytes_after"] for module in body["modules"].values()) + body["kept_bytes"] == size


def test_damage_in_the_data_is_found_by_verification_only(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = packed / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(packed)]) == 0
    assert main(["inspect", str(packed), "--verify"]) == 5
    assert "SHA-256" in capsys.readouterr().err


def test_truncated_shard_is_found_without_verification(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = packed / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["inspect", str(packed)]) == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("version", "code"), [(1, 0), (2, 5)])
def test_unknown_format_version_exits_with_5(packed: Path, version: int, code: int) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (packed / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(packed)]) == code


def test_folder_that_is_no_packed_model_exits_with_4(
    write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 4
    assert main(["inspect", str(tmp_path)]) == 4
    assert main(["inspect", str(write_llama())]) == 4
