"""Quality against bits and bytes: one PNG of several reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuqi_serve.errors import UsageError
from neuqi_serve.format.replaced_file import replaced


def write_plot(bodies: Sequence[dict[str, Any]], destination: Path) -> None:
    """Draw the mean KL divergence of reports against bits per weight and against bytes, with 95 % intervals.

    Raises:
        UsageError: matplotlib is not installed, or the folder does not exist.
    """
    if not destination.resolve().parent.is_dir() or destination.is_dir():
        raise UsageError(
            f"expected a file name in an existing folder for the plot, got {destination}. Name another."
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "expected matplotlib to draw a plot, it is not installed. Install it (pip install matplotlib), or leave "
            "--plot out."
        ) from None
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    ordered = sorted(bodies, key=lambda body: body["model"]["bytes"])
    for panel, key, label, unit in zip(
        panels,
        ("bits_per_weight", "bytes"),
        ("bits per weight of the packed layers", "MiB of all weights"),
        (1.0, float(1 << 20)),
        strict=True,
    ):
        _draw(panel, ordered, key, unit)
        panel.set(xlabel=label, yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("KL divergence from the original, nats per token")
    panels[0].legend(fontsize="small")
    figure.suptitle(", ".join(sorted({str(body["base"]["name"]) for body in bodies})))
    with replaced(destination) as temporary:
        figure.savefig(temporary, format="png")


def _draw(panel: Any, bodies: Sequence[dict[str, Any]], key: str, unit: float) -> None:
    for base in sorted({body["base"]["name"] for body in bodies}):
        chosen = [body for body in bodies if body["base"]["name"] == base]
        found = [body["metrics"]["kld_mean"] for body in chosen]
        places = [body["model"][key] / unit for body in chosen]
        values = [one["value"] for one in found]
        # Without an interval (one window) the bar has no length.
        bars = [
            [one["value"] - (one["value"] if one["low"] is None else one["low"]) for one in found],
            [(one["value"] if one["high"] is None else one["high"]) - one["value"] for one in found],
        ]
        bars = [[max(0.0, length) for length in side] for side in bars]
        line = panel.errorbar(
            places, values, bars, marker="o", markersize=4, linewidth=1, capsize=3, label=base
        )
        floors = [body["noise_floor"]["kld_mean"]["value"] for body in chosen if body["noise_floor"]]
        if floors and max(floors) > 0:
            color = line.lines[0].get_color()
            panel.axhline(max(floors), color=color, linewidth=0.8, linestyle=":", label=f"{base} in bf16")
        for body, place, value in zip(chosen, places, values, strict=True):
            panel.annotate(
                body["model"]["name"],
                (place, value),
                fontsize="x-small",
                xytext=(4, 4),
                textcoords="offset points",
            )
