"""Windows of token ids from a text file of any size, for calibration.

A file of some MiB is tokenized whole and cut into windows. Of a longer one, equally spaced pieces are read, one for
each window, so that 10 GB take no more memory and time than 10 MB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError

DEFAULT_SAMPLES = 128
DEFAULT_CONTEXT = 2048
# Above this a file is read in pieces.
WHOLE_FILE_BYTES = 16 << 20
# Bytes read for each token wanted: tokens of most languages are shorter.
BYTES_PER_TOKEN = 16
# Share of bytes that may be no UTF-8 (a piece may begin within a character).
MOST_REPLACED = 0.01


def windows_of_file(
    path: Path, tokenizer: Any, samples: int = DEFAULT_SAMPLES, context: int = DEFAULT_CONTEXT
) -> Tensor:
    """Token ids int64 ``[S, context]`` with at most ``samples`` windows, spread evenly over the text.

    Each begins with what the tokenizer puts in front of a text, such as a begin-of-text token.

    Raises:
        UsageError: no such file, an empty or binary one, a text shorter than one window, or a number that is too small.
    """
    if not path.is_file():
        received = "a folder" if path.is_dir() else "no such file"
        raise UsageError(f"expected a text file for calibration, got {received}: {path}. Check the path.")
    size = path.stat().st_size
    if size == 0:
        raise UsageError(f"expected a text for calibration, got an empty file: {path}. Give a longer text.")
    if size <= max(WHOLE_FILE_BYTES, BYTES_PER_TOKEN * context):
        return windows_of_text(_decoded(path, path.read_bytes()), tokenizer, samples, context, str(path))
    pieces, length = [], BYTES_PER_TOKEN * context
    with path.open("rb") as file:
        for number in range(samples):
            file.seek((size - length) * number // max(1, samples - 1))
            pieces.append(_decoded(path, file.read(length)))
    rows = [windows_of_text(piece, tokenizer, 1, context, str(path)) for piece in pieces]
    return torch.cat(rows)


def windows_of_text(
    text: str,
    tokenizer: Any,
    samples: int = DEFAULT_SAMPLES,
    context: int = DEFAULT_CONTEXT,
    where: str = "the text",
) -> Tensor:
    """:func:`windows_of_file` for a text in memory; ``where`` names it in errors.

    Raises:
        UsageError: a text shorter than one window, or a number that is too small.
    """
    if samples < 1 or context < 2:
        raise UsageError(f"expected at least 1 sample of at least 2 tokens, got {samples} of {context}.")
    start = _prefix(tokenizer)
    length = context - len(start)
    if length < 1:
        raise UsageError(
            f"expected a context longer than the {len(start)} tokens before every text, got {context}."
        )
    ids = tokenizer.encode(text, add_special_tokens=False)
    count = len(ids) // length
    if not count:
        raise UsageError(
            f"expected at least {length} tokens of calibration text for one window, got {len(ids)} in {where}. "
            "Give a longer text, or a smaller --context."
        )
    taken = min(samples, count)
    chosen = [(number * (count - 1) // max(1, taken - 1)) * length for number in range(taken)]
    return torch.tensor([start + ids[begin : begin + length] for begin in chosen])


def _prefix(tokenizer: Any) -> list[int]:
    """Tokens in front of every text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    for begin in range(len(full)):
        if full[begin : begin + len(plain)] == plain:
            return list(full[:begin])
    return []


def _decoded(path: Path, content: bytes) -> str:
    """The text; a file that is none is refused."""
    text = content.decode("utf-8", errors="replace")
    if "\0" in text or text.count("\ufffd") > MOST_REPLACED * len(text) + 3:
        raise UsageError(
            f"expected a text file in UTF-8 for calibration, got binary data in {path}. Convert it to plain text."
        )
    return text
