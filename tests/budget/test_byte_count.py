from __future__ import annotations

import pytest

from neuqi_serve.budget.byte_count import format_bytes, parse_bytes
from neuqi_serve.errors import UsageError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("750MB", 750_000_000),
        ("1.5 gib", 3 << 29),
        ("4096", 4096),
        ("2KiB", 2048),
        ("7b", 7),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "8 parsecs", "0", "1e9", "8GiB extra"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("nbytes", [17, 1 << 20, (1 << 20) + 1, 987_654_321, (5 << 30) + 12345])
def test_a_size_that_is_shown_is_enough_when_it_is_given(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes).replace(" bytes", "")) >= nbytes
