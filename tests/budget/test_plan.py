from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neuqi_serve.budget.budget import Budget
from neuqi_serve.budget.plan import plan_budget
from neuqi_serve.cli.main import main
from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.errors import DoesNotFitError, UsageError
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.source import open_source
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint
from neuqi_serve.pipeline.selection import select_modules

pytest.importorskip("scipy", reason="needs scipy (requirements/cpu.txt)")
SETTINGS = QuantizationSettings(WeightSpec(4, 32))


def tensor_bytes(folder: Path) -> int:
    return sum(spec.nbytes for spec in open_checkpoint(folder).expected_tensors().values())


@pytest.mark.parametrize("sensitivity", ["weights", "divergence"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_has_the_widths_and_the_size_of_the_plan(
    write_llama: Callable[..., Path], tmp_path: Path, sensitivity: str, tied: bool
) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    model = write_llama(tied=tied)
    plan = plan_budget(model, SETTINGS, Budget(bits=2.5), sensitivity)
    quantize_checkpoint(model, tmp_path / "out", plan.settings)
    checkpoint = open_checkpoint(tmp_path / "out")
    checkpoint.verify()
    assert tensor_bytes(tmp_path / "out") == plan.nbytes <= plan.limit
    for group in plan.groups:
        for module in group.modules:
            packed = checkpoint.manifest.modules.get(module)
            assert (packed and packed.spec) == plan.allocation.chosen[group.name].spec
    assert len({module.spec.bits for module in checkpoint.manifest.modules.values()}) > 1
    how = "" if sensitivity == "divergence" else " --sensitivity weights"
    assert checkpoint.manifest.quantization["budget"] == f"--bits 2.5{how}"
    assert plan.allocation.gap < 1e-6


def test_a_budget_of_bits_has_the_size_of_that_width(
    write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = write_llama()
    plan = plan_budget(model, SETTINGS, Budget(bits=3.0), "weights")
    quantize_checkpoint(model, tmp_path / "three", QuantizationSettings(WeightSpec(3, 32)))
    assert plan.limit == tensor_bytes(tmp_path / "three")
    assert plan.nbytes <= plan.limit


def test_more_room_never_loses_more(write_llama: Callable[..., Path]) -> None:
    model = write_llama()
    budgets = (2.0, 2.25, 2.5, 3.0, 4.0, 8.0)
    losses = [plan_budget(model, SETTINGS, Budget(bits=b), "weights").allocation.loss for b in budgets]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_a_layer_that_loses_nothing_gets_the_fewest_bits(write_llama: Callable[..., Path]) -> None:
    easy = torch.full((64, 64), 0.05, dtype=torch.bfloat16)
    easy[:, ::2] = -0.05
    name = "model.layers.0.self_attn.o_proj"
    plan = plan_budget(write_llama(tensors={f"{name}.weight": easy}), SETTINGS, Budget(bits=3.0), "weights")
    bits = {group.name: plan.allocation.chosen[group.name].bits for group in plan.groups}
    assert bits.pop(name) == 2
    assert min(bits.values()) > 2


def test_a_group_size_that_was_given_stays(write_llama: Callable[..., Path]) -> None:
    plan = plan_budget(write_llama(), SETTINGS, Budget(bits=2.5), "weights", group_sizes=(32,))
    specs = [choice.spec for choice in plan.allocation.chosen.values()]
    assert {spec.group_size for spec in specs if spec is not None} == {32}
    with pytest.raises(UsageError, match="Sizes that divide all"):
        plan_budget(write_llama("other"), QuantizationSettings(WeightSpec(4, 64)), Budget(bits=2.5), "weights",
                    group_sizes=(64,))  # fmt: skip


def test_without_a_size_given_rows_that_128_does_not_divide_are_no_obstacle(
    write_llama: Callable[..., Path],
) -> None:
    plan = plan_budget(write_llama(), QuantizationSettings(WeightSpec()), Budget(bits=2.5), "weights")
    assert plan.nbytes <= plan.limit


def test_widths_of_the_vocabulary_that_were_given_stay(write_llama: Callable[..., Path]) -> None:
    settings = QuantizationSettings(WeightSpec(4, 32), vocabulary=VocabularyBits(16, 4))
    model = write_llama()
    plan = plan_budget(model, settings, Budget(bits=2.5), "weights")
    chosen = {group.name: plan.allocation.chosen[group.name] for group in plan.groups if group.vocabulary}
    assert [choice.bits for choice in chosen.values()] == [4]
    recipe = select_modules(
        open_source(model), plan.settings.spec, plan.settings.vocabulary, plan.settings.exceptions
    ).recipe
    assert recipe.keeps("lm_head")
    assert recipe.spec_of("model.embed_tokens") == next(iter(chosen.values())).spec


def test_the_smallest_size_is_named_and_is_enough(
    write_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_llama()
    command = ["quantize", str(model), "-o", str(tmp_path / "out"), "--group-size", "32", "--device", "cpu"]
    command += ["--sensitivity", "weights", "--fit"]
    assert main([*command, "1KB"]) == 3
    smallest = next(word for word in capsys.readouterr().err.split() if word.isdigit())
    assert not (tmp_path / "out").exists()
    assert main([*command, str(int(smallest) - 1)]) == 3
    assert main([*command, smallest]) == 0
    assert tensor_bytes(tmp_path / "out") == int(smallest)


def test_the_command_chooses_widths(
    write_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(write_llama()), "-o", str(tmp_path / "out"), "--group-size", "32", "--json"]
    assert main([*command, "--bits", "2.5", "--sensitivity", "weights"]) == 0
    captured = capsys.readouterr()
    assert "proven best" in captured.err
    widths = {group["bits"] for group in json.loads(captured.out)["groups"]}
    assert {2, 3} & widths
    assert len(widths) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "2.5", "--fit", "8GiB"], "--bits or --fit"),
        (["--bits", "1.5"], "decimal number from 2 to 8"),
        (["--bits", "5"], "bits must be one of"),
        (["--bits", "few"], "decimal number such as 2.5"),
        (["--fit", "much"], "8GiB"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(
    write_llama: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert main(["quantize", str(write_llama()), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_both_budgets_or_an_unknown_sensitivity_are_refused(write_llama: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="both or neither"):
        Budget()
    with pytest.raises(UsageError, match="sensitivity among"):
        plan_budget(write_llama(), SETTINGS, Budget(bits=2.5), "guess")
    with pytest.raises(DoesNotFitError):
        plan_budget(write_llama("small"), SETTINGS, Budget(nbytes=10), "weights")
