"""Folders in, figures out; the figures against a plain computation on the same windows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.quality.card import write_card
from neuqi_serve.quality.evaluate_folder import EvaluationSettings, evaluate_folder
from neuqi_serve.quality.evaluated_model import open_model
from neuqi_serve.quality.report import read_report, to_table
from neuqi_serve.quality.text import read_windows

SMALL = EvaluationSettings(context=32, tokens=320)
# Both are sums of float32 logits' log-probabilities in float64, batched differently.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def body(made: Any) -> dict[str, Any]:
    return evaluate_folder(made.packed, made.base, [made.text], SMALL).to_dict()


@torch.no_grad()
def test_the_figures_are_those_of_a_plain_computation(made: Any, body: dict[str, Any]) -> None:
    folder, base_folder = open_model(made.packed), open_model(made.base)
    model, base = folder.load(), base_folder.load(torch.float32)
    windows = read_windows([made.text], base_folder.tokenizer(), 32, 320)
    divergences, agreements, losses, base_losses = [], [], [], []
    for window in windows:
        ids = torch.tensor([window.tokens])
        p, q = (one(ids).logits[0, :-1].double().log_softmax(-1) for one in (base, model))
        divergences.append((p.exp() * (p - q)).sum(-1))
        agreements.append((p.argmax(-1) == q.argmax(-1)).double())
        losses.append(-q.gather(1, ids[0, 1:, None])[:, 0])
        base_losses.append(-p.gather(1, ids[0, 1:, None])[:, 0])
    kld = torch.cat(divergences)
    metrics = body["metrics"]
    assert body["text"]["tokens"] == len(kld) == 310
    assert metrics["kld_mean"]["value"] == pytest.approx(float(kld.mean()), rel=TOLERANCE)
    assert metrics["kld_median"]["value"] == pytest.approx(
        float(kld.sort().values[len(kld) // 2 - 1]), rel=TOLERANCE
    )
    assert metrics["top1_agreement"]["value"] == pytest.approx(float(torch.cat(agreements).mean()))
    assert metrics["perplexity"]["value"] == pytest.approx(
        math.exp(float(torch.cat(losses).mean())), rel=TOLERANCE
    )
    assert body["base_perplexity"]["value"] == pytest.approx(
        math.exp(float(torch.cat(base_losses).mean())), rel=TOLERANCE
    )


def test_the_noise_floor_lies_below(body: dict[str, Any]) -> None:
    assert 0 < body["noise_floor"]["kld_mean"]["value"] < 0.1 * body["metrics"]["kld_mean"]["value"]


def test_sizes_are_those_of_the_folders(made: Any, body: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(made.packed)
    assert body["model"]["bytes"] == sum(spec.nbytes for spec in checkpoint.expected_tensors().values())
    linear = sum(m.packed_bytes for m in checkpoint.manifest.modules.values())
    weights = sum(math.prod(m.shape) for m in checkpoint.manifest.modules.values())
    assert body["model"]["bits_per_weight"] == pytest.approx(8 * linear / weights, abs=1e-4)
    assert body["base"]["average_bits"] == 32.0


def test_a_model_against_itself_has_no_divergence(made: Any) -> None:
    found = evaluate_folder(made.base, made.base, [made.text], EvaluationSettings(32, 100, noise_floor=False))
    assert found.measurement.noise is None
    assert found.measurement.model.kld_mean.value < 1e-9
    assert found.measurement.model.top1_agreement.value == 1.0
    assert found.measurement.model.perplexity_ratio.value == pytest.approx(1.0)
    assert "bf16" in to_table(found.to_dict())


def test_the_table_fits_80_columns_and_has_no_colours(body: dict[str, Any]) -> None:
    tasks = {"arc_easy": {"acc": 0.51234, "acc_stderr": 0.0123, "perplexity": 123456.7}}
    text = to_table({**body, "tasks": {"model": tasks, "base": tasks}})
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "0.5123 ± 0.012" in text


def test_the_same_call_gives_the_same_report(made: Any, body: dict[str, Any]) -> None:
    again = evaluate_folder(made.packed, made.base, [made.text], SMALL).to_dict()
    assert json.dumps(again) == json.dumps(body)


def test_what_does_not_belong_together_is_refused(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="original model for --against"):
        evaluate_folder(made.base, made.packed, [made.text], SMALL)
    with pytest.raises(UsageError, match="at most 64"):
        evaluate_folder(made.packed, made.base, [made.text], EvaluationSettings(context=65))
    with pytest.raises(UnsupportedModelError, match="no such folder"):
        evaluate_folder(tmp_path / "none", made.base, [made.text], SMALL)
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=1)  # fmt: skip
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="one vocabulary"):
        evaluate_folder(tmp_path / "other", made.base, [made.text], SMALL)
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        evaluate_folder(made.packed, tmp_path / "other", [made.text], SMALL)


def test_a_card_tells_where_the_model_comes_from(made: Any, body: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(made.packed, folder)
    files = write_card(folder, body)
    assert read_report(folder / "neuqi_quality.json") == body
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: base\n")
    assert "neuqi quantize base -o packed --bits 3 --group-size 32\n" in card
    assert f"{body['metrics']['kld_mean']['value']:.4g}" in card
    open_checkpoint(folder).verify()
    assert files == [folder / "neuqi_quality.json", folder / "README.md"]

    section = card[card.index("<!--") :]
    (folder / "README.md").write_text(f"# Mine\n\n{section}\nThe end.\n")
    write_card(folder, {**body, "tasks": {"model": {"piqa": {"acc": 0.75}}, "base": {"piqa": {"acc": 0.8}}}})
    card = (folder / "README.md").read_text()
    assert card.startswith("# Mine\n")
    assert card.endswith("The end.\n")
    assert card.count("## Quality") == 1
    assert "| piqa, acc (original: 0.8000) | 0.7500 |" in card
    open_checkpoint(folder).verify()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_card_belongs_to_a_packed_folder(made: Any, body: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="packed checkpoint"):
        write_card(made.base, body)
    assert not (made.base / "neuqi_quality.json").exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"format": "neuqi-eval", "format_version": 7}'])
def test_other_json_is_no_report(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(IntegrityError, match="expected"):
        read_report(tmp_path / "a.json")
    with pytest.raises(UsageError, match="no such file"):
        read_report(tmp_path / "b.json")
