from __future__ import annotations

import stat


def test_the_values_of_a_line(load):
    parse = load("gpu_clocks").parse_clocks
    assert parse("1980, 2619, 41, 512.25\n") == {
        "sm_clock": (1980.0, "MHz"),
        "memory_clock": (2619.0, "MHz"),
        "temperature": (41.0, "°C"),
        "power": (512.25, "W"),
    }
    assert parse("1980, [N/A], 41, [Not Supported]") == {
        "sm_clock": (1980.0, "MHz"),
        "temperature": (41.0, "°C"),
    }


def test_without_the_tool_there_are_none(load, tmp_path):
    clocks = load("gpu_clocks")
    assert clocks.read_clocks("0", str(tmp_path / "absent")) == {}
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nexit 9\n")
    failing.chmod(failing.stat().st_mode | stat.S_IXUSR)
    assert clocks.read_clocks("0", str(failing)) == {}
    answering = tmp_path / "answering"
    answering.write_text('#!/bin/sh\n[ "$3" = --id=7 ] && echo 1, 2, 3, 4\n')
    answering.chmod(0o755)
    assert clocks.read_clocks("7", str(answering))["memory_clock"] == (2.0, "MHz")
