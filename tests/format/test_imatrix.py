"""llama.cpp's importance matrices: both layouts, names, damage."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neuqi_serve.errors import IntegrityError, UsageError
from neuqi_serve.format.imatrix import imatrix_name, read_imatrix

Q, DOWN, EXPERTS = "blk.0.attn_q.weight", "blk.11.ffn_down.weight", "blk.0.ffn_up_exps.weight"


def test_the_legacy_layout_gives_sums_divided_by_calls(
    tmp_path: Path, write_legacy: Callable[..., Path]
) -> None:
    path = write_legacy(tmp_path / "m.dat", {Q: (3, [0.5, 2.0, 7.0]), DOWN: (1, [4.0])})
    found = read_imatrix(path)
    assert set(found) == {"blk.0.attn_q", "blk.11.ffn_down"}
    torch.testing.assert_close(found["blk.0.attn_q"], torch.tensor([0.5, 2.0, 7.0]))
    torch.testing.assert_close(found["blk.11.ffn_down"], torch.tensor([4.0]))


def test_the_trailer_of_the_legacy_layout_may_be_absent(
    tmp_path: Path, write_legacy: Callable[..., Path]
) -> None:
    path = write_legacy(tmp_path / "m.dat", {Q: (3, [0.5, 2.0])}, trailer=False)
    assert set(read_imatrix(path)) == {"blk.0.attn_q"}


def test_the_gguf_layout_gives_sums_divided_by_counts(
    tmp_path: Path, write_gguf: Callable[..., Path]
) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")
    entries = {Q: ([8.0, 4.0, 2.0], [4.0]), EXPERTS: ([1.0, 2.0], [1.0, 1.0]), DOWN: ([1.0, 1.0], [0.0])}
    found = read_imatrix(write_gguf(tmp_path / "m.gguf", entries))
    # Experts are not dense layers, and an entry without a call says nothing.
    assert set(found) == {"blk.0.attn_q"}
    torch.testing.assert_close(found["blk.0.attn_q"], torch.tensor([2.0, 1.0, 0.5]))


def test_another_gguf_file_is_refused(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")
    path = write_gguf(tmp_path / "m.gguf", {Q: ([8.0], [4.0])}, kind="model")
    with pytest.raises(UsageError, match=r"got general\.type 'model'"):
        read_imatrix(path)


def test_without_the_package_a_gguf_file_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_gguf: Callable[..., Path]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="pip install gguf"):
        read_imatrix(write_gguf(tmp_path / "m.gguf", {Q: ([8.0], [4.0])}))


@pytest.mark.parametrize("kept", [0, 3, 4, 7, 12, 30, 41])
def test_a_truncated_legacy_file_is_damaged(
    tmp_path: Path, kept: int, write_legacy: Callable[..., Path]
) -> None:
    whole = write_legacy(tmp_path / "m.dat", {Q: (3, [0.5, 2.0, 7.0])}, trailer=False).read_bytes()
    assert kept < len(whole)
    (tmp_path / "cut.dat").write_bytes(whole[:kept])
    with pytest.raises(IntegrityError, match=r"cut\.dat: expected an importance matrix"):
        read_imatrix(tmp_path / "cut.dat")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<i", -1),
        struct.pack("<i", 1 << 30),
        struct.pack("<ii", 1, -5),
        struct.pack("<ii", 1, 2) + b"\xff\xfe" + struct.pack("<iif", 1, 1, 1.0),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, -1),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 29),
    ],
)
def test_nonsense_is_no_importance_matrix(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.dat").write_bytes(content)
    with pytest.raises(IntegrityError, match="expected an importance matrix"):
        read_imatrix(tmp_path / "bad.dat")


@pytest.mark.parametrize("kept", [4, 20, 100, 260])
def test_a_truncated_gguf_file_is_damaged(tmp_path: Path, kept: int, write_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")
    whole = write_gguf(tmp_path / "m.gguf", {Q: ([8.0] * 64, [4.0])}).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:kept])
    with pytest.raises(IntegrityError, match=r"cut\.gguf"):
        read_imatrix(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.10.self_attn.q_proj", "blk.10.attn_q"),
        ("model.layers.0.self_attn.o_proj", "blk.0.attn_output"),
        ("model.layers.0.self_attn.qkv_proj", "blk.0.attn_qkv"),
        ("model.layers.3.mlp.gate_proj", "blk.3.ffn_gate"),
        ("model.layers.3.mlp.down_proj", "blk.3.ffn_down"),
        ("gpt_neox.layers.5.attention.query_key_value", "blk.5.attn_qkv"),
        ("gpt_neox.layers.5.mlp.dense_4h_to_h", "blk.5.ffn_down"),
        ("decoder.layers.5.self_attn.out_proj", "blk.5.attn_output"),
        ("decoder.layers.5.fc1", "blk.5.ffn_up"),
        ("lm_head", "output"),
        ("model.layers.3.mlp.something", None),
        ("model.norm", None),
    ],
)
def test_names(module: str, expected: str | None) -> None:
    assert imatrix_name(module) == expected
