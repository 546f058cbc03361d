"""`neuqi k8s render`: what it writes is valid, and has the sizes of the plan."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from neuqi_serve.cli.main import main
from neuqi_serve.server.admission.keys import parse_keys
from neuqi_serve.server.command_line import read_early

RunTool = Callable[..., subprocess.CompletedProcess[str]]


def render(config: Path, output: Path, *options: str) -> int:
    return main(
        ["k8s", "render", "--model", "org/model", "--config", str(config), "-o", str(output), *options]
    )


def objects(run_tool: RunTool, folder: Path) -> dict[str, Any]:
    done = run_tool("kubectl", "kustomize", folder)
    assert done.returncode == 0, done.stderr
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}


@pytest.mark.parametrize("device", ["cpu", "l4"])
def test_it_is_valid_and_complete(
    device: str, write_llama: Callable[..., Path], run_tool: RunTool, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert render(write_llama(), output, "--device", device, "--bits", "3", "--namespace", "models") == 0
    found = objects(run_tool, output)
    path = tmp_path / "objects.yaml"
    path.write_text(yaml.safe_dump_all(found.values()))
    done = run_tool("kubernetes-validate", "--strict", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {one["metadata"].get("namespace", "models") for one in found.values()} == {"models"}
    container = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    early = read_early(container["args"][1:])
    assert (early.model, early.own.bits) == ("org/model", 3)
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == (None if device == "cpu" else "1")
    assert container["securityContext"]["readOnlyRootFilesystem"] is (device == "cpu")
    assert container["image"].endswith("-cpu" if device == "cpu" else "-cuda")


def test_image_and_replicas_are_taken_over(
    write_llama: Callable[..., Path], run_tool: RunTool, tmp_path: Path
) -> None:
    digest = "sha256:" + "0" * 64
    options = ("--image", f"registry:5000/a/b@{digest}", "--replicas", "3")
    assert render(write_llama(), tmp_path / "out", *options) == 0
    spec = objects(run_tool, tmp_path / "out")["Deployment"]["spec"]
    assert spec["replicas"] == 3
    assert spec["template"]["spec"]["containers"][0]["image"] == f"registry:5000/a/b@{digest}"


def test_larger_models_get_more_time_memory_and_disk(
    write_llama: Callable[..., Path], run_tool: RunTool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    small = write_llama()
    large = tmp_path / "config.json"
    config = json.loads((small / "config.json").read_text())
    large.write_text(json.dumps({**config, **sizes, "num_attention_heads": 32, "num_key_value_heads": 8}))
    found = {}
    for name, model in (("small", small), ("large", large)):
        assert render(model, tmp_path / name, "--device", "h100-sxm", "--context", "64") == 0
        found[name] = objects(run_tool, tmp_path / name)

    def attempts(name: str) -> int:
        container = found[name]["Deployment"]["spec"]["template"]["spec"]["containers"][0]
        return int(container["startupProbe"]["failureThreshold"])

    def storage(name: str) -> int:
        claim = found[name]["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]
        return int(claim.removesuffix("Gi"))

    assert attempts("large") > 3 * attempts("small")
    assert storage("large") > storage("small") + 15


def test_an_existing_folder_is_kept(
    write_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = write_llama(), tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    assert render(model, output) == 2
    assert (output / "mine.txt").read_text() == "mine"
    other = tmp_path / "other"
    assert render(model, other) == 0
    assert render(model, other) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert render(model, other, "--overwrite") == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--namespace", "Not_a_name"), 2, "--namespace"),
        (("--replicas", "0"), 2, "--replicas"),
        (("--device", "toaster"), 2, "rtx-4090"),
        (("--fit", "1MiB"), 3, "to fit into"),
        (("--bits", "5"), 2, "bits must be"),
    ],
)
def test_wrong_uses_write_nothing(
    options: tuple[str, ...],
    code: int,
    message: str,
    write_llama: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert render(write_llama(), tmp_path / "out", *options) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_way_from_an_empty_cluster_to_an_answer(
    deploy: Path, write_llama: Callable[..., Path], run_tool: RunTool, tmp_path: Path
) -> None:
    text = (deploy / "README.md").read_text()
    (block,) = re.findall(r"## From an empty cluster.*?```sh\n(.*?)```", text, re.DOTALL)
    commands = block.splitlines()
    assert len(commands) <= 10
    (line,) = (one for one in commands if one.startswith("neuqi k8s render"))
    words = shlex.split(line)[1:]
    output = words[words.index("-o") + 1]
    words[words.index("-o") + 1] = str(tmp_path / output)
    assert main([*words, "--config", str(write_llama())]) == 0
    found = objects(run_tool, tmp_path / output)
    namespace = found["Namespace"]["metadata"]["name"]
    assert found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"] in block
    volumes = found["Deployment"]["spec"]["template"]["spec"]["volumes"]
    (keys,) = (volume["secret"] for volume in volumes if volume["name"] == "keys")
    for expected in (
        f"kubectl apply -f {output}/namespace.yaml",
        f"kubectl -n {namespace} create secret generic {keys['secretName']} --from-file=keys",
        f"kubectl apply -k {output}",
        f"rollout status deployment/{found['Deployment']['metadata']['name']}",
        f"port-forward service/{found['Service']['metadata']['name']} {found['Service']['spec']['ports'][0]['port']}",
    ):
        assert expected in block
    assert (tmp_path / output / "namespace.yaml").exists()
    (made,) = (one for one in commands if one.startswith("echo"))
    done = subprocess.run(["bash", "-c", made], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    described = {key.name: key.admin for key in parse_keys((tmp_path / "keys").read_text(), "keys")}
    assert described == {"client": False, "prometheus": True}
