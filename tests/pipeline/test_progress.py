from __future__ import annotations

import io

from neuqi_serve.pipeline.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_line_every_few_seconds() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(100, "weights", stream, lambda: now[0])
    for step in range(13):
        now[0] = step + 1.0
        progress.advance(4, f"layer {step}")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "20 % after 5 s, about 20 s left: layer 4",
        "40 % after 10 s, about 15 s left: layer 9",
    ]


def test_bytes_have_a_rate_and_known_steps_are_counted() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(8 * 10**9, "B", stream, lambda: now[0], steps=4)
    progress.advance(2 * 10**9, "a")
    now[0] = 8.0
    progress.advance(2 * 10**9, "b")
    assert stream.getvalue() == "50 % after 8 s, about 8 s left, 0.50 GB/s: layer 2 of 4, b\n"


def test_nothing_to_do_is_complete() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(0, "B", stream, lambda: now[0])
    now[0] = 11.0
    progress.advance(0, "empty")
    assert stream.getvalue().startswith("100 %")


def test_terminal_gets_a_bar_that_goes_away() -> None:
    stream = Terminal()
    progress = Progress(10, "weights", stream)
    progress.advance(10, "layer 1")
    progress.close()
    assert "\r" in stream.getvalue()
    assert "\n" not in stream.getvalue()
