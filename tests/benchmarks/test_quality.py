import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Rounding of the printed and stored figures against one computed here from them.
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quality(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("harness", "quality_report", "quality"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("quality")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random model with the demo's layout and a tokenizer of its own."""
    from neuqi_serve.demo.export import write_model
    from neuqi_serve.demo.network import Network, NetworkShape
    from neuqi_serve.demo.tokens import train_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(400, sample=300)
    shape = NetworkShape(vocab_size=400, hidden_size=64, intermediate_size=128, layers=2, heads=1, kv_heads=1)
    write_model(folder, Network(shape), tokenizer)
    return folder


def figures(path):
    records = json.loads(path.read_text())["records"]
    return {(r["case"]["method"], r["metric"]): r for r in records}


def test_quick_run_measures_every_method_on_the_held_out_tasks(quality, tiny_model, tmp_path, capsys):
    quality.main(["--quick", "--model", str(tiny_model), "--count", "7", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(method in printed for method in ("bf16", *quality.METHODS))
    found = figures(tmp_path / "quality-tiny.json")
    assert found["bf16", "kl_divergence"]["value"] == 0.0
    for method in quality.METHODS:
        assert found[method, "bits_per_weight"]["value"] == 2.5
        assert found[method, "kl_divergence"]["value"] > 0.0
        assert 0.0 <= found[method, "task_accuracy"]["value"] <= 1.0
    ours, theirs = found["neuqi", "kl_divergence"], found["min-max", "kl_divergence"]
    assert ours["reference"] == "min-max"
    assert ours["ratio"] == pytest.approx(ours["value"] / theirs["value"], abs=TOLERANCE)
    assert found["neuqi", "mcnemar_p"]["value"] <= 1.0


def test_text_run_measures_divergence_and_perplexity_only(quality, tiny_model, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a child called Tom. " * 40)
    arguments = ["--quick", "--model", str(tiny_model), "--text", str(text), "--window", "64"]
    quality.main([*arguments, "--out", str(tmp_path)])
    found = figures(tmp_path / "quality-tiny.json")
    assert ("neuqi", "task_accuracy") not in found
    assert found["neuqi", "perplexity"]["value"] > 1.0
    assert (tmp_path / "quality-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_quick_run_writes_nothing_unless_told_where(quality, tiny_model, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(quality, "write", lambda *given: written.append(given))
    text = tmp_path / "list.json"
    text.write_text(json.dumps(["Add 1 and 2.", "A dog and a cat."]))
    quality.main(["--quick", "--model", str(tiny_model), "--text", str(text)])
    assert written == []


def test_text_is_cut_into_windows_up_to_the_limit(quality, tmp_path):
    class Letters:
        def encode(self, text):
            return [ord(letter) for letter in text]

    text = tmp_path / "letters.txt"
    text.write_text("abcdefghijk")
    windows = quality.read_text(text, Letters(), 4, 100)
    assert ["".join(map(chr, item.tokens)) for item in windows] == ["abcd", "efgh", "ijk"]
    assert len(quality.read_text(text, Letters(), 4, 5)) == 2
    texts = tmp_path / "letters.json"
    texts.write_text(json.dumps(["abcdef", "g", "hi"]))
    windows = quality.read_text(texts, Letters(), 4, 100)
    assert ["".join(map(chr, item.tokens)) for item in windows] == ["abcd", "hi"]


def test_integer_minmax_has_integer_zero_points(quality):
    from neuqi_serve.config import WeightSpec
    from neuqi_serve.quant.affine import dequantize

    weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)) + 0.3
    found = quality.integer_minmax(weight, WeightSpec(3, 64))
    assert found.zero.shape == (5, 3)
    assert torch.equal(found.zero, found.zero.round())
    # Half a step off by the codes; the zero-point's own rounding cuts off up to half a step more at the ends.
    step = found.scale.float().repeat_interleave(64, 1)
    assert bool(((dequantize(found) - weight).abs() <= 1.01 * step).all())


def test_help_needs_no_model(quality, capsys):
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--help"])
    assert stopped.value.code == 0
    assert "--text" in capsys.readouterr().out
