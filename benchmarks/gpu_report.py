"""What ``gpu_kernels.py`` makes of its result file: a Markdown table and a plot. Both say only what the file holds."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DENSE = "torch bf16"
OURS = "neuqi"
COPY = "copying memory"
STYLES = {
    OURS: ("tab:blue", "o"),
    "Humming": ("tab:orange", "s"),
    "gemlite": ("tab:green", "^"),
    "Marlin": ("tab:red", "v"),
    "Machete": ("tab:purple", "D"),
    "vLLM Triton W4A16": ("tab:brown", "P"),
    "vLLM AWQ-Triton": ("tab:pink", "X"),
    DENSE: ("tab:gray", "."),
}
# The plot shows the first layers: so many have a panel each, so many their bars.
PLOTTED_SHAPES = 3
BARRED_SHAPES = 6
# Beyond so many tokens reading the weights is no longer what takes the time.
BANDWIDTH_TOKENS = 16
LISTED_OMISSIONS = 20
Row = dict[str, Any]


def render(path: Path) -> None:
    """Write ``<name>.md`` and ``<name>.png`` beside the result file ``path``."""
    result = json.loads(path.read_text())
    replace_file(path.with_suffix(".md"), markdown(result).encode())
    with tempfile.NamedTemporaryFile(suffix=".png") as image:
        plot(result, Path(image.name))
        replace_file(path.with_suffix(".png"), Path(image.name).read_bytes())
    print(f"written: {path.with_suffix('.md')}, {path.with_suffix('.png')}")


def replace_file(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
    path.chmod(0o644)


def rows_of(result: Row) -> list[Row]:
    """One row per contender, layer and number of tokens, with its metrics as columns; the records' order."""
    rows: dict[tuple[Any, ...], Row] = {}
    for record in result["records"]:
        case = record["case"]
        if case["contender"] == "GPU":
            continue
        key = tuple(case[name] for name in ("contender", "n", "k", "bits", "group_size", "tokens"))
        row = rows.setdefault(key, dict(case))
        row[record["metric"]] = record["value"]
        if record["ratio"] is not None:
            row[f"{record['metric']}_ratio"] = record["ratio"]
    return list(rows.values())


def unique(rows: Sequence[Row], *names: str) -> list[tuple[Any, ...]]:
    """The different values of some columns, in the order in which they come."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def matching(rows: Sequence[Row], **values: object) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def markdown(result: Row) -> str:
    """Tables by bits and group size: a row per layer and number of tokens, a column per contender."""
    rows = rows_of(result)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# GPU kernels",
        "",
        f"{result['device']}; {versions}; commit {result['commit']}; {result['date']}.",
        "Written by `benchmarks/gpu_kernels.py`, which says how it measures. Microseconds are medians, in parentheses",
        f"the 10th to 90th percentile; × is the speed against {DENSE}; %, for few tokens, the share of the bandwidth",
        "of copying memory. A star: integer zero-points.",
    ]
    for bits, group_size in unique(rows, "bits", "group_size"):
        group = "whole rows" if group_size == -1 else f"group {group_size}"
        lines += ["", f"## {bits} bits, {group}", ""]
        lines += section(matching(rows, bits=bits, group_size=group_size))
    return "\n".join([*lines, *clocks(result), *omissions(result.get("notes", {}))]) + "\n"


def section(rows: Sequence[Row]) -> list[str]:
    names = [name for (name,) in unique(rows, "contender")]
    starred = [
        f"{name}*" if matching(rows, contender=name)[0]["zeros"] == "integer" else name for name in names
    ]
    lines = [f"| N×K | tokens | {' | '.join(starred)} |", "|---|--:|" + "--:|" * len(names)]
    for n, k in unique(rows, "n", "k"):
        at_shape = matching(rows, n=n, k=k)
        for tokens in sorted(count for (count,) in unique(at_shape, "tokens")):
            cells = {row["contender"]: cell(row) for row in matching(at_shape, tokens=tokens)}
            lines.append(f"| {n}×{k} | {tokens} | {' | '.join(cells.get(name, '–') for name in names)} |")
    return lines


def cell(row: Row) -> str:
    spread = f"{row['time']:.1f} ({row['time_p10']:.1f}–{row['time_p90']:.1f})"
    ratio = "" if row["contender"] == DENSE else f", {row['time_ratio']:.2f}×"
    share = f", {100 * row['packed_bandwidth_ratio']:.0f} %" if row["tokens"] <= BANDWIDTH_TOKENS else ""
    return f"{spread}{ratio}{share}"


def clocks(result: Row) -> list[str]:
    """The range of the clocks, temperature and power over the run."""
    read: dict[tuple[str, str], list[float]] = {}
    for record in result["records"]:
        if record["case"]["contender"] == "GPU":
            read.setdefault((record["metric"], record["unit"]), []).append(record["value"])
    if not read:
        return ["", "Clocks were not logged: nvidia-smi did not answer."]
    ranges = (f"{name} {min(values):.0f}–{max(values):.0f} {unit}" for (name, unit), values in read.items())
    return ["", f"While measuring: {', '.join(ranges)}.".replace("_", " ")]


def omissions(notes: Row) -> list[str]:
    """What did not take part, and why."""
    lines: list[str] = []
    for peer, reasons in notes.get("absent", {}).items():
        for reason, cases in reasons.items():
            more = "" if len(cases) == 1 else f" and {len(cases) - 1} more"
            lines.append(f"- {peer}, {cases[0]}{more}: {reason}")
    lines += [f"- {line}" for line in shortened(notes.get("left out for lack of time", []))]
    return ["", "## Left out", "", *lines] if lines else []


def shortened(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many there are more; the result file has them all."""
    more = len(lines) - LISTED_OMISSIONS
    return [*lines[:LISTED_OMISSIONS], *([f"and {more} more for lack of time"] if more > 0 else [])]


def plot(result: Row, path: Path) -> None:
    """Above: share of copying bandwidth at the fewest tokens, per bits. Below: speed-up against tokens, per shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = rows_of(result)
    first_group = rows[0]["group_size"]
    rows = matching(rows, group_size=first_group)
    bits = sorted(width for (width,) in unique(rows, "bits"))
    shapes = unique(rows, "n", "k")[:PLOTTED_SHAPES]
    figure, axes = plt.subplots(
        1 + len(shapes), len(bits), figsize=(5.2 * len(bits), 3.6 * (1 + len(shapes))), squeeze=False
    )
    for column, width in enumerate(bits):
        at_bits = matching(rows, bits=width)
        bandwidth_panel(axes[0][column], at_bits, f"{width} bits")
        for line, (n, k) in enumerate(shapes, start=1):
            speed_panel(axes[line][column], matching(at_bits, n=n, k=k), f"{width} bits, {n}×{k}")
    found: dict[str, Any] = {}
    for panel in axes.flat:
        found |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=len(found), frameon=False)
    group = "whole rows" if first_group == -1 else f"group {first_group}"
    figure.supxlabel(f"{result['device']}, {group}, commit {result['commit']}", fontsize=9)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bandwidth_panel(axes: Any, rows: Sequence[Row], title: str) -> None:
    """Bars: how near each contender comes to copying the weights, by layer."""
    axes.set_title(title)
    axes.set_ylabel("% of copying bandwidth")
    if not rows:
        return
    tokens = min(row["tokens"] for row in rows)
    rows = matching(rows, tokens=tokens)
    names = [name for (name,) in unique(rows, "contender")]
    shapes = unique(rows, "n", "k")[:BARRED_SHAPES]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        heights = {
            (row["n"], row["k"]): 100 * row["packed_bandwidth_ratio"]
            for row in matching(rows, contender=name)
        }
        places = [at + (index + 0.5) * width - 0.4 for at in range(len(shapes))]
        values = [heights.get(shape, 0.0) for shape in shapes]
        axes.bar(places, values, width, color=STYLES.get(name, ("black", ""))[0], label=name)
    axes.set_xticks(range(len(shapes)), [f"{n}×\n{k}" for n, k in shapes], fontsize=8)
    axes.set_xlabel(f"N×K, {tokens} token{'s' if tokens > 1 else ''}")
    axes.set_ylim(0, 100)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)


def speed_panel(axes: Any, rows: Sequence[Row], title: str) -> None:
    """Lines: the speed against the dense product, by the number of tokens."""
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.axhline(1, color="tab:gray", linewidth=1)
    for (name,) in unique(rows, "contender"):
        if name == DENSE:
            continue
        points = sorted((row["tokens"], row["time_ratio"]) for row in matching(rows, contender=name))
        color, marker = STYLES.get(name, ("black", "x"))
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"speed against {DENSE}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.grid(alpha=0.3, which="both")
