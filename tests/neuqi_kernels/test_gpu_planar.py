"""The GPU layout: what is packed comes back, and every field lies where the kernels look for it."""

from __future__ import annotations

import pytest
import torch

from neuqi_kernels import layout
from neuqi_kernels.gpu import planar

SHAPES = {2: (70, 288), 3: (129, 544), 4: (1, 32), 8: (64, 96)}


def random_codes(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_repacking_there_and_back_changes_nothing(bits: int) -> None:
    n, k = SHAPES[bits]
    qweight = layout.pack(random_codes(n, k, bits), bits)
    words = planar.to_planar(qweight, bits)
    assert words.dtype == torch.int16
    assert words.is_contiguous()
    assert words.shape == (planar.row_tiles(n), planar.feature_tiles(k, bits), planar.RUNS[bits], 64, 32)
    assert torch.equal(planar.from_planar(words, n, k, bits), qweight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_tiles_take_exactly_their_bits(bits: int) -> None:
    k = planar.tile_features(bits)
    words = planar.to_planar(layout.pack(random_codes(64, k, bits), bits), bits)
    assert words.numel() * 16 == 64 * k * bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_repacking_in_blocks_of_rows_changes_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qweight = layout.pack(random_codes(200, 64, bits), bits)
    whole = planar.to_planar(qweight, bits)
    monkeypatch.setattr(planar, "_CHUNK_CODES", 1)
    assert torch.equal(planar.to_planar(qweight, bits), whole)


@pytest.mark.parametrize(
    ("bits", "feature", "run", "lane", "word"),
    [
        (2, 3 * 32 + 5, 0, 5, 3 << 6),
        (4, 1 * 32 + 31, 0, 31, 15 << 4),
        (8, 1 * 32 + 0, 0, 0, -256),
        (3, 7 * 32 + 9, 1, 9, 7 << 6),
        (3, 14 * 32 + 1, 2, 1, 7 << 12),
    ],
)
def test_a_code_lies_in_its_field(bits: int, feature: int, run: int, lane: int, word: int) -> None:
    codes = torch.zeros(3, planar.tile_features(bits), dtype=torch.uint8)
    codes[2, feature] = (1 << bits) - 1
    words = planar.to_planar(layout.pack(codes, bits), bits)
    assert words[0, 0, run, 2, lane] == word
    assert int((words != 0).sum()) == 1


def test_the_sixteenth_3_bit_plane_is_spread_over_the_top_bits() -> None:
    codes = torch.zeros(1, 512, dtype=torch.uint8)
    codes[0, 15 * 32 + 4] = 0b101
    words = planar.to_planar(layout.pack(codes, 3), 3)
    assert words[0, 0, :, 0, 4].tolist() == [-(1 << 15), 0, -(1 << 15)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "groups", "stored"), [(32, 9, 16), (512, 1, 1), (128, 5, 6)])
def test_scale_and_zero_share_a_word_and_come_back(
    dtype: torch.dtype, group: int, groups: int, stored: int
) -> None:
    scale, zero = torch.randn(2, 70, groups).to(dtype)
    fused = planar.fuse_scale_zero(scale, zero, 2, group, groups)
    # Groups and rows that only fill up tiles are zero, so that they add nothing.
    assert fused.shape == (stored, 128, 2)
    assert not fused[groups:].any()
    assert not fused[:, 70:].any()
    back = planar.split_scale_zero(fused, 70, groups)
    assert torch.equal(back[0], scale)
    assert torch.equal(back[1], zero)
    low = fused.view(torch.int32)[0, 0, 0] & 0xFFFF
    assert low == scale.view(torch.int16)[0, 0].to(torch.int32) & 0xFFFF
