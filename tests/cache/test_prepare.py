"""Finding and making entries: the right one, whole, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neuqi_serve.budget.budget import Budget
from neuqi_serve.budget.plan import plan_budget
from neuqi_serve.cache import key as key_module
from neuqi_serve.cache import prepare as prepare_module
from neuqi_serve.cache.prepare import Prepared, prepare
from neuqi_serve.cache.store import Cache
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import DoesNotFitError, IntegrityError, UnsupportedModelError
from neuqi_serve.format.importance import write_sidecar
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

SETTINGS = QuantizationSettings(WeightSpec(3, 32))


def test_the_entry_is_what_packing_ahead_of_time_gives(
    write_llama: Callable[..., Path], make: Callable[..., Prepared], cache: Cache, tmp_path: Path
) -> None:
    model = write_llama()
    made = make(model)
    assert not made.found
    quantize_checkpoint(model, tmp_path / "packed", SETTINGS)
    entry = cache.entry_path(made.key)
    names = sorted(path.name for path in entry.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "packed").iterdir())
    for name in names:
        assert (entry / name).read_bytes() == (tmp_path / "packed" / name).read_bytes(), name


def test_the_second_time_it_is_found(write_llama: Callable[..., Path], make: Callable[..., Prepared]) -> None:
    model = write_llama()
    first, second = make(model), make(model)
    assert second.found
    assert second.key == first.key


def test_a_copy_of_the_model_is_the_same_model(
    write_llama: Callable[..., Path], make: Callable[..., Prepared], tmp_path: Path
) -> None:
    model = write_llama()
    shutil.copytree(model, tmp_path / "elsewhere")
    assert make(model).key == make(tmp_path / "elsewhere").key


def _touch_weights(model: Path) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)


def _touch_config(model: Path) -> None:
    body = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**body, "rope_theta": 5}))


def _touch_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ other }}")


@pytest.mark.parametrize("touch", [_touch_weights, _touch_config, _touch_template])
def test_whatever_is_read_or_copied_is_part_of_the_key(
    write_llama: Callable[..., Path], make: Callable[..., Prepared], touch: Callable[[Path], None]
) -> None:
    model = write_llama()
    before = make(model).key
    touch(model)
    after = make(model)
    assert not after.found
    assert after.key != before


def test_settings_and_versions_are_part_of_the_key(
    write_llama: Callable[..., Path], cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama()
    write_sidecar(tmp_path / "h", {"model.layers.0.mlp.down_proj": torch.ones(96)}, {})
    variants = [
        SETTINGS,
        replace(SETTINGS, spec=WeightSpec(2, 32)),
        replace(SETTINGS, spec=WeightSpec(3, -1)),
        replace(SETTINGS, spec=WeightSpec(3, 32, "float32")),
        replace(SETTINGS, preset="minmax"),
        replace(SETTINGS, importance=tmp_path / "h"),
    ]
    keys = [prepare(model, settings, cache, print).key for settings in variants]
    monkeypatch.setattr(key_module, "ALGORITHM_VERSION", -1)
    keys.append(prepare(model, SETTINGS, cache, print).key)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("where", [0.02, 0.5, 0.999])
def test_a_flipped_bit_is_found_and_the_entry_made_anew(
    write_llama: Callable[..., Path],
    make: Callable[..., Prepared],
    cache: Cache,
    flip_bit: Callable[[Path, int], None],
    where: float,
) -> None:
    model = write_llama()
    shard = cache.entry_path(make(model).key) / "model.safetensors"
    whole = shard.read_bytes()
    flip_bit(shard, int(len(whole) * where))
    told: list[str] = []
    again = make(model, told=told)
    assert not again.found
    assert "is damaged and is made anew" in told[0]
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "neuqi_manifest.json"])
def test_any_file_of_an_entry_counts(
    write_llama: Callable[..., Path],
    make: Callable[..., Prepared],
    cache: Cache,
    flip_bit: Callable[[Path, int], None],
    name: str,
) -> None:
    model = write_llama()
    file = cache.entry_path(make(model).key) / name
    whole = file.read_bytes()
    flip_bit(file, len(whole) // 2)
    assert not make(model).found
    assert file.read_bytes() == whole


def test_a_missing_shard_is_damage(
    write_llama: Callable[..., Path], make: Callable[..., Prepared], cache: Cache
) -> None:
    model = write_llama()
    entry = cache.entry_path(make(model).key)
    (entry / "model.safetensors").unlink()
    assert not make(model).found
    open_checkpoint(entry).verify()


def test_a_model_that_changes_while_it_is_packed_gives_no_entry(
    write_llama: Callable[..., Path],
    make: Callable[..., Prepared],
    cache: Cache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = write_llama()
    pack = quantize_checkpoint

    def changing(folder: Path, *rest: object) -> None:
        pack(folder, *rest)  # type: ignore[arg-type]
        _touch_weights(folder)

    monkeypatch.setattr(prepare_module, "quantize_checkpoint", changing)
    with pytest.raises(IntegrityError, match="stay as they were"):
        make(model)
    assert cache.entries() == []
    monkeypatch.undo()
    assert not make(model).found


def test_a_model_larger_than_the_limit_gives_no_entry(
    write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    small = Cache(tmp_path / "small", max_bytes=10_000)
    with pytest.raises(DoesNotFitError, match="NEUQI_CACHE_MAX_GIB"):
        prepare(write_llama(), SETTINGS, small, print)
    assert small.entries() == []


def test_an_unknown_architecture_is_refused(
    write_llama: Callable[..., Path], make: Callable[..., Prepared]
) -> None:
    with pytest.raises(UnsupportedModelError):
        make(write_llama(config={"architectures": ["Other"]}))


def test_widths_under_a_budget_are_chosen_once(
    write_llama: Callable[..., Path], cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy", reason="needs scipy (requirements/cpu.txt)")
    pytest.importorskip("transformers", reason="needs transformers")
    model, told = write_llama(), []
    wanted = prepare_module.WantedWidths(Budget(bits=2.5), (32,))
    first = prepare(model, SETTINGS, cache, told.append, wanted=wanted)
    plan = plan_budget(model, SETTINGS, wanted.budget, group_sizes=(32,))
    assert told == ["; ".join(plan.lines())]
    quantize_checkpoint(model, tmp_path / "packed", plan.settings)
    entry = cache.entry_path(first.key)
    for path in (tmp_path / "packed").iterdir():
        assert (entry / path.name).read_bytes() == path.read_bytes(), path.name

    monkeypatch.setattr(prepare_module, "plan_budget", lambda *_, **__: pytest.fail("chosen again"))
    second = prepare(model, SETTINGS, cache, told.append, wanted=wanted)
    assert (second.key, second.found) == (first.key, True)
    monkeypatch.undo()
    for other in (
        prepare_module.WantedWidths(Budget(bits=2.75), (32,)),
        prepare_module.WantedWidths(Budget(bits=2.5)),
    ):
        assert prepare(model, SETTINGS, cache, told.append, wanted=other).key != first.key
    too_little = prepare_module.WantedWidths(Budget(nbytes=100))
    with pytest.raises(DoesNotFitError, match="at least"):
        prepare(model, SETTINGS, cache, told.append, wanted=too_little)
