from __future__ import annotations

import stat
from pathlib import Path

import pytest

from neuqi_serve.format.replaced_file import replace_text, replaced


def test_a_file_is_written_for_all_to_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    replace_text(path, "ä\n")
    assert path.read_text(encoding="utf-8") == "ä\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("before")

    def interrupted() -> None:
        with replaced(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
