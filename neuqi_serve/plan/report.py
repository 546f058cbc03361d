"""A plan as text of at most 80 columns, and as JSON."""

from __future__ import annotations

import shlex
from typing import Any

from neuqi_serve.plan.plan import Option, Plan
from neuqi_serve.plan.weights import components

GIB = 1 << 30
_HEAD = ("bits", "group", "bits/weight", "weights", "all", "fits", "requests", "tokens/s")


def to_text(plan: Plan) -> str:
    """Return the table of options, the memory of the chosen one (or the smallest) part by part, and its command."""
    request, device = plan.request, plan.device
    lines = [
        f"{plan.model}: {plan.source.architecture}, {shown(plan.options[0].weights.original)} as it is"
        + (f", on each of {request.ranks} devices" if request.ranks > 1 else ""),
        f"{device.name}: {shown(device.memory_bytes)} of memory" + _bandwidth(plan),
        f"{request.concurrency} request{'s' if request.concurrency > 1 else ''} of {request.context} tokens: "
        f"{shown(plan.cache_bytes)} of KV cache ({plan.cache_token_bytes / 1024:.4g} KiB a token)",
        "",
        *_table(plan),
        "",
    ]
    option = plan.chosen or plan.options[-1]
    lines += [f"{_name(option)}, in parts:", *_parts(plan, option), ""]
    if plan.chosen is not None:
        lines += ["Run it:", "  " + shlex.join(plan.command(option)), ""]
    lines += [
        "requests: how many of that length the memory holds. tokens/s: of one request, if",
        "a step took only as long as reading its weights and half its context: an",
        "estimate, and a limit. Workspace and peak are estimates; weights and KV cache",
        "are exact.",
    ]
    return "\n".join(lines)


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as a JSON object; sizes in bytes."""
    chosen = plan.chosen
    return {
        "model": plan.model,
        "architecture": plan.source.architecture,
        "device": {
            "name": plan.device.name,
            "memory_bytes": plan.device.memory_bytes,
            "bandwidth_bytes_per_second": plan.device.bandwidth or None,
            "bandwidth_source": plan.device.bandwidth_source or None,
        },
        "context": plan.request.context,
        "concurrency": plan.request.concurrency,
        "tensor_parallel_size": plan.request.ranks,
        "kv_cache_bytes": plan.cache_bytes,
        "kv_cache_bytes_per_token": plan.cache_token_bytes,
        "workspace_bytes_estimate": plan.workspace,
        "fits": chosen is not None,
        "chosen": None if chosen is None else _spec(chosen),
        "command": None if chosen is None else plan.command(chosen),
        "options": [_option(plan, option) for option in plan.options],
    }


def does_not_fit(plan: Plan) -> str:
    """The message where no option fits: what is missing, and what would help."""
    smallest = min(plan.options, key=lambda option: option.needed)
    advice = []
    if smallest.weights.total + plan.workspace < plan.device.memory_bytes:
        tokens = max(0, smallest.free_for_cache // plan.cache_token_bytes // plan.request.concurrency)
        advice.append(f"--context {tokens // 128 * 128}" if tokens >= 256 else "a smaller --context")
        if plan.request.cache_dtype_bytes > 1:
            advice.append("--kv-cache-dtype fp8")
    advice += ["--lm-head-bits 4"] if smallest.weights.head > smallest.weights.total // 20 else []
    advice.append(f"--tensor-parallel {2 * plan.request.ranks}")
    return (
        f"expected {plan.model} to fit into {shown(plan.device.memory_bytes)} ({plan.device.name}), got at least "
        f"{shown(smallest.needed)}: {shown(smallest.weights.total)} of weights ({_name(smallest)}), "
        f"{shown(plan.cache_bytes)} of KV cache and about {shown(plan.workspace)} of workspace. "
        f"Try {', or '.join(advice)}."
    )


def shown(nbytes: int) -> str:
    """A size with its unit, e.g. ``3.42 GiB``."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / (1 << 20):.2f} MiB"


def _bandwidth(plan: Plan) -> str:
    if not plan.device.bandwidth:
        return ""
    return f", read at {plan.device.bandwidth / 1e9:.0f} GB/s ({plan.device.bandwidth_source})"


def _name(option: Option) -> str:
    group = "whole rows" if option.spec.group_size == -1 else f"group {option.spec.group_size}"
    return f"{option.spec.bits} bits, {group}"


def _table(plan: Plan) -> list[str]:
    rows = [_HEAD]
    for option in plan.options:
        speed = option.tokens_per_second
        rows.append(
            (
                str(option.spec.bits),
                "row" if option.spec.group_size == -1 else str(option.spec.group_size),
                f"{option.weights.bits_per_weight:.3f}",
                shown(option.weights.total),
                shown(option.needed),
                "yes" if option.fits else "no",
                str(option.requests),
                "?" if speed is None else f"{speed:.3g}" if speed < 1000 else f"{speed:.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _parts(plan: Plan, option: Option) -> list[str]:
    parts = {
        **components(option.weights, plan.tied),
        "KV cache": plan.cache_bytes,
        "workspace (estimate)": plan.workspace,
        "all": option.needed,
        "peak of host memory while packing (estimate)": option.load_peak,
    }
    width = max(map(len, parts))
    return [f"  {name:<{width}}  {shown(nbytes):>10}" for name, nbytes in parts.items()]


def _spec(option: Option) -> dict[str, int]:
    return {"bits": option.spec.bits, "group_size": option.spec.group_size}


def _option(plan: Plan, option: Option) -> dict[str, Any]:
    weights = option.weights
    return {
        **_spec(option),
        "bits_per_weight": round(weights.bits_per_weight, 4),
        "weight_bytes": weights.total,
        "weight_bytes_by_component": components(weights, plan.tied),
        "needed_bytes": option.needed,
        "requests": option.requests,
        "load_peak_bytes_estimate": option.load_peak,
        "tokens_per_second_limit": option.tokens_per_second,
        "fits": option.fits,
    }
