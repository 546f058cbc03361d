"""Importance files: sidecar, shared inputs, mismatches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neuqi_serve.errors import IntegrityError, UsageError
from neuqi_serve.format.importance import Importance, read_importance, resolve, write_sidecar

BLOCK = "model.layers.0"
H = torch.tensor([0.1, 3.0, 0.7])


def _sidecar(tmp_path: Path, values: dict[str, torch.Tensor]) -> Importance:
    write_sidecar(tmp_path / "h.safetensors", values, {"text": "t"})
    return read_importance(tmp_path / "h.safetensors")


def test_a_sidecar_comes_back_as_it_was_written(tmp_path: Path) -> None:
    found = _sidecar(tmp_path, {f"{BLOCK}.mlp.down_proj": H})
    assert torch.equal(found.of(f"{BLOCK}.mlp.down_proj", 3), H)
    assert found.of("model.layers.1.mlp.down_proj", 3) is None
    assert [p.name for p in tmp_path.iterdir()] == ["h.safetensors"]


def test_layers_with_one_input_share_their_importance(tmp_path: Path) -> None:
    name = f"{BLOCK}.self_attn"
    found = _sidecar(tmp_path, {f"{name}.q_proj": H, f"{name}.v_proj": 3 * H})
    for layer in ("q_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(found.of(f"{name}.{layer}", 3), 2 * H)
    assert found.of(f"{name}.o_proj", 3) is None


def test_equal_entries_are_shared_bit_for_bit(tmp_path: Path) -> None:
    h = torch.rand(257, generator=torch.Generator().manual_seed(0)) * 1e-7
    name = f"{BLOCK}.self_attn"
    found = _sidecar(tmp_path, {f"{name}.{layer}_proj": h for layer in "qkv"})
    assert torch.equal(found.of(f"{name}.k_proj", 257), h)


def test_a_wrong_length_is_an_error(tmp_path: Path) -> None:
    found = _sidecar(tmp_path, {f"{BLOCK}.mlp.down_proj": H})
    with pytest.raises(UsageError, match=r"expected 4 values for the inputs of .*down_proj, got \[3\]"):
        found.of(f"{BLOCK}.mlp.down_proj", 4)


def test_missing_and_unknown_names_are_counted(tmp_path: Path) -> None:
    found = _sidecar(tmp_path, {f"{BLOCK}.mlp.down_proj": H, "other.layer": H})
    modules = {f"{BLOCK}.mlp.down_proj": 3, f"{BLOCK}.mlp.up_proj": 3, f"{BLOCK}.self_attn.o_proj": 3}
    resolved = resolve(found, modules)
    assert set(resolved.values) == {f"{BLOCK}.mlp.down_proj"}
    assert resolved.missing == (f"{BLOCK}.mlp.up_proj", f"{BLOCK}.self_attn.o_proj")
    assert resolved.unused == ("other.layer",)
    first, second = resolved.warnings()
    assert "2 layers" in first
    assert "1 entries" in second


def test_a_file_of_another_model_is_an_error(tmp_path: Path) -> None:
    found = _sidecar(tmp_path, {"other.layer": H})
    with pytest.raises(UsageError, match=r"got none for any of 1; the file has entries like other\.layer"):
        resolve(found, {f"{BLOCK}.mlp.down_proj": 3})


def test_an_importance_matrix_is_found_by_llama_cpps_names(
    tmp_path: Path, write_legacy: Callable[..., Path]
) -> None:
    path = write_legacy(tmp_path / "m.dat", {"blk.0.attn_k.weight": (2, [1.0, 2.0])})
    found = read_importance(path)
    assert torch.equal(found.of(f"{BLOCK}.self_attn.q_proj", 2), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_values_that_are_no_importance_are_damage(tmp_path: Path, value: float) -> None:
    with pytest.raises(IntegrityError, match="got 1 others"):
        _sidecar(tmp_path, {"a": torch.tensor([1.0, value])})


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": H}, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="neuqi importance"):
        read_importance(tmp_path / "m.safetensors")


def test_a_truncated_sidecar_is_damaged(tmp_path: Path) -> None:
    _sidecar(tmp_path, {"a": H})
    content = (tmp_path / "h.safetensors").read_bytes()
    (tmp_path / "h.safetensors").write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match="expected a complete safetensors file"):
        read_importance(tmp_path / "h.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file: .*absent"):
        read_importance(tmp_path / "absent")


def test_writing_into_no_folder_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="existing folder"):
        write_sidecar(tmp_path / "no" / "h.safetensors", {"a": H}, {})
    assert list(tmp_path.iterdir()) == []
