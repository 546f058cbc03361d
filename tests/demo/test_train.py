from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from neuqi_serve.demo import model_path
from neuqi_serve.errors import UsageError

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from tokenizers import Tokenizer  # noqa: E402

from neuqi_serve.demo.network import Network, NetworkShape  # noqa: E402
from neuqi_serve.demo.tokens import ASSISTANT_ID, BOS_ID, END_ID, PAD_ID, ChatRows  # noqa: E402
from neuqi_serve.demo.train import TrainConfig, train  # noqa: E402
from neuqi_serve.demo.workers import run_workers  # noqa: E402

SHAPE = NetworkShape(hidden_size=128, intermediate_size=128, layers=1, heads=2, kv_heads=1, max_positions=128)
CONFIG = TrainConfig(seed=5, steps=3, blocks=((2, 64), (1, 128)), warmup=2)


def folder(path: Path) -> Path:
    path.mkdir()
    shutil.copy(model_path() / "tokenizer.json", path / "tokenizer.json")
    return path


def test_a_resumed_run_gives_identical_weights_and_files(tmp_path: Path) -> None:
    whole, halves = folder(tmp_path / "whole"), folder(tmp_path / "halves")
    train(whole, CONFIG, SHAPE)
    train(halves, CONFIG, SHAPE, stop=1)
    train(halves, CONFIG, SHAPE, resume=True)
    first, second = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (whole, halves))
    assert first["done"] == second["done"] == 3
    for name, value in first["network"].items():
        assert torch.equal(value, second["network"][name]), name
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / "model" / name).read_bytes() == (halves / "model" / name).read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=2, blocks=((2, 64), (2, 128)))
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    train(one, config, SHAPE)
    run_workers(2, train, two, config, SHAPE)
    first, second = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (one, two))
    for name, value in first["network"].items():
        torch.testing.assert_close(value, second["network"][name], atol=0.02, rtol=0)
    assert first["done"] == second["done"] == 2


def test_weights_depend_on_the_seed(tmp_path: Path) -> None:
    runs = [
        train(folder(tmp_path / str(seed)), dataclasses.replace(CONFIG, seed=seed, steps=1), SHAPE)
        for seed in (0, 1)
    ]
    assert not torch.equal(*(run.network.model.embed_tokens.weight for run in runs))


def test_a_folder_with_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    out = folder(tmp_path / "out")
    with pytest.raises(UsageError, match="start without --resume"):
        train(out, CONFIG, SHAPE, resume=True)
    train(out, CONFIG, SHAPE, stop=1)
    with pytest.raises(UsageError, match="continue with --resume"):
        train(out, CONFIG, SHAPE)
    with pytest.raises(UsageError, match="expected a checkpoint of seed 6, got 5"):
        train(out, dataclasses.replace(CONFIG, seed=6), SHAPE, resume=True)


def test_the_rate_warms_up_stays_and_falls() -> None:
    config = TrainConfig(steps=1000, warmup=10, decay_share=0.3)
    assert config.factor(0) == pytest.approx(0.1)
    assert config.factor(9) == config.factor(500) == config.factor(699) == 1.0
    assert config.factor(850) == pytest.approx(0.5)
    assert 0 < config.factor(999) <= 0.01


def test_rows_are_whole_chats_and_targets_are_answers() -> None:
    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    rows = ChatRows(tokenizer, "test")
    for _ in range(20):
        row = rows.row(128)
        assert len(row.tokens) == 128
        assert row.tokens[0] == BOS_ID
        assert [row.tokens[position + 1] for position in row.sources] == row.targets
        assert row.tokens.count(ASSISTANT_ID) == row.targets.count(END_ID)
        assert PAD_ID not in row.targets
    assert ChatRows(tokenizer, "a").row(64) == ChatRows(tokenizer, "a").row(64)


def test_a_row_longer_than_the_positions_is_refused() -> None:
    network = Network(SHAPE)
    with pytest.raises(ValueError, match="expected at most 128 tokens in a row, got 129"):
        network(torch.zeros(1, 129, dtype=torch.int64), torch.arange(4))
