from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuqi_serve.errors import IntegrityError, UsageError
from neuqi_serve.pipeline.journal import Journal

IDENTITY = {"recipe": {"bits": 2}, "tokens": "abc", "shape": (3, 4)}


def packed(value: int) -> dict[str, torch.Tensor]:
    return {"layer.qweight": torch.full((2, 3), value, dtype=torch.int32)}


def states(value: float) -> dict[str, torch.Tensor]:
    return {"quantized.0": torch.full((1, 2), value, dtype=torch.bfloat16)}


def test_blocks_and_the_last_states_are_there_after_reopening(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", IDENTITY)
    assert journal.finished == 0
    for number in range(3):
        journal.save(number, packed(number), states(number))
    journal.close()
    again = Journal(tmp_path / "out", IDENTITY)
    assert again.finished == 3
    assert torch.equal(again.packed(1)["layer.qweight"], packed(1)["layer.qweight"])
    assert torch.equal(again.states()["quantized.0"], states(2)["quantized.0"])
    assert len(list(again.folder.glob("states-*"))) == 1
    again.discard()
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_states_without_their_block_are_no_finished_block(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", IDENTITY)
    journal.save(0, packed(0), states(0))
    journal.save(1, packed(1), states(1))
    # As a kill between the two renames of the second block leaves it.
    (journal.folder / "block-00001.safetensors").unlink()
    journal._write(journal._states(1), states(0))
    journal.close()
    (tmp_path / ".out.journal" / "block-00001.safetensors.partial").write_bytes(b"half")
    again = Journal(tmp_path / "out", IDENTITY)
    assert again.finished == 1
    assert torch.equal(again.states()["quantized.0"], states(0)["quantized.0"])
    assert not list(again.folder.glob("*.partial"))
    again.close()


def test_another_identity_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", IDENTITY)
    journal.save(0, packed(0), states(0))
    journal.close()
    with pytest.raises(UsageError, match=r"1 finished blocks.*tokens was 'abc', is 'xyz'.*--restart"):
        Journal(tmp_path / "out", {**IDENTITY, "tokens": "xyz"})
    again = Journal(tmp_path / "out", IDENTITY)
    assert again.finished == 1
    again.close()
    fresh = Journal(tmp_path / "out", {**IDENTITY, "tokens": "xyz"}, restart=True)
    assert fresh.finished == 0
    fresh.close()


def test_what_differs_is_named_and_a_run_without_a_block_gives_way(tmp_path: Path) -> None:
    other = {**IDENTITY, "recipe": {"bits": 3}}
    Journal(tmp_path / "out", IDENTITY).close()
    journal = Journal(tmp_path / "out", other)
    journal.save(0, packed(0), states(0))
    journal.close()
    with pytest.raises(UsageError, match=r"settings: recipe\.bits was 3, is 2\. Repeat"):
        Journal(tmp_path / "out", IDENTITY)


def test_a_damaged_block_is_reported(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", IDENTITY)
    journal.save(0, packed(0), states(0))
    place = journal.folder / "block-00000.safetensors"
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="--restart"):
        journal.packed(0)
    journal.close()


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", IDENTITY)
    with pytest.raises(UsageError, match="another process"):
        Journal(tmp_path / "out", IDENTITY, restart=True)
    journal.close()
