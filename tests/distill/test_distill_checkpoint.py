import dataclasses
import itertools
import json
import math

import pytest
import torch

from neuqi_serve.cli.main import main
from neuqi_serve.distill import training
from neuqi_serve.distill.distill_checkpoint import DistillationSettings, distill_checkpoint
from neuqi_serve.distill.training import TrainingSettings, schedule
from neuqi_serve.errors import IntegrityError, NeuqiError, UsageError
from neuqi_serve.format.reader import open_checkpoint

QUICK = DistillationSettings(
    TrainingSettings(steps=6, batch_size=4, learning_rate=3e-3, checkpoint_every=2), samples=40, context=32
)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def distilled(original, packed, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled") / "out"
    return folder, distill_checkpoint(packed, original, text, folder, QUICK)


def test_codes_stay_and_scales_zeros_and_norms_move(packed, distilled):
    folder, done = distilled
    before, after = open_checkpoint(packed), open_checkpoint(folder)
    after.verify()
    assert after.recipe == before.recipe
    moved = {name for name in before.stored if not torch.equal(before.read(name), after.read(name))}
    blocks = {name for name in before.manifest.tensors if "layers" in name}
    assert moved == {name for name in blocks if not name.endswith("qweight")} | {"model.norm.weight"}
    assert {name: after.manifest.tensors[name].spec for name in moved} == {
        name: before.manifest.tensors[name].spec for name in moved
    }
    assert done.result.loss_after < 0.97 * done.result.loss_before
    assert after.manifest.quantization["distillation"]["loss_after"] == done.result.loss_after


def test_the_loss_reported_is_that_of_the_folder_written(original, text, distilled):
    """Rounding to storage undoes nothing: the folder read back has the loss that the run ended with."""
    from neuqi_serve.distill.distill_checkpoint import windows_of
    from neuqi_serve.distill.losses import make_loss
    from neuqi_serve.distill.student import load_student, load_teacher
    from neuqi_serve.distill.training import Trainer

    folder, done = distilled
    checkpoint = open_checkpoint(folder)
    student = load_student(checkpoint, torch.device("cpu"), torch.float32, with_head=done.loss == "logits")
    teacher = load_teacher(original, checkpoint, torch.device("cpu"), torch.float32)
    windows = windows_of(folder, text, QUICK)
    loss = make_loss(done.loss, student.model, teacher)
    again = Trainer(student.parameters(), loss, windows, QUICK.training).held_out_loss()
    assert again == pytest.approx(done.result.loss_after, rel=1e-6)


@pytest.mark.parametrize("loss", ["logits", "blocks"])
def test_every_loss_lowers_itself(original, packed, text, tmp_path, loss):
    settings = dataclasses.replace(QUICK, loss=loss)
    done = distill_checkpoint(packed, original, text, tmp_path / "out", settings)
    assert done.result.loss_after < done.result.loss_before


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_an_interrupted_run_ends_with_the_same_bytes(
    original, packed, text, distilled, tmp_path, monkeypatch, stop_at
):
    real, calls = training.Trainer._batch, 0

    def interrupting(self, step):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(training.Trainer, "_batch", interrupting)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        distill_checkpoint(packed, original, text, out, QUICK)
    assert not out.exists()
    monkeypatch.setattr(training.Trainer, "_batch", real)
    distill_checkpoint(packed, original, text, out, QUICK)
    assert contents(out) == contents(distilled[0])
    assert not (tmp_path / ".out.distill").exists()


def test_a_state_of_other_settings_or_a_damaged_one_is_kept_and_refused(original, packed, text, tmp_path):
    state = tmp_path / ".out.distill"
    state.write_bytes(b"no safetensors")
    with pytest.raises(IntegrityError, match="--restart"):
        distill_checkpoint(packed, original, text, tmp_path / "out", QUICK)
    assert state.read_bytes() == b"no safetensors"
    from safetensors.torch import save_file

    save_file({}, state, {"identity": "{}", "progress": "{}"})
    with pytest.raises(UsageError, match="other settings"):
        distill_checkpoint(packed, original, text, tmp_path / "out", QUICK)
    assert state.exists()


def test_the_best_learning_rate_of_short_trials_is_taken(original, packed, text, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LEARNING_RATES", (1e-9, 3e-3))
    settings = dataclasses.replace(QUICK, training=TrainingSettings(steps=16, batch_size=2))
    result = distill_checkpoint(packed, original, text, tmp_path / "out", settings).result
    assert result.learning_rate == 3e-3
    assert result.trials[3e-3] < result.trials[1e-9] == pytest.approx(result.loss_before, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(original, packed, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "neuqi_serve.distill.distill_checkpoint.make_loss",
        lambda *_: lambda ids: torch.full((), math.nan, requires_grad=True),
    )
    with pytest.raises(NeuqiError, match="finite loss"):
        distill_checkpoint(packed, original, text, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_harm_writes_nothing(original, packed, text, tmp_path):
    harmful = dataclasses.replace(QUICK, training=TrainingSettings(steps=4, batch_size=4, learning_rate=0.9))
    with pytest.raises(NeuqiError, match="did harm"):
        distill_checkpoint(packed, original, text, tmp_path / "out", harmful)
    assert not (tmp_path / "out").exists()


def test_another_teacher_is_refused(packed, original, text, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    for file in original.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.q_proj"):
        distill_checkpoint(packed, other, text, tmp_path / "out", QUICK)


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "text"), (b"\xff\xfe\x00binary", "UTF-8"), (b"short", "tokens")]
)
def test_a_bad_text_is_refused(packed, original, tmp_path, content, expected):
    text = tmp_path / "text"
    text.write_bytes(content)
    with pytest.raises(UsageError, match=expected):
        distill_checkpoint(packed, original, text, tmp_path / "out", QUICK)


def test_settings_out_of_range_are_refused():
    for wrong in ({"loss": "l3"}, {"dtype": "int8"}, {"samples": 1}, {"context": 1}):
        with pytest.raises(UsageError):
            DistillationSettings(**wrong)
    for wrong in ({"steps": -1}, {"batch_size": 0}, {"learning_rate": 2.0}, {"checkpoint_every": 0}):
        with pytest.raises(UsageError):
            TrainingSettings(**wrong)


def test_the_schedule_warms_up_and_falls():
    shares = [schedule(step, 100) for step in range(100)]
    assert shares[9] == max(shares) == 1.0
    assert shares[0] == pytest.approx(0.1)
    assert all(one > other for one, other in itertools.pairwise(shares[9:]))
    assert 0 < shares[-1] < 0.01


def test_the_command_prints_what_came_of_it(original, packed, text, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--steps", "4", "--batch-size", "4", "--learning-rate", "3e-3", "--context", "32", "--json"]
    command = ["distill", str(packed), "--teacher", str(original), "--text", str(text), "-o", str(out)]
    assert main([*command, *options, "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["loss_after"] < printed["loss_before"]
    assert printed["tokens"] == 4 * 4 * 32
    assert main([*command, *options]) == 2
    assert "has content" in capsys.readouterr().err


def test_a_quality_section_is_taken_out_of_a_readme():
    from neuqi_serve.quality import card

    whole = card._with_section("# Model\n", "figures")
    assert "figures" in whole
    assert card.without_card(whole + "more\n") == "# Model\nmore\n"
    assert card.without_card("# Model\n") == "# Model\n"
