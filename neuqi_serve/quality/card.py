"""The quality card: ``neuqi_quality.json`` beside a packed model, and a section of its ``README.md``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuqi_serve.format.manifest import MANIFEST_NAME, Manifest, hash_file
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.replaced_file import replace_text
from neuqi_serve.quality.report import body_dtype

QUALITY_NAME, README_NAME = "neuqi_quality.json", "README.md"
_BEGIN, _END = "<!-- neuqi:quality begin -->", "<!-- neuqi:quality end -->"
_METRICS = (
    ("kld_mean", "KL divergence from the original, mean (nats per token)"),
    ("kld_median", "… median"),
    ("kld_99", "… 99 % of tokens are below"),
    ("top1_agreement", "same most likely token"),
    ("perplexity", "perplexity"),
)


def write_card(folder: Path, body: dict[str, Any]) -> list[Path]:
    """Write a report beside the packed model that it is about; return the files.

    The section of ``README.md`` is replaced if it is there already and added at the end otherwise; the rest of the file
    stays. The manifest gets the new checksums, so that the folder still verifies.

    Raises:
        UnsupportedModelError, IntegrityError: the folder is no packed checkpoint, or not what its manifest says.
    """
    checkpoint = open_checkpoint(folder)
    checkpoint.validate()
    readme = folder / README_NAME
    earlier = readme.read_text(encoding="utf-8") if readme.is_file() else _new_readme(body)
    replace_text(folder / QUALITY_NAME, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    replace_text(readme, _with_section(earlier, card_section(body, checkpoint.recipe, checkpoint.manifest)))
    files = dict(checkpoint.manifest.files)
    files |= {name: hash_file(folder / name) for name in (QUALITY_NAME, README_NAME)}
    replace_text(folder / MANIFEST_NAME, replace(checkpoint.manifest, files=files).to_json())
    return [folder / QUALITY_NAME, readme]


def card_section(body: dict[str, Any], recipe: QuantizationRecipe, manifest: Manifest) -> str:
    """Return the Markdown of a report: where the model comes from, the command that made it, the figures."""
    model, text, noise = body["model"], body["text"], body["noise_floor"]
    lines = [
        "## Quality",
        "",
        f"Quantized from **{body['base']['name']}** with [NeUQI](https://arxiv.org/abs/2505.17595): "
        f"{model['bits_per_weight']:.3f} bits per quantized weight, {model['average_bits']:.3f} over all weights, "
        f"{model['bytes'] / 2**20:.1f} MiB instead of {body['base']['bytes'] / 2**20:.1f}.",
        "",
        "```sh",
        quantize_command(str(body["base"]["name"]), model["name"], recipe, manifest),
        f"neuqi serve {model['name']}",
        "```",
        "",
        f"| | {body_dtype(model)} | 95 % interval | the original in bf16 |",
        "|---|---|---|---|",
    ]
    for key, title in _METRICS:
        found = body["metrics"][key]
        interval = (
            "" if found["low"] is None else f"{_cell(key, found['low'])} to {_cell(key, found['high'])}"
        )
        floor = "" if noise is None else _cell(key, noise[key]["value"])
        lines.append(f"| {title} | {_cell(key, found['value'])} | {interval} | {floor} |")
    lines.append(
        f"| perplexity of the original | {_cell('perplexity', body['base_perplexity']['value'])} | | |"
    )
    for task, scores in body["tasks"].get("model", {}).items():
        original = body["tasks"].get("base", {}).get(task, {})
        for metric, value in scores.items():
            if not metric.endswith("_stderr"):
                error = scores.get(f"{metric}_stderr")
                spread = "" if error is None else f" ± {error:.4f}"
                of_original = f"{original[metric]:.4f}" if metric in original else ""
                lines.append(f"| {task}, {metric} (original: {of_original}) | {value:.4f}{spread} | | |")
    files = ", ".join(file["name"] for file in text["files"])
    lines += [
        "",
        f"{text['tokens']} tokens of {files} in {text['windows']} windows of {text['context']}, against the original "
        f"in float32 (`neuqi eval`; {body['method']['errors']}).",
    ]
    return "\n".join(lines)


def quantize_command(base: str, name: str, recipe: QuantizationRecipe, manifest: Manifest) -> str:
    """Return the command that makes a packed folder like this one, as far as the manifest tells it."""
    made = manifest.quantization
    words = [f"neuqi quantize {base} -o {name}"]
    budget = made.get("budget")
    one_width = f"--bits {recipe.spec.bits} --group-size {recipe.spec.group_size}"
    words.append(one_width if budget is None else str(budget))
    if recipe.spec.scale_dtype != "float16":
        words.append(f"--scale-dtype {recipe.spec.scale_dtype}")
    preset = made.get("preset")
    if preset not in (None, "balanced"):
        words.append(f"--preset {preset}")
    importance = str(made.get("importance", "none"))
    if importance != "none":
        words.append(f"--importance {importance.split()[0]}")
    return " ".join(words)


def _new_readme(body: dict[str, Any]) -> str:
    """The start of a model card; ``base_model`` is what model hubs read."""
    name = body["model"]["name"]
    return f"---\nbase_model: {body['base']['name']}\ntags:\n- neuqi\n- quantized\n---\n\n# {name}\n"


def without_card(text: str) -> str:
    """Return a ``README.md`` without its quality section, for a folder whose weights are no longer those measured."""
    before, begin, rest = text.partition(_BEGIN)
    return before.rstrip() + "\n" + rest.partition(_END)[2].lstrip("\n") if begin and _END in rest else text


def _with_section(text: str, section: str) -> str:
    whole = f"{_BEGIN}\n{section}\n{_END}\n"
    before, begin, rest = text.partition(_BEGIN)
    if begin and _END in rest:
        return before + whole + rest.partition(_END)[2].lstrip("\n")
    return f"{text.rstrip()}\n\n{whole}"


def _cell(key: str, value: float) -> str:
    return f"{100 * value:.2f} %" if key == "top1_agreement" else f"{value:.4g}"
