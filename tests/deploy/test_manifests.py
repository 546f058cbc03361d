"""Every overlay is rendered and checked: schemas of core and custom resources, style, good practice, arithmetic."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

Render = Callable[[str], tuple[dict[str, Any], ...]]
RunTool = Callable[..., subprocess.CompletedProcess[str]]
Schemas = dict[tuple[str, str], dict[str, Any]]
SERVER = "server"


def pods_in(node: Any) -> list[dict[str, Any]]:
    """All pod specs inside an object."""
    if isinstance(node, dict):
        return [node] if "containers" in node else [pod for value in node.values() for pod in pods_in(value)]
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [pod for value in node for pod in pods_in(value)]
    return []


def written(objects: Any, folder: Path) -> Path:
    path = folder / "objects.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    return path


def server_pods(objects: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    return [pod for one in objects for pod in pods_in(one) if pod["containers"][0]["name"] == SERVER]


def test_core_objects_fit_kubernetes(
    overlay: str, render: Render, run_tool: RunTool, crd_schemas: Schemas, tmp_path: Path
) -> None:
    core = [one for one in render(overlay) if (one["apiVersion"], one["kind"]) not in crd_schemas]
    done = run_tool("kubernetes-validate", "--strict", written(core, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") + done.stderr.count("passed") == len(core)


def test_custom_objects_fit_their_definitions(overlay: str, render: Render, crd_schemas: Schemas) -> None:
    for one in render(overlay):
        schema = crd_schemas.get((one["apiVersion"], one["kind"]))
        if schema is not None:
            jsonschema.validate(one, schema)


def test_pods_inside_custom_objects_fit_kubernetes(render: Render, run_tool: RunTool, tmp_path: Path) -> None:
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{name}-{number}"}, "spec": spec}
        for name in ("multi-node-lws", "multi-node-ray")
        for one in render(name)
        for number, spec in enumerate(pods_in(one) if "." in one["apiVersion"].partition("/")[0] else [])
    ]
    assert len(pods) >= 4
    done = run_tool("kubernetes-validate", "--strict", written(pods, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schemas_are_strict(crd_schemas: Schemas) -> None:
    wrong = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "x"},
        "spec": {
            "scaleTargetRef": {"name": "x"},
            "triggers": [{"type": "prometheus", "metadata": {}}],
            "minReplicas": 1,
        },
    }
    with pytest.raises(jsonschema.ValidationError, match="minReplicas"):
        jsonschema.validate(wrong, crd_schemas["keda.sh/v1alpha1", "ScaledObject"])


def test_yaml_is_tidy(run_tool: RunTool) -> None:
    done = run_tool("yamllint", "--strict", "-c", ".yamllint.yaml", ".")
    assert done.returncode == 0, done.stdout


def test_nothing_that_checkov_finds_is_left(
    render: Render, run_tool: RunTool, overlays: list[str], deploy: Path, tmp_path: Path
) -> None:
    for name in overlays:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(render(name)))
    for name in ("Dockerfile", "Dockerfile.cuda"):
        (tmp_path / name).write_text((deploy / "docker" / name).read_text())
    done = run_tool(
        "checkov", "-d", tmp_path, "--framework", "kubernetes", "dockerfile", "--compact", "--quiet",
        "--skip-download", "--config-file", ".checkov.yaml",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_dockerfiles_are_tidy(run_tool: RunTool) -> None:
    done = run_tool("hadolint", "docker/Dockerfile", "docker/Dockerfile.cuda")
    assert done.returncode == 0, done.stdout


def test_a_pod_ends_only_after_its_answers(overlay: str, render: Render) -> None:
    for pod in server_pods(render(overlay)):
        (server,) = (one for one in pod["containers"] if one["name"] == SERVER)
        leaving = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
        drain = int(option(server, "--drain-timeout"))
        assert pod["terminationGracePeriodSeconds"] >= leaving + drain + 10


def test_probes_ask_the_status_port(overlay: str, render: Render) -> None:
    for pod in server_pods(render(overlay)):
        (server,) = (one for one in pod["containers"] if one["name"] == SERVER)
        ports = {port["name"]: port["containerPort"] for port in server["ports"]}
        assert str(ports["status"]) == option(server, "--status-port")
        assert str(ports["http"]) == option(server, "--port")
        for probe, path in (("startup", "/startupz"), ("liveness", "/livez"), ("readiness", "/readyz")):
            assert server[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "status"}


def test_pods_are_confined(overlay: str, render: Render) -> None:
    for one in render(overlay):
        for pod in pods_in(one):
            assert pod["automountServiceAccountToken"] is False
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in (*pod["containers"], *pod.get("initContainers", ())):
                context = container["securityContext"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert "memory" in container["resources"]["limits"]


def test_shared_memory_has_a_size(overlay: str, render: Render) -> None:
    for pod in server_pods(render(overlay)):
        (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        assert shm["emptyDir"]["sizeLimit"]


def test_volumes_are_mounted_and_there(overlay: str, render: Render) -> None:
    for one in render(overlay):
        for pod in pods_in(one):
            there = {volume["name"] for volume in pod["volumes"]}
            containers = (*pod["containers"], *pod.get("initContainers", ()))
            mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
            assert mounted == there


def test_secrets_are_referenced_and_never_written(overlay: str, render: Render) -> None:
    assert [one for one in render(overlay) if one["kind"] == "Secret"] == []


def test_servers_understand_their_arguments(overlay: str, render: Render) -> None:
    from neuqi_serve.server.command_line import read_early

    for one in render(overlay):
        for pod in pods_in(one):
            for container in pod["containers"]:
                args = container.get("args", [])
                if args[:1] == ["serve"]:
                    values = {entry["name"]: entry.get("value", "") for entry in container["env"]}
                    values |= {"LWS_LEADER_ADDRESS": "leader", "LWS_WORKER_INDEX": "1"}
                    early = read_early([expanded(word, values) for word in args[1:]])
                    assert early.model in ("demo", "/models/packed")


def test_quantizing_once_mounts_the_model_read_only(render: Render) -> None:
    (pod,) = server_pods(render("quantize-once"))
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["models"]["readOnly"] is True
    (job,) = (one for one in render("quantize-once") if one["kind"] == "Job")
    assert pod["initContainers"][0]["command"][-1].count("/models/packed/neuqi_manifest.json") == 1
    assert "/models/packed" in job["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("name", ["autoscale-keda", "autoscale-hpa"])
def test_an_autoscaler_owns_the_number_of_pods(name: str, render: Render) -> None:
    (deployment,) = (one for one in render(name) if one["kind"] == "Deployment")
    assert "replicas" not in deployment["spec"]
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert "ephemeral" in volumes["cache"]
    assert [one for one in render(name) if one["kind"] == "PersistentVolumeClaim"] == []


def test_ranks_of_a_group_share_their_sizes(render: Render) -> None:
    (group,) = (one for one in render("multi-node-lws") if one["kind"] == "LeaderWorkerSet")
    leader, worker = pods_in(group)
    size = group["spec"]["leaderWorkerTemplate"]["size"]
    for pod in (leader, worker):
        container = pod["containers"][0]
        assert int(option(container, "--nnodes")) == size
        ranks = int(option(container, "--tensor-parallel-size")) * int(
            option(container, "--pipeline-parallel-size")
        )
        assert ranks == size * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert option(leader["containers"][0], "--node-rank") == "0"
    assert option(worker["containers"][0], "--node-rank") == "$(LWS_WORKER_INDEX)"
    assert "--headless" in worker["containers"][0]["args"]


def expanded(word: str, values: dict[str, str]) -> str:
    """A word of the command line as Kubernetes passes it."""
    return re.sub(r"\$\((\w+)\)", lambda match: values[match.group(1)], word)


def option(container: dict[str, Any], name: str) -> str:
    (value,) = (word.partition("=")[2] for word in container["args"] if word.startswith(f"{name}="))
    return str(value)
