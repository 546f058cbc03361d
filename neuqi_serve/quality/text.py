"""Texts as windows of tokens: files in, sequences for ``evaluate.teacher_forcing`` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.teacher_forcing import ScoredSequence

# A token is some characters long in any language: no more of a long file need be read.
_CHARACTERS_PER_TOKEN = 16


def read_windows(files: Sequence[Path], tokenizer: Any, context: int, tokens: int) -> list[ScoredSequence]:
    """Cut texts into windows of ``context`` tokens, each behind the tokenizer's own first token if it has one.

    Windows do not overlap and do not cross files; of more than ``tokens`` tokens, windows evenly spaced over all texts
    are taken. Every token of a window but its first is predicted.

    Raises:
        UsageError: no such file, one that is no UTF-8 text, texts of fewer than two tokens, a number below 2.
    """
    if context < 2 or tokens < 2:
        raise UsageError(
            f"expected a context and a number of tokens of at least 2, got {context} and {tokens}."
        )
    first = _first_token(tokenizer)
    body = context - len(first)
    if body < 1 + (not first):
        raise UsageError(
            f"expected a context of at least {2 + len(first)} tokens, got {context}. Choose a larger one."
        )
    windows: list[ScoredSequence] = []
    for file in files:
        text = _read(file, _CHARACTERS_PER_TOKEN * tokens)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        parts = (ids[start : start + body] for start in range(0, len(ids), body))
        windows += [ScoredSequence((*first, *part)) for part in parts if len(first) + len(part) >= 2]
    if not windows:
        raise UsageError(
            f"expected a text of at least 2 tokens, got fewer in {', '.join(map(str, files))}. Give a longer one."
        )
    most = max(1, tokens // context)
    if len(windows) <= most:
        return windows
    return [windows[i * len(windows) // most] for i in range(most)]


def _first_token(tokenizer: Any) -> tuple[int, ...]:
    beginning = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a")["input_ids"]
    return (int(beginning),) if beginning is not None and ids[:1] == [beginning] else ()


def _read(file: Path, characters: int) -> str:
    if not file.is_file():
        received = "a folder" if file.is_dir() else "no such file"
        raise UsageError(f"expected a text file, got {received}: {file}. Check the path.")
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(characters)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"expected UTF-8 text in {file}, got other bytes at {error.start}. Convert the file, or give another."
        ) from None
    if "\0" in text:
        raise UsageError(f"expected text in {file}, got binary data. Give another file.")
    return text
