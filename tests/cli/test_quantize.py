from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neuqi_serve.cli.main import main
from neuqi_serve.format.reader import open_checkpoint

FAST = ["--group-size", "32", "--preset", "minmax", "--device", "cpu"]


def test_quantize_writes_a_checkpoint_and_prints_a_table(
    write_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(write_llama()), "-o", str(tmp_path / "out"), "--bits", "3", *FAST]) == 0
    captured = capsys.readouterr()
    assert "down_proj" in captured.out
    assert captured.out.endswith(f"written to {tmp_path / 'out'}\n")
    checkpoint = open_checkpoint(tmp_path / "out")
    checkpoint.verify()
    assert checkpoint.recipe.spec.bits == 3


def test_options_reach_the_checkpoint(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--bits", "2", "--group-size", "-1", "--scale-dtype", "float32", "--preset", "minmax"]
    assert main(["quantize", str(write_llama()), "-o", str(tmp_path / "out"), *options]) == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = checkpoint.recipe.spec
    assert (spec.bits, spec.group_size, spec.scale_dtype) == (2, -1, "float32")
    assert checkpoint.manifest.quantization["preset"] == "minmax"


def test_json_summary_is_all_of_stdout(
    write_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(write_llama()), "-o", str(tmp_path / "out"), "--json", *FAST]) == 0
    body = json.loads(capsys.readouterr().out)
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert body["bytes_after"] == size
    assert body["layers"] == 16
    assert body["output"] == str(tmp_path / "out")


def test_demo_is_the_bundled_model(
    write_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_llama("bundled")
    monkeypatch.setattr("neuqi_serve.demo.model_path", lambda: source)
    assert main(["quantize", "demo", "-o", str(tmp_path / "out"), *FAST]) == 0
    assert open_checkpoint(tmp_path / "out").manifest.source["name"] == "bundled"


def test_the_vocabulary_has_options_of_its_own(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--lm-head-bits", "4", "--embedding-bits", "16"]
    assert main(["quantize", str(write_llama()), "-o", str(tmp_path / "out"), *FAST, *options]) == 0
    recipe = open_checkpoint(tmp_path / "out").recipe
    assert recipe.spec_of("lm_head").bits == 4
    assert recipe.keeps("model.embed_tokens")


def test_overwrite_is_asked_for(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    command = ["quantize", str(write_llama()), "-o", str(tmp_path / "out"), *FAST]
    assert main(command) == 0
    assert main([*command, "--bits", "8"]) == 2
    assert open_checkpoint(tmp_path / "out").recipe.spec.bits == 4
    assert main([*command, "--bits", "8", "--overwrite"]) == 0
    assert open_checkpoint(tmp_path / "out").recipe.spec.bits == 8


@pytest.mark.parametrize(
    "option", [["--bits", "5"], ["--group-size", "100"], ["--preset", "x"], ["--bits", "three"]]
)
def test_value_outside_the_set_is_a_usage_error(
    write_llama: Callable[..., Path], tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(write_llama()), "-o", str(tmp_path / "out"), *option]) == 2
    assert option[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def break_nothing_there(source: Path) -> None:
    (source / "config.json").unlink()


def break_architecture(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))


def break_missing_shard(source: Path) -> None:
    (source / "model-00001-of-00002.safetensors").unlink()


def break_truncated_shard(source: Path) -> None:
    shard = source / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])


def break_shape(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))


@pytest.mark.parametrize(
    ("damage", "group_size", "code"),
    [
        (break_nothing_there, 32, 4),
        (break_architecture, 32, 4),
        (break_missing_shard, 32, 5),
        (break_truncated_shard, 32, 5),
        (break_shape, 32, 5),
        (lambda source: None, 128, 2),
    ],
)
def test_bad_input_is_one_message_a_code_and_no_output(
    write_llama: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    group_size: int,
    code: int,
) -> None:
    source = write_llama(shards=2)
    damage(source)
    assert (
        main(["quantize", str(source), "-o", str(tmp_path / "out"), "--group-size", str(group_size)]) == code
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: expected") or captured.err.startswith(f"error: {source}")
    assert captured.err.count("\n") == 1
    assert os.listdir(tmp_path) == [source.name]


def test_command_line_program_exits_with_the_code_of_the_verb() -> None:
    command = [sys.executable, "-m", "neuqi_serve.cli.main", "quantize", "somewhere", "--bits", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_terminated_program_leaves_nothing(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = write_llama()
    # The search is replaced by a wait: the signal must come while the output is half-written.
    script = (
        "import sys, time\nfrom neuqi_serve.pipeline import quantize_checkpoint as pipeline\n"
        "def wait(*a, **k):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "pipeline.quantize_packed = wait\nfrom neuqi_serve.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "quantize", str(source), "-o", str(tmp_path / "out"), *FAST]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    assert (tmp_path / ".out.partial").is_dir()
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait() == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == [source.name]


def test_automatic_device_without_a_gpu_is_the_processor(
    write_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = str(write_llama())
    assert (
        main(["quantize", source, "-o", str(tmp_path / "out"), "--group-size", "32", "--preset", "minmax"])
        == 0
    )
    command = ["quantize", source, "-o", str(tmp_path / "gpu"), "--group-size", "32", "--device", "cuda"]
    assert main(command) == 2


@pytest.fixture
def model_with_tokenizer(write_llama: Callable[..., Path]) -> Path:
    """A tiny Llama that reads bytes, modulo the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    source = write_llama(config={"max_position_embeddings": 32})
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet[:size])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(source)
    (source / "chat_template.jinja").unlink(missing_ok=True)
    return source


def test_a_text_calibrates(
    model_with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("abcd efgh, and more of it. " * 40)
    command = ["quantize", str(model_with_tokenizer), *FAST, "--samples", "4", "--calibrate"]
    for text, options in ((str(tmp_path / "text"), []), ("builtin", ["--rounding", "rtn", "--no-refit"])):
        out = tmp_path / f"out{len(options)}"
        assert main([*command, text, "-o", str(out), *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["resumed_blocks"] == 0
        checkpoint = open_checkpoint(out)
        checkpoint.verify()
        described = checkpoint.manifest.quantization["calibration"]
        assert described["rounding"] == ("rtn" if options else "ldlq")
        assert described["refit"] == (not options)
        assert (described["rounds"], described["sweeps"]) == ((1, 0) if options else (3, 4))
        assert described["tokens"] >= 64
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out0", "out3"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rotate"], "--calibrate FILE"),
        (["--calibrate", "builtin", "--importance", "file"], "got both"),
        (["--calibrate", "nowhere"], "no such file"),
        (["--calibrate", "generation_config.json"], "Give a longer text"),
    ],
)
def test_calibration_options_that_do_not_go_together(
    model_with_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(model_with_tokenizer)
    assert main(["quantize", ".", "-o", str(tmp_path / "out"), *FAST, *options]) == 2
    assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == [model_with_tokenizer.name]


def test_calibration_of_a_model_without_a_tokenizer(
    write_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(write_llama()), "-o", str(tmp_path / "out"), *FAST, "--calibrate", "builtin"]
    assert main(command) == 4
    assert "expected a tokenizer" in capsys.readouterr().err
