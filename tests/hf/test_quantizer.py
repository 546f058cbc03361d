"""Packed folders and quantization while loading, through the public interface of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.importance import write_sidecar
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
from neuqi_serve.hf import NeuqiConfig  # noqa: E402

SPEC = WeightSpec(bits=4, group_size=32)
IDS = torch.tensor([[5, 17, 42, 33, 9, 80, 3]])
# The product in fixed point against float32 over a whole model (21 bits a product, logits of about 10).
TOLERANCE = 2e-3
Folder = Callable[[str], Path]


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def pack(folder: Path, out: Path, **settings: Any) -> Path:
    quantize_checkpoint(folder, out, QuantizationSettings(SPEC, **settings))
    return out


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def dequantized(folder: Path, packed: Path) -> Any:
    """The definition: the original model with every packed weight replaced by (q − zero)·scale."""
    model, checkpoint = load(folder), open_checkpoint(packed)
    parameters = dict(model.named_parameters())
    from neuqi_kernels.reference import dequantize

    for name, module in checkpoint.manifest.modules.items():
        weight = checkpoint.read_module(name)
        values = dequantize(
            weight.qweight, weight.scale, weight.zero, module.spec.bits, module.spec.group_size
        )
        target_of(parameters, name, values.shape[0]).copy_(values)
    return model


def target_of(parameters: dict[str, Any], name: str, rows: int) -> torch.Tensor:
    """Where transformers holds a matrix that a checkpoint calls ``name``: experts lie in stacked tensors."""
    if ".experts." not in name:
        return parameters[f"{name}.weight"].data
    layer, expert, part = name.replace("block_sparse_moe", "mlp").rsplit(".", 2)
    if part in ("down_proj", "w2"):
        return parameters[f"{layer}.down_proj"].data[int(expert)]
    first = 0 if part in ("gate_proj", "w1") else rows
    return parameters[f"{layer}.gate_up_proj"].data[int(expert), first : first + rows]


def test_packed_and_on_the_fly_give_the_logits_of_the_definition(
    family: str, model_folder: Folder, tmp_path: Path
) -> None:
    folder = model_folder(family)
    packed = pack(folder, tmp_path / "packed")
    expected = logits(dequantized(folder, packed))
    loaded = load(packed)
    torch.testing.assert_close(logits(loaded), expected, atol=TOLERANCE, rtol=TOLERANCE)
    on_the_fly = load(folder, quantization_config=NeuqiConfig(bits=4, group_size=32))
    assert torch.equal(logits(on_the_fly), logits(loaded))


def test_save_pretrained_writes_what_neuqi_quantize_writes(
    family: str, model_folder: Folder, tmp_path: Path
) -> None:
    folder = model_folder(family)
    first = open_checkpoint(pack(folder, tmp_path / "packed"))
    model = load(folder, quantization_config=NeuqiConfig(bits=4, group_size=32))
    logits(model)
    model.save_pretrained(tmp_path / "saved")
    second = open_checkpoint(tmp_path / "saved")
    second.verify()
    assert second.expected_tensors() == first.expected_tensors()
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.expected_tensors())
    assert set(first.recipe.modules_to_not_convert) <= set(second.recipe.modules_to_not_convert)
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_generate_and_batches(model_folder: Folder, tmp_path: Path) -> None:
    model = load(pack(model_folder("llama-tied"), tmp_path / "packed"))
    answer = model.generate(IDS, max_new_tokens=6, do_sample=False)
    ids = IDS
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        if ids[0, -1] == 1:
            break
    assert answer.tolist() == ids.tolist()
    assert model(IDS.repeat(3, 1)).logits.shape == (3, 7, 96)


def test_options_reach_the_model(model_folder: Folder, tmp_path: Path) -> None:
    config = NeuqiConfig(
        bits=2,
        group_size=-1,
        scale_dtype="float32",
        lm_head_bits=4,
        embedding_bits=16,
        preset="minmax",
        modules={"down_proj": {"bits": 8, "group_size": 32}},
        modules_to_not_convert=["o_proj"],
    )
    model = load(model_folder("llama"), quantization_config=config)
    block = model.model.layers[1]
    assert block.mlp.down_proj.spec == WeightSpec(8, 32, "float32")
    assert block.mlp.up_proj.spec == WeightSpec(2, -1, "float32")
    assert model.lm_head.spec.bits == 4
    assert type(block.self_attn.o_proj) is torch.nn.Linear
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_expressions_become_names_in_the_folder(model_folder: Folder, tmp_path: Path) -> None:
    config = NeuqiConfig(
        bits=3,
        group_size=32,
        modules={r"re:layers\.1\..*_proj": {"bits": 4}},
        modules_to_not_convert=[r"re:layers\.0\..*o_proj"],
    )
    model = load(model_folder("llama"), quantization_config=config)
    first, second = model.model.layers
    assert type(first.self_attn.o_proj) is torch.nn.Linear
    assert first.mlp.up_proj.spec.bits == 3
    assert second.mlp.up_proj.spec.bits == second.self_attn.o_proj.spec.bits == 4
    model.save_pretrained(tmp_path / "saved")
    open_checkpoint(tmp_path / "saved").verify()
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_settings_as_a_dictionary_and_another_dtype(model_folder: Folder) -> None:
    settings = {"quant_method": "neuqi", "bits": 3, "group_size": 32}
    model = load(model_folder("qwen3"), quantization_config=settings, dtype=torch.bfloat16)
    assert model.dtype == logits(model).dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.spec.bits == 3


def test_an_importance_moves_the_errors(model_folder: Folder, tmp_path: Path) -> None:
    values = {"model.layers.0.mlp.down_proj": torch.linspace(0, 100, 96).square()}
    write_sidecar(tmp_path / "h.safetensors", values, {})
    config = NeuqiConfig(bits=2, group_size=32, importance=str(tmp_path / "h.safetensors"))
    weighed = load(model_folder("llama"), quantization_config=config).model.layers
    plain = load(model_folder("llama"), quantization_config=NeuqiConfig(bits=2, group_size=32)).model.layers
    original = load(model_folder("llama")).model.layers[0].mlp.down_proj.weight

    def loss(layers: Any) -> float:
        error = layers[0].mlp.down_proj.dequantized(torch.float32) - original.detach()
        return float((error.square() * values["model.layers.0.mlp.down_proj"]).sum())

    assert loss(weighed) < loss(plain)
    assert torch.equal(weighed[1].mlp.down_proj.packed().qweight, plain[1].mlp.down_proj.packed().qweight)


def test_the_original_comes_back_as_plain_layers(model_folder: Folder) -> None:
    model = load(model_folder("llama-tied"), quantization_config=NeuqiConfig(bits=4, group_size=32))
    expected = logits(model)
    plain = model.dequantize()
    torch.testing.assert_close(logits(plain), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert not hasattr(plain.config, "quantization_config")


def test_a_base_model_loads_from_the_whole_folder(model_folder: Folder, tmp_path: Path) -> None:
    packed = pack(model_folder("llama"), tmp_path / "packed")
    base, whole = transformers.AutoModel.from_pretrained(packed), load(packed)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_a_tokenizer_beside_the_weights_survives_a_save(model_folder: Folder, tmp_path: Path) -> None:
    model = load(model_folder("llama"), quantization_config=NeuqiConfig(bits=4, group_size=32))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    open_checkpoint(tmp_path / "out").verify()
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unquantized_weights_are_not_overwritten(model_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "model")
    model = load(tmp_path / "model", quantization_config=NeuqiConfig(bits=4, group_size=32))
    with pytest.raises(UsageError, match="unquantized weights"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert logits(load(tmp_path / "model")).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits must be one of"),
        ({"bits": 2.5}, "integer"),
        ({"group_size": 48}, "group size must be one of"),
        ({"bit": 3}, "unknown|only the keys"),
        ({"preset": "best"}, "preset among"),
        ({"lm_head_bits": 3}, "lm_head bits must be"),
        ({"importance": "no/such/file"}, "no such file"),
        ({"importance": 3}, "name of a file"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NeuqiConfig(**settings)


def test_a_group_size_that_does_not_divide_the_rows_is_refused(model_folder: Folder) -> None:
    with pytest.raises(UsageError, match=r"rows of 96 weights in model\.layers\.0\.mlp\.down_proj"):
        load(model_folder("llama"), quantization_config=NeuqiConfig(bits=4, group_size=64))


def test_a_vocabulary_that_vllm_cannot_run_packed_is_refused(model_folder: Folder) -> None:
    config = NeuqiConfig(bits=4, group_size=32, lm_head_bits=8)
    with pytest.raises(UsageError, match="16 bits for lm_head"):
        load(model_folder("opt"), quantization_config=config)


@pytest.mark.parametrize("part", ["qweight", "scale", "zero"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_missing_tensor_is_an_error(
    part: str, manifest: bool, model_folder: Folder, tmp_path: Path
) -> None:
    packed = pack(model_folder("llama"), tmp_path / "packed")
    file = packed / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.self_attn.k_proj.{part}"]
    save_file(tensors, file, metadata={"format": "pt"})
    if not manifest:
        (packed / "neuqi_manifest.json").unlink()
    with pytest.raises(IntegrityError, match="expected"):
        load(packed)


def test_a_missing_weight_is_an_error_on_the_fly(model_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
        load(tmp_path / "model", quantization_config=NeuqiConfig(bits=4, group_size=32))


def test_a_recipe_for_other_bits_is_an_error(model_folder: Folder, tmp_path: Path) -> None:
    packed = pack(model_folder("llama"), tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="expected"):
        load(packed)
    (packed / "neuqi_manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"q_proj\.qweight"):
        load(packed)


def test_a_folder_of_another_format_version_is_an_error(model_folder: Folder, tmp_path: Path) -> None:
    packed = pack(model_folder("llama"), tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="format_version"):
        load(packed)


def test_stacked_weights_of_another_kind_are_refused(model_folder: Folder) -> None:
    from neuqi_serve.hf.layer_choice import packed_layers

    model = load(model_folder("llama"))
    model.model.layers[0].mlp.bank = torch.nn.Parameter(torch.zeros(2, 3, 32))
    with pytest.raises(UnsupportedModelError, match=r"stacked weights such as model\.layers\.0\.mlp\.bank"):
        packed_layers(model, NeuqiConfig(bits=4, group_size=32).recipe)


def test_experts_of_rows_that_cannot_be_packed_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = settings | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings)).save_pretrained(
        tmp_path / "moe"
    )
    with pytest.raises(UsageError, match="multiple of 32"):
        load(tmp_path / "moe", quantization_config=NeuqiConfig(bits=4, group_size=32))
    model = load(tmp_path / "moe")
    assert model.dtype == torch.float32


def test_experts_are_not_de_quantized(model_folder: Folder) -> None:
    model = load(model_folder("qwen3_moe"), quantization_config=NeuqiConfig(bits=4, group_size=32))
    with pytest.raises(UnsupportedModelError, match="experts"):
        model.dequantize()


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        load(tmp_path / "gpt2", quantization_config=NeuqiConfig(bits=4, group_size=32))


def test_float16_scales_stay_when_the_model_is_loaded_in_another_dtype(
    model_folder: Folder, tmp_path: Path
) -> None:
    model = load(pack(model_folder("llama"), tmp_path / "packed"), dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.scale.dtype == torch.float16
    assert logits(model).dtype == torch.bfloat16
