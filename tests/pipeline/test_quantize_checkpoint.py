from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neuqi_kernels.reference import dequantize
from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.errors import DoesNotFitError, IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.pipeline import quantize_checkpoint as module
from neuqi_serve.pipeline.quantize_checkpoint import (
    QuantizationSettings,
    other_files,
    quantize_checkpoint,
    relative_error,
)
from neuqi_serve.quant.quantize import quantize_packed, quantize_weight

FIRST_UP, UP = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


def settings(bits: int = 3, group_size: int = 32, **changes: Any) -> QuantizationSettings:
    scale_dtype = changes.pop("scale_dtype", "float16")
    return QuantizationSettings(WeightSpec(bits, group_size, scale_dtype), **{"preset": "minmax", **changes})


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("shards", "preset"), [(1, "balanced"), (3, "minmax")])
def test_packed_checkpoint_holds_what_the_quantizer_gives(
    write_llama: Callable[..., Path], tmp_path: Path, shards: int, preset: str
) -> None:
    source = write_llama(layers=1, shards=shards)
    quantize_checkpoint(source, tmp_path / "out", settings(preset=preset))
    checkpoint = open_checkpoint(tmp_path / "out")
    checkpoint.verify()
    original = all_tensors(source)
    packed = checkpoint.read_module(FIRST_UP)
    expected = quantize_weight(original[f"{FIRST_UP}.weight"], WeightSpec(3, 32), preset=preset)
    assert torch.equal(packed.scale, expected.scale)
    assert torch.equal(packed.zero, expected.zero)
    restored = dequantize(packed.qweight, packed.scale, packed.zero, 3, 32)
    columns = torch.arange(64) // 32
    by_hand = (expected.codes - expected.zero.float()[:, columns]) * expected.scale.float()[:, columns]
    assert torch.equal(restored, by_hand)
    kept = {name for name in original if name.removesuffix(".weight") not in checkpoint.manifest.modules}
    assert "model.norm.weight" in kept
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & kept
    head = checkpoint.read_module("lm_head")
    eight = quantize_weight(original["lm_head.weight"], WeightSpec(8, 32), preset=preset)
    assert torch.equal(head.scale, eight.scale)
    assert head.qweight.shape == (48, 64 * 8 // 32)
    assert all(torch.equal(checkpoint.read(name), original[name]) for name in kept)
    assert {
        n for n in checkpoint.expected_tensors() if n.rpartition(".")[2] not in ("qweight", "scale", "zero")
    } == kept


def test_same_model_gives_the_same_bytes(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = write_llama()
    for name in ("one", "two"):
        quantize_checkpoint(source, tmp_path / name, settings())
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")
    ]
    assert contents[0] == contents[1]


def test_shards_of_the_source_do_not_change_the_tensors(
    write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    for name, shards in (("one", 1), ("two", 2)):
        quantize_checkpoint(write_llama(f"source-{name}", shards=shards), tmp_path / name, settings())
    single = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == single


def test_output_is_sharded_on_request(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    quantize_checkpoint(write_llama(), tmp_path / "out", settings(shard_bytes=20_000))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    open_checkpoint(tmp_path / "out").verify()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "scale_dtype"), [(32, "bfloat16"), (-1, "float32")])
def test_every_width_round_trips(
    write_llama: Callable[..., Path], tmp_path: Path, bits: int, group_size: int, scale_dtype: str
) -> None:
    source = write_llama(layers=1)
    summary = quantize_checkpoint(
        source, tmp_path / "out", settings(bits, group_size, scale_dtype=scale_dtype)
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    checkpoint.verify()
    name = "model.layers.0.mlp.down_proj"
    packed = checkpoint.read_module(name)
    weight = all_tensors(source)[f"{name}.weight"].float()
    restored = dequantize(packed.qweight, packed.scale, packed.zero, bits, group_size)
    # Round to nearest on 2^b levels over the range of a group: half a step, plus the rounding of scale and zero.
    step = (weight.max() - weight.min()) / (2**bits - 1)
    slack = 0.02 * weight.abs().max()
    assert (restored - weight).abs().max() <= step / 2 + slack
    error = checkpoint.manifest.modules[name].relative_error
    assert error == pytest.approx(float((restored - weight).norm() / weight.norm()), rel=1e-4)
    # Seven linear layers, output head and embedding.
    assert summary.total.layers == 9


@pytest.mark.parametrize(("bits", "tensors"), [(16, {"weight"}), (4, {"qweight", "scale", "zero"})])
def test_tied_embeddings_are_stored_once(
    write_llama: Callable[..., Path], tmp_path: Path, bits: int, tensors: set[str]
) -> None:
    wanted = settings(vocabulary=VocabularyBits(lm_head=bits))
    quantize_checkpoint(write_llama(tied=True), tmp_path / "out", wanted)
    checkpoint = open_checkpoint(tmp_path / "out")
    checkpoint.verify()
    expected = checkpoint.expected_tensors()
    assert {f"model.embed_tokens.{part}" for part in tensors} <= set(expected)
    assert not any(name.startswith("lm_head") for name in expected)
    assert checkpoint.config["tie_word_embeddings"] is True


def test_a_head_of_its_own_is_declared_untied(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = write_llama(config={"tie_word_embeddings": True})
    quantize_checkpoint(source, tmp_path / "out", settings())
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "lm_head.qweight" in checkpoint.expected_tensors()


def test_tokenizer_and_templates_go_along_but_weights_do_not(
    write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = write_llama()
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", ".hidden", "LICENSE"):
        (source / name).touch()
    (source / "onnx").mkdir()
    quantize_checkpoint(source, tmp_path / "out", settings())
    copied = {path.name for path in other_files(source)}
    assert copied == {"tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"}
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert copied < {path.name for path in (tmp_path / "out").iterdir()}


def test_layers_that_do_not_fit_are_in_the_summary_and_keep_their_weight(
    write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    odd = {f"model.layers.{layer}.mlp.down_proj.weight": torch.ones(64, 88) for layer in (0, 1)}
    summary = quantize_checkpoint(write_llama(tensors=odd), tmp_path / "out", settings(group_size=64))
    assert len(summary.unfit) == 2
    assert "left unquantized: 2 × down_proj" in summary.to_table()
    assert "model.layers.0.mlp.down_proj.weight" in open_checkpoint(tmp_path / "out").expected_tensors()
    open_checkpoint(tmp_path / "out").verify()


def test_fused_attention_of_phi3_is_one_module(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    attention = {f"model.layers.0.self_attn.{name}_proj.weight": None for name in "qkv"}
    fused = {"model.layers.0.self_attn.qkv_proj.weight": torch.randn(128, 64)}
    source = write_llama(
        layers=1, config={"architectures": ["Phi3ForCausalLM"]}, tensors={**attention, **fused}
    )
    quantize_checkpoint(source, tmp_path / "out", settings())
    assert open_checkpoint(tmp_path / "out").manifest.modules["model.layers.0.self_attn.qkv_proj"].shape == (
        128,
        64,
    )


def test_manifest_names_the_source(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = write_llama("my-model")
    quantize_checkpoint(source, tmp_path / "out", settings())
    manifest = open_checkpoint(tmp_path / "out").manifest
    size = (source / "model.safetensors").stat().st_size
    assert manifest.source == {
        "name": "my-model",
        "architecture": "LlamaForCausalLM",
        "files": {"model.safetensors": size},
    }
    assert str(tmp_path) not in (tmp_path / "out" / "neuqi_manifest.json").read_text()


def test_summary_counts_every_byte(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = write_llama()
    summary = quantize_checkpoint(source, tmp_path / "out", settings())
    assert summary.source_bytes == sum(tensor.nbytes for tensor in all_tensors(source).values())
    assert summary.packed_bytes == sum(tensor.nbytes for tensor in all_tensors(tmp_path / "out").values())
    linear = [group for group in summary.groups if group.bits == 3]
    vocabulary = [group for group in summary.groups if group.bits == 8]
    assert {group.kind for group in vocabulary} == {"lm_head", "embed_tokens"}
    assert all(group.bits_per_weight == pytest.approx(4.0) for group in linear)
    assert all(group.bits_per_weight == pytest.approx(9.0) for group in vocabulary)


def test_relative_error_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(17, 64, generator=torch.Generator().manual_seed(0))
    spec = WeightSpec(2, 32)
    packed = quantize_packed(weight, spec, preset="minmax")
    restored = dequantize(packed.qweight, packed.scale, packed.zero, 2, 32)
    expected = float((restored - weight).norm() / weight.norm())
    assert relative_error(weight, packed, spec) == pytest.approx(expected)
    monkeypatch.setattr(module, "_ERROR_CHUNK_WEIGHTS", 130)
    assert relative_error(weight, packed, spec) == pytest.approx(expected)


def test_relative_error_of_zeros_is_zero() -> None:
    weight, spec = torch.zeros(3, 32), WeightSpec(2, 32)
    assert relative_error(weight, quantize_packed(weight, spec, preset="minmax"), spec) == 0.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_interruption_leaves_nothing(
    write_llama: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    source, calls = write_llama(), []

    def fail_at_the_fifth(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            assert (tmp_path / ".out.partial" / "model.safetensors").exists()
            raise error
        return quantize_packed(*args, **kwargs)

    monkeypatch.setattr(module, "quantize_packed", fail_at_the_fifth)
    with pytest.raises(error):
        quantize_checkpoint(source, tmp_path / "out", settings())
    assert os.listdir(tmp_path) == [source.name]


def test_failed_overwrite_keeps_the_old_checkpoint(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    quantize_checkpoint(write_llama("good"), tmp_path / "out", settings())
    weight = torch.full((96, 64), float("nan"))
    damaged = write_llama("damaged", tensors={f"{UP}.weight": weight})
    with pytest.raises(IntegrityError, match=f"finite weights in {UP}.weight .* got {96 * 64}"):
        quantize_checkpoint(damaged, tmp_path / "out", settings(overwrite=True))
    checkpoint = open_checkpoint(tmp_path / "out")
    checkpoint.verify()
    assert checkpoint.manifest.source["name"] == "good"
    assert {path.name for path in tmp_path.iterdir()} == {"good", "damaged", "out"}


def test_overwrite_replaces_the_old_checkpoint(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = write_llama()
    quantize_checkpoint(source, tmp_path / "out", settings(3))
    with pytest.raises(UsageError, match="--overwrite"):
        quantize_checkpoint(source, tmp_path / "out", settings(4))
    quantize_checkpoint(source, tmp_path / "out", settings(4, overwrite=True))
    assert open_checkpoint(tmp_path / "out").recipe.spec.bits == 4


@pytest.mark.parametrize("place", [".", "..", "sub/.."])
def test_destination_that_holds_the_model_is_refused(write_llama: Callable[..., Path], place: str) -> None:
    source = write_llama()
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(UsageError, match="apart from the model"):
        quantize_checkpoint(source, source / place, settings(overwrite=True))
    assert sorted(path.name for path in source.iterdir()) == before


def test_packed_checkpoint_is_no_source(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    quantize_checkpoint(write_llama(), tmp_path / "out", settings())
    with pytest.raises(UnsupportedModelError, match="'neuqi'"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", settings())
    assert not (tmp_path / "again").exists()


def test_scale_beyond_the_storage_dtype_is_an_error(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    weight = torch.tensor([-1e7, 1e7]).repeat(96, 32)
    source = write_llama(tensors={f"{UP}.weight": weight})
    with pytest.raises(UsageError, match=f"scales of {UP} within the range of float16"):
        quantize_checkpoint(source, tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()


def test_full_disk_is_told_before_any_work(
    write_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_llama()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))  # type: ignore[attr-defined]
    with pytest.raises(DoesNotFitError, match="free disk space"):
        quantize_checkpoint(source, tmp_path / "deep" / "out", settings())
    assert os.listdir(tmp_path) == [source.name]


@pytest.mark.parametrize(
    ("change", "part"), [({"preset": "best"}, "preset"), ({"device": "cuda"}, "--device cpu")]
)
def test_unusable_setting_is_an_error(
    write_llama: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    part: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=part):
        quantize_checkpoint(write_llama(), tmp_path / "out", settings(**change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_search_on_a_gpu_gives_as_good_a_checkpoint(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = write_llama(layers=1)
    errors = []
    for device in ("cpu", "cuda"):
        quantize_checkpoint(source, tmp_path / device, settings(preset="balanced", device=device))
        checkpoint = open_checkpoint(tmp_path / device)
        checkpoint.verify()
        errors.append(checkpoint.manifest.modules[FIRST_UP].relative_error)
    # Sums in another order move a few weights across a rounding border, never the quality.
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


def test_truncated_shard_leaves_nothing(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = write_llama(shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="truncated"):
        quantize_checkpoint(source, tmp_path / "out", settings())
    assert os.listdir(tmp_path) == [source.name]


def test_earlier_weights_are_released(
    write_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def count_alive(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(weight))
        return quantize_packed(weight, *args, **kwargs)

    monkeypatch.setattr(module, "quantize_packed", count_alive)
    quantize_checkpoint(write_llama(), tmp_path / "out", settings())
    assert alive == [0] * 16
