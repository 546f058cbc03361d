from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuqi_kernels.reference import dequantize
from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.source import open_source
from neuqi_serve.pipeline import calibrate as module
from neuqi_serve.pipeline.calibrate import CalibrationRecipe, batches, quantize_with_text
from neuqi_serve.pipeline.experts import stacked_experts
from neuqi_serve.pipeline.journal import Journal
from neuqi_serve.pipeline.rotated import rotated_source
from neuqi_serve.quant.calibrated import RoundingRecipe

MODELS = runpy.run_path(str(Path(__file__).with_name("small_models.py")))
FAMILIES, write_model, tokens = MODELS["FAMILIES"], MODELS["write_model"], MODELS["tokens"]
# Two implementations of the same float32 sums.
FLOAT32_FORWARD = 2e-4


def recipe(bits: int = 3, **changes: Any) -> CalibrationRecipe:
    rounding = RoundingRecipe(
        "minmax", **{name: changes.pop(name) for name in ("rounding", "refit") if name in changes}
    )
    return CalibrationRecipe(WeightSpec(bits, 32), rounding, vocabulary=VocabularyBits(16, 16), **changes)


def weights(folder: Path) -> dict[str, Tensor]:
    """De-quantized weights of a packed folder by module."""
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    found = {}
    for name, packed in checkpoint.manifest.modules.items():
        stored = checkpoint.read_module(name)
        spec = packed.spec
        found[name] = dequantize(stored.qweight, stored.scale, stored.zero, spec.bits, spec.group_size)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    for name, value in values.items():
        found = modules.get(name) or modules[f"model.{name}"]
        found.weight.data.copy_(value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_walked_as_transformers_runs_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(family, tmp_path / "model")
    saved: list[Mapping[str, Tensor]] = []
    original = Journal.save

    def save(self: Journal, block: int, packed: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        saved.append(dict(states))
        original(self, block, packed, states)

    monkeypatch.setattr(Journal, "save", save)
    ids = tokens()
    quantize_with_text(tmp_path / "model", tmp_path / "packed", recipe(correction=0.5), ids)
    found = weights(tmp_path / "packed")
    stages = FAMILIES[family][2]
    assert sorted({name.rpartition(".")[2] for name in found}) == sorted(
        name for stage in stages for name in stage
    )
    blocks = model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)))
    outputs: list[Tensor] = []
    blocks[-1].register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=ids)
        put(model, found)
        model(input_ids=ids)
    for name, output in zip(("original.0", "quantized.0"), outputs, strict=True):
        scale = float(output.abs().max())
        torch.testing.assert_close(saved[-1][name], output, rtol=0, atol=FLOAT32_FORWARD * scale)


@pytest.mark.parametrize("family", MODELS["MIXTURES"])
def test_experts_are_calibrated_too(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(family, tmp_path / "model")
    saved: list[Mapping[str, Tensor]] = []
    calibrated: set[str] = set()
    original = Journal.save

    def save(self: Journal, block: int, packed: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        saved.append(dict(states))
        calibrated.update(name.rpartition(".")[0] for name in packed)
        original(self, block, packed, states)

    monkeypatch.setattr(Journal, "save", save)
    # Few tokens, so that some experts see almost none.
    ids = tokens(2, 6)
    quantize_with_text(tmp_path / "model", tmp_path / "packed", recipe(), ids)
    found = weights(tmp_path / "packed")
    assert calibrated == set(found)
    blocks = model.model.layers
    for number, block in enumerate(blocks):
        for experts in stacked_experts(block, f"model.layers.{number}", lambda name: name[:-7] in found):
            for expert in range(len(experts.names)):
                for name, part in experts.slices(expert).items():
                    part.data.copy_(found.pop(name))
    outputs: list[Tensor] = []
    blocks[-1].register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        put(model, found)
        model(input_ids=ids)
    scale = float(outputs[0].abs().max())
    torch.testing.assert_close(saved[-1]["quantized.0"], outputs[0], rtol=0, atol=FLOAT32_FORWARD * scale)


def test_widths_of_their_own_are_kept(tmp_path: Path) -> None:
    write_model("llama", tmp_path / "model")
    wider = {"model.layers.1.mlp.down_proj": WeightSpec(4, 32)}
    how = recipe(2, exceptions=wider, budget="--bits 2.2")
    quantize_with_text(tmp_path / "model", tmp_path / "out", how, tokens())
    manifest = open_checkpoint(tmp_path / "out").manifest
    widths = {name: packed.spec.bits for name, packed in manifest.modules.items()}
    assert {name for name, bits in widths.items() if bits == 4} == set(wider)
    assert manifest.quantization["budget"] == "--bits 2.2"
    with pytest.raises(UsageError, match="rotation or a budget"):
        recipe(2, budget="--bits 2.2", rotate=True)


@torch.no_grad()
def test_a_rotated_model_computes_the_same(tmp_path: Path) -> None:
    model = write_model("qwen3", tmp_path / "model")
    source = rotated_source(open_source(tmp_path / "model"))
    ids = tokens()
    expected = model(input_ids=ids).logits
    model.load_state_dict({name: source.read(name) for name in source.tensors})
    found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_FORWARD * float(expected.abs().max()))
    quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(4, rotate=True), ids)
    put(model, weights(tmp_path / "out"))
    close = model(input_ids=ids).logits
    assert float((close - expected).norm() / expected.norm()) < 0.5
    assert open_checkpoint(tmp_path / "out").manifest.quantization["calibration"]["rotate"]


def test_feedback_is_worth_something_and_the_manifest_says_how(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    ids = tokens(32, 32)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        errors = {}
        for rounding in ("rtn", "ldlq"):
            out = tmp_path / rounding
            quantize_with_text(
                tmp_path / "model", out, recipe(3, rounding=rounding, refit=rounding == "ldlq"), ids
            )
            put(model, weights(out))
            errors[rounding] = float((model(input_ids=ids).logits - expected).square().mean())
    assert errors["ldlq"] < 0.7 * errors["rtn"]
    described = open_checkpoint(tmp_path / "ldlq").manifest.quantization["calibration"]
    assert described["rounding"] == "ldlq"
    assert described["tokens"] == 32 * 32
    assert not list(tmp_path.glob(".*journal"))


class Interrupted(Exception):
    """What a test raises in the middle."""


def test_interrupted_at_every_block_boundary_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model("llama", tmp_path / "model", num_hidden_layers=3)
    ids, how = tokens(), recipe(correction=1.0)
    quantize_with_text(tmp_path / "model", tmp_path / "whole", how, ids)
    original = Journal.save

    def interrupted(self: Journal, *args: Any) -> None:
        original(self, *args)
        raise Interrupted

    monkeypatch.setattr(Journal, "save", interrupted)
    for _ in range(3):
        with pytest.raises(Interrupted):
            quantize_with_text(tmp_path / "model", tmp_path / "parts", how, ids)
        assert not (tmp_path / "parts").exists()
    run = quantize_with_text(tmp_path / "model", tmp_path / "parts", how, ids)
    assert run.resumed_blocks == 3
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from neuqi_serve.config import WeightSpec
from neuqi_serve.pipeline.calibrate import CalibrationRecipe, quantize_with_text
print("ready", flush=True)
quantize_with_text(Path(sys.argv[1]), Path(sys.argv[2]), CalibrationRecipe(WeightSpec(2, 32)), torch.load(sys.argv[3]))
"""


def test_killed_at_any_moment_the_result_is_the_same(tmp_path: Path) -> None:
    write_model("llama", tmp_path / "model", num_hidden_layers=4)
    torch.save(tokens(16, 32), tmp_path / "tokens.pt")

    def start(output: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-c",
            WORKER,
            *(str(tmp_path / name) for name in ("model", output, "tokens.pt")),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    began = time.monotonic()
    assert start("whole").wait() == 0
    whole = time.monotonic() - began
    kills = 0
    for share in (0.4, 0.8):
        process = start("parts")
        time.sleep(share * whole / 2)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    if not (tmp_path / "parts").exists():
        assert start("parts").wait() == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_another_recipe_or_text_does_not_resume_but_restarts_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model("llama", tmp_path / "model")
    ids = tokens()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_packed", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(), ids)
    with pytest.raises(UsageError, match=r"2 finished blocks.*recipe.*--restart"):
        quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(2), ids)
    with pytest.raises(UsageError, match="calibration"):
        quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(), tokens(seed=2))
    run = quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(2), ids, restart=True)
    assert run.resumed_blocks == 0
    assert open_checkpoint(tmp_path / "out").recipe.spec.bits == 2


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model("llama", tmp_path / "model", num_hidden_layers=3)
    resident: list[int] = []
    original = module.BlockCalibration.run

    def run(self: Any, states: Any) -> Any:
        resident.append(sum(p.numel() for p in holder[0].parameters() if p.device.type != "meta"))
        return original(self, states)

    holder: list[Any] = []
    built = module.BlockModel.__init__

    def build(self: Any, *args: Any) -> None:
        built(self, *args)
        holder.append(self.model)

    monkeypatch.setattr(module.BlockCalibration, "run", run)
    monkeypatch.setattr(module.BlockModel, "__init__", build)
    quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(), tokens())
    block = sum(p.numel() for p in holder[0].model.layers[0].parameters())
    assert resident == [block] * 3


def test_sequences_of_different_lengths_run_by_length() -> None:
    sequences = [torch.arange(length) for length in (5, 3, 5, 5, 2)]
    assert [tuple(batch.shape) for batch in batches(sequences, most=10)] == [(1, 2), (1, 3), (2, 5), (1, 5)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(2, 1, dtype=torch.int64), "at least 2 tokens"),
        (torch.zeros(0, 8, dtype=torch.int64), "0 sequences"),
        (torch.zeros(2, 8), "int64"),
        (torch.full((2, 8), 64), "0 to 63"),
        (torch.zeros(1, 65, dtype=torch.int64), "at most 64 tokens"),
    ],
)
def test_tokens_that_cannot_be_used_are_refused(tmp_path: Path, bad: Tensor, words: str) -> None:
    write_model("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=words):
        quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(), bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_model_that_overflows_is_reported_by_layer(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("inf"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises((UsageError, IntegrityError), match=r"layers\.1\.mlp"):
        quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(), tokens())


def test_a_second_run_for_the_same_folder_is_refused(tmp_path: Path) -> None:
    write_model("llama", tmp_path / "model")
    journal = Journal(tmp_path / "out", {})
    try:
        with pytest.raises(UsageError, match="another process"):
            quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(), tokens())
    finally:
        journal.close()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    state = model.state_dict()
    del state["model.layers.1.input_layernorm.weight"]
    model.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(UnsupportedModelError, match="input_layernorm"):
        quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(), tokens())


def test_summary_tells_memory_and_time(tmp_path: Path) -> None:
    write_model("llama", tmp_path / "model")
    body = quantize_with_text(tmp_path / "model", tmp_path / "out", recipe(), tokens()).to_dict()
    assert body["peak_bytes"] > 1 << 20
    assert body["seconds"] > 0
    assert body["resumed_blocks"] == 0
    assert json.dumps(body)
    assert os.listdir(tmp_path / "out")
