from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.errors import UsageError
from neuqi_serve.quality.text import read_windows

BOS = 256


@pytest.fixture
def tokenizer(made: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made.base)


def test_windows_begin_with_the_first_token_and_cover_the_text(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abcdefghijklmnopq")
    windows = read_windows([file], tokenizer, 8, 1000)
    assert [len(window.tokens) for window in windows] == [8, 8, 4]
    assert {window.tokens[0] for window in windows} == {BOS}
    assert {window.first for window in windows} == {1}
    text = "".join(tokenizer.decode(window.tokens[1:]) for window in windows)
    assert text == "abcdefghijklmnopq"


def test_windows_do_not_cross_files(tokenizer: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name * 9)
    windows = read_windows([tmp_path / "a", tmp_path / "b"], tokenizer, 8, 1000)
    assert [tokenizer.decode(window.tokens[1:]) for window in windows] == ["a" * 7, "aa", "b" * 7, "bb"]


def test_a_limit_takes_windows_evenly(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("".join(chr(ord("a") + i // 7) for i in range(7 * 20)))
    windows = read_windows([tmp_path / "a"], tokenizer, 8, 33)
    assert [tokenizer.decode(window.tokens[1:2]) for window in windows] == ["a", "f", "k", "p"]


@pytest.mark.parametrize(
    ("content", "context", "tokens", "message"),
    [
        (b"", 8, 100, "at least 2 tokens"),
        (b"a\0b" * 50, 8, 100, "binary"),
        (b"\xff\xfe\xff" * 50, 8, 100, "UTF-8"),
        (b"abc", 1, 100, "context"),
        (b"abc", 8, 1, "number of tokens"),
        (None, 8, 100, "no such file"),
    ],
)
def test_what_is_no_text_is_refused(
    tokenizer: Any, tmp_path: Path, content: bytes | None, context: int, tokens: int, message: str
) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_windows([file], tokenizer, context, tokens)


def test_a_long_file_is_not_read_whole(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as stream:
        stream.write(b"words and more " * 1000)
        stream.truncate(1 << 36)
    assert len(read_windows([file], tokenizer, 8, 64)) == 8
