from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.errors import UsageError
from neuqi_serve.quality import tasks
from neuqi_serve.quality.evaluated_model import open_model

NO_LM_EVAL = "needs lm-eval: pip install --no-deps -r requirements/eval.txt"


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("lm_eval", "accelerate", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(NO_LM_EVAL)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def lambada(folder: Path) -> str:
    lines = [{"text": f"the fox number {n} saw the dog and the dog saw the fox"} for n in range(6)]
    (folder / "lambada.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"lambada:{folder / 'lambada.jsonl'}"


def piqa(folder: Path, labels: str = "0\n1\n0\n") -> str:
    lines = [{"goal": f"eat {n}", "sol1": "with a spoon", "sol2": "with a shoe"} for n in range(3)]
    (folder / "valid.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "valid-labels.lst").write_text(labels)
    return f"piqa:{folder}"


@pytest.mark.usefixtures("lm_eval")
def test_local_data_is_scored_for_each_model(made: Any, tmp_path: Path) -> None:
    base = open_model(made.base)
    models = (open_model(made.packed).load(), base.load())
    names = (lambada(tmp_path), piqa(tmp_path))
    scores = tasks.run_tasks(models, base.tokenizer(), names, limit=3)
    assert len(scores) == 2
    for found in scores:
        assert set(found) == {"lambada_local", "piqa_local"}
        assert found["lambada_local"]["perplexity"] > 1
        assert found["piqa_local"]["acc"] * 3 == pytest.approx(round(found["piqa_local"]["acc"] * 3))
    assert scores[0]["lambada_local"]["perplexity"] != scores[1]["lambada_local"]["perplexity"]


@pytest.mark.usefixtures("lm_eval")
def test_a_task_that_does_not_exist_is_refused(made: Any, tmp_path: Path) -> None:
    base = open_model(made.base)
    with pytest.raises(UsageError, match="no_such_task"):
        tasks.run_tasks((), base.tokenizer(), ("no_such_task",))
    with pytest.raises(UsageError, match="no such file"):
        tasks.run_tasks((), base.tokenizer(), (str(tmp_path / "none.yaml"),))


def test_local_data_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        tasks._task("lambada:no/such/file", tmp_path, 0)
    with pytest.raises(UsageError, match="label 0 or 1"):
        tasks._task(piqa(tmp_path, "0\n1\n"), tmp_path, 0)
    (tmp_path / "other.jsonl").write_text('{"question": 1}')
    with pytest.raises(UsageError, match="text"):
        tasks._task(f"lambada:{tmp_path / 'other.jsonl'}", tmp_path, 0)
    (tmp_path / "other.jsonl").write_text("question")
    with pytest.raises(UsageError, match="JSON lines"):
        tasks._task(f"lambada:{tmp_path / 'other.jsonl'}", tmp_path, 0)


def test_without_the_package_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"requirements/eval\.txt"):
        tasks.require_lm_eval()
