"""Clocks, temperature and power of the GPU, where nvidia-smi tells them."""

from __future__ import annotations

import subprocess

FIELDS = {
    "clocks.sm": ("sm_clock", "MHz"),
    "clocks.mem": ("memory_clock", "MHz"),
    "temperature.gpu": ("temperature", "°C"),
    "power.draw": ("power", "W"),
}


def read_clocks(gpu: str, command: str = "nvidia-smi") -> dict[str, tuple[float, str]]:
    """Name → value and unit, of the GPU with this index or UUID; empty where there is no such tool or field."""
    query = ["--query-gpu=" + ",".join(FIELDS), "--format=csv,noheader,nounits", f"--id={gpu}"]
    try:
        done = subprocess.run([command, *query], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_clocks(done.stdout)


def parse_clocks(line: str) -> dict[str, tuple[float, str]]:
    """The values of one line of the tool's table; fields that a GPU does not support are left out."""
    read = {}
    for (name, unit), text in zip(FIELDS.values(), line.strip().split(","), strict=False):
        try:
            read[name] = float(text), unit
        except ValueError:
            continue
    return read
