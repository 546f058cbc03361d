"""The device that a plan is for: its memory, and how fast it reads it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from neuqi_serve.errors import UsageError
from neuqi_serve.server.machine import detect_machine

# Memory in GiB and read bandwidth in GB/s, from the makers' data sheets.
_ACCELERATORS = {
    "rtx-3060": (12, 360),
    "rtx-3090": (24, 936),
    "rtx-4060-ti-16g": (16, 288),
    "rtx-4070": (12, 504),
    "rtx-4080": (16, 717),
    "rtx-4090": (24, 1008),
    "rtx-5090": (32, 1792),
    "t4": (16, 320),
    "l4": (24, 300),
    "a10": (24, 600),
    "l40s": (48, 864),
    "a100-40g": (40, 1555),
    "a100-80g": (80, 2039),
    "h100-pcie": (80, 2000),
    "h100-sxm": (80, 3350),
    "h200": (141, 4800),
    "b200": (180, 8000),
    "mi300x": (192, 5300),
}
DEVICES = ("cpu", *_ACCELERATORS)
# Larger than the caches of server processors; read a few times, the fastest counts.
_PROBE_BYTES = 512 << 20
_PROBE_ROUNDS = 5


@dataclass(frozen=True)
class Device:
    """``memory_bytes``: what the model may use of one device. ``bandwidth``: bytes read per second, 0 if unknown.

    ``bandwidth_source``: where the number is from: ``measured``, ``data sheet`` or ``given``. ``is_cpu``: the model
    runs on the processor.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    bandwidth_source: str
    is_cpu: bool


def find_device(
    name: str | None, memory_bytes: int | None = None, bandwidth_gb_s: float | None = None
) -> Device:
    """Return the device of this name; None is the one that vLLM would run on here.

    ``memory_bytes`` and ``bandwidth_gb_s`` replace what is known of it. The bandwidth of this machine's processor is
    measured, which takes about a second.

    Raises:
        UsageError: an unknown name, or no device here.
    """
    device = _here() if name is None else _named(name)
    if memory_bytes is not None:
        device = Device(device.name, memory_bytes, device.bandwidth, device.bandwidth_source, device.is_cpu)
    if bandwidth_gb_s is not None:
        return Device(device.name, device.memory_bytes, bandwidth_gb_s * 1e9, "given", device.is_cpu)
    if device.is_cpu:
        return Device(device.name, device.memory_bytes, measure_read_bandwidth(), "measured", True)
    return device


def _named(name: str) -> Device:
    if name == "cpu":
        return _processor()
    if name not in _ACCELERATORS:
        raise UsageError(
            f"expected a device among {', '.join(DEVICES)}, got {name!r}. For another, name the nearest and give its "
            "--fit and --bandwidth."
        )
    gib, gb_s = _ACCELERATORS[name]
    return Device(name, gib << 30, gb_s * 1e9, "data sheet", False)


def _processor() -> Device:
    return Device("cpu", detect_machine().available_bytes, 0.0, "", True)


def _here() -> Device:
    if detect_machine().runs_on_cpu:
        return _processor()
    import torch

    if not torch.cuda.is_available():
        raise UsageError("expected a GPU, which this vLLM needs, got none. Name a device with --device.")
    free, _ = torch.cuda.mem_get_info()
    bandwidth, source = _reported_bandwidth(torch.cuda.get_device_properties(0))
    return Device(torch.cuda.get_device_name(0), free, bandwidth, source, False)


def _reported_bandwidth(properties: object) -> tuple[float, str]:
    """Bytes per second from memory clock (kHz) and bus width (bits), which transfers twice a cycle; 0 if not told."""
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return (2.0 * clock * 1e3 * width / 8, "reported by the driver") if clock and width else (0.0, "")


def measure_read_bandwidth(nbytes: int = _PROBE_BYTES) -> float:
    """Return the bytes per second at which all threads of torch together read memory; the best of a few rounds."""
    import torch

    memory = torch.zeros(nbytes // 8, dtype=torch.int64)
    memory.sum()
    seconds = []
    for _ in range(_PROBE_ROUNDS):
        started = time.perf_counter()
        memory.sum()
        seconds.append(time.perf_counter() - started)
    return nbytes / min(seconds)
