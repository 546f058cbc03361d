from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from neuqi_serve.errors import UsageError
from neuqi_serve.pipeline.calibration_text import windows_of_file, windows_of_text


class Bytes:
    """A tokenizer of bytes with a token in front of every text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [256] * add_special_tokens + list(text.encode())


def test_windows_are_spread_over_the_text_and_begin_with_the_prefix() -> None:
    text = "".join(chr(97 + i // 10) for i in range(100))
    rows = windows_of_text(text, Bytes(), samples=3, context=11)
    assert rows.tolist() == [[256, *[97 + part] * 10] for part in (0, 4, 9)]


def test_fewer_windows_than_asked_for_are_all_there_are() -> None:
    assert windows_of_text("x" * 25, Bytes(), samples=50, context=11).shape == (2, 11)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"short", "at least 10 tokens"),
        (bytes(range(256)) * 9, "binary"),
        (b"text with \0 zeros" * 9, "binary"),
        ("gr\u00fc\u00dfe ".encode("latin-1") * 90, "UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        windows_of_file(tmp_path / "text", Bytes(), 4, 11)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        windows_of_file(tmp_path / "none", Bytes())
    with pytest.raises(UsageError, match="a folder"):
        windows_of_file(tmp_path, Bytes())
    with pytest.raises(UsageError, match="at least 1 sample"):
        windows_of_text("text", Bytes(), samples=0)


def test_ten_gigabytes_of_zeros_are_binary_and_cost_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "text").open("wb") as file:
        file.truncate(10 << 30)
    tracemalloc.start()
    with pytest.raises(UsageError, match="binary"):
        windows_of_file(tmp_path / "text", Bytes(), 8, 64)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_long_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuqi_serve.pipeline.calibration_text.WHOLE_FILE_BYTES", 1000)
    (tmp_path / "text").write_text("".join(f"zeile {i:06d} ä\n" for i in range(20000)), encoding="utf-8")
    tracemalloc.start()
    rows = windows_of_file(tmp_path / "text", Bytes(), 5, 33)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
    assert rows.shape == (5, 33)
    texts = [bytes(row[1:].tolist()).decode(errors="replace") for row in rows]
    assert "000000" in texts[0]
    assert texts[4] > texts[0]
    assert len({*texts}) == 5
