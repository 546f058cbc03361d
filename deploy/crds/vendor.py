"""Cut the schema of a custom resource out of its published definition.

``python vendor.py CRD.yaml VERSION SOURCE COMMIT`` writes ``<kind>.json`` beside this file. Descriptions go; so do the
schemas of pods inside (they are checked as pods, with the schemas of core Kubernetes); objects take no keys that they
do not name, as the API server prunes them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = (
    "additionalProperties",
    "allOf",
    "anyOf",
    "enum",
    "exclusiveMinimum",
    "items",
    "maximum",
    "maxItems",
    "maxLength",
    "minimum",
    "minItems",
    "minLength",
    "not",
    "oneOf",
    "pattern",
    "properties",
    "required",
    "type",
)


def _is_regular(pattern: str) -> bool:
    """Whether Python reads this regular expression; Go's dialect allows flags in the middle."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def cut(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema in plain JSON Schema, strict, without words."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    properties = schema.get("properties", {})
    if "containers" in properties and "tolerations" in properties:
        return {"type": "object"}
    kept: dict[str, Any] = {}
    for key in KEPT:
        if key not in schema or (key == "pattern" and not _is_regular(schema[key])):
            continue
        value = schema[key]
        if key == "properties":
            kept[key] = {name: cut(one) for name, one in value.items()}
        elif key in ("items", "not") or (key == "additionalProperties" and isinstance(value, dict)):
            kept[key] = cut(value)
        elif key in ("allOf", "anyOf", "oneOf"):
            kept[key] = [cut(one) for one in value]
        else:
            kept[key] = value
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if properties and "type" in kept and "additionalProperties" not in kept and not open_ended:
        kept["additionalProperties"] = False
    return kept


def main() -> None:
    """Read one definition, write one schema."""
    path, version, source, commit = sys.argv[1:]
    definition = yaml.safe_load(Path(path).read_text())
    (found,) = [one for one in definition["spec"]["versions"] if one["name"] == version]
    schema = cut(found["schema"]["openAPIV3Schema"])
    # The API server checks what every object has; here that would refuse all of it.
    schema["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
    }
    schema["properties"].pop("status", None)
    names = definition["spec"]["names"]
    body = {
        "kind": names["kind"],
        "apiVersion": f"{definition['spec']['group']}/{version}",
        "source": source,
        "commit": commit,
        "licence": "Apache-2.0",
        "schema": schema,
    }
    target = Path(__file__).with_name(f"{names['singular']}.json")
    target.write_text(json.dumps(body, indent=1) + "\n")
    print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
