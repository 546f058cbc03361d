"""What a MODEL is, told from its folder before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint
from neuqi_serve.server.served_model import ServedModel, check_on_the_fly, find_model, local_folder

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 64,
    "vocab_size": 40,
}


def _folder(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    names = {f"self_attn.{p}_proj": (64, 64) for p in "qkvo"}
    names |= {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.0.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in names.items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("m") / "plain", CONFIG)


@pytest.fixture(scope="module")
def packed(unquantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("m") / "packed"
    settings = QuantizationSettings(WeightSpec(3, 32), "minmax", "cpu", False)
    with open("/dev/null", "w") as silent:
        quantize_checkpoint(unquantized, out, settings, silent)
    return out


def test_an_unquantized_folder_tells_its_bytes(unquantized: Path) -> None:
    model = find_model(str(unquantized))
    assert (model.kind, model.spec, model.is_folder) == ("unquantized", None, True)
    assert model.weight_bytes == (unquantized / "model.safetensors").stat().st_size


def test_a_packed_folder_tells_its_spec(packed: Path) -> None:
    model = find_model(str(packed))
    assert (model.kind, model.spec) == ("packed", WeightSpec(3, 32))


def test_a_damaged_packed_folder_is_refused(packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = next(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match=shard.name):
        find_model(str(copy))


def test_a_foreign_method_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "f", CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    model = find_model(str(folder))
    assert (model.kind, model.method) == ("foreign", "gptq")


def test_the_demo_is_found_by_name() -> None:
    folder = local_folder("demo")
    assert folder is not None
    assert folder.is_dir()


def test_a_folder_called_demo_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert local_folder("demo") == Path("demo")


@pytest.mark.parametrize(
    ("name", "is_local"),
    [("org/model", False), ("./org", True), ("/x/y", True), ("~/m", True), ("a/b/c", True)],
)
def test_a_name_is_a_path_when_it_cannot_be_on_the_hub(name: str, is_local: bool) -> None:
    assert (local_folder(name) is not None) == is_local


def test_no_such_folder_is_an_unsupported_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no such folder"):
        find_model(str(tmp_path / "absent"))


def test_a_folder_without_a_model_is_an_unsupported_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        find_model(str(tmp_path))


def test_a_hub_name_that_cannot_be_fetched_is_an_unsupported_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnsupportedModelError, match="Check the name, the network"):
        find_model("no-such-organisation/no-such-model")


def _model(**config: Any) -> ServedModel:
    return ServedModel("m", "m", CONFIG | config, "unquantized")


@pytest.mark.parametrize("group_size", [32, -1])
def test_groups_that_divide_every_row_are_accepted(group_size: int) -> None:
    check_on_the_fly(_model(), WeightSpec(4, group_size))


def test_a_group_that_does_not_divide_a_row_is_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match=r"intermediate_size: group size 64 .* 96 .*\[32\]"):
        check_on_the_fly(_model(), WeightSpec(4, 64))
    with pytest.raises(UsageError, match="num_attention_heads·head_dim"):
        check_on_the_fly(_model(head_dim=96, intermediate_size=64), WeightSpec(4, 64))


def test_the_language_part_of_a_model_of_several_is_checked() -> None:
    with pytest.raises(UsageError, match="hidden_size"):
        check_on_the_fly(_model(text_config={"hidden_size": 96}), WeightSpec(4, 128))


def test_the_group_size_must_divide_the_experts_rows() -> None:
    # Dense layers that no block of this model has need not fit.
    sizes = {"num_experts": 8, "hidden_size": 256, "head_dim": 128}
    fits = _model(**sizes, intermediate_size=96, moe_intermediate_size=128)
    check_on_the_fly(fits, WeightSpec(group_size=128))
    with pytest.raises(UsageError, match=r"moe_intermediate_size.*96"):
        check_on_the_fly(_model(**sizes, moe_intermediate_size=96), WeightSpec())
