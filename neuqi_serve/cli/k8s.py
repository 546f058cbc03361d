"""``neuqi k8s``: Kubernetes manifests for one model."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from neuqi_serve.errors import DoesNotFitError, UsageError

_DESCRIPTION = """Write a kustomization for one model: bits that fit, memory, GPUs, the time that
a first start may take, the size of its cache. `kubectl apply -k OUT` runs it."""
_EPILOG = """examples:
  neuqi k8s render --model Qwen/Qwen2.5-1.5B-Instruct --device cpu --fit 8GiB -o qwen
  neuqi k8s render --model org/model --device l40s --bits 3 --concurrency 16 -o model

The keys of the clients are a secret that you make:
  kubectl -n NAMESPACE create secret generic neuqi-api-keys --from-file=keys=FILE"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser("k8s", description="Kubernetes manifests for one model.")
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    render = actions.add_parser(
        "render",
        help="write a kustomization",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    render.add_argument(
        "--model", required=True, help="what the pods serve: a name on the hub, or a path in them"
    )
    render.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the model's folder or config.json here (default: the hub's)",
    )
    render.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder to write")
    render.add_argument("--overwrite", action="store_true", help="replace OUT if it holds manifests already")
    plan = render.add_argument_group("sizes", "As for `neuqi plan`.")
    plan.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), or a GPU such as l40s")
    plan.add_argument("--fit", metavar="SIZE", help="memory of one device for everything, e.g. 8GiB")
    plan.add_argument("--bits", type=int, metavar="B", help="2, 3 or 4 (default: the most that fit)")
    plan.add_argument("--group-size", type=int, metavar="G", help="32, 64, 128 or -1")
    plan.add_argument("--context", type=int, metavar="N", help="tokens of a request")
    plan.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    plan.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of a pod (default: 1)"
    )
    plan.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="auto is 16 bits")
    cluster = render.add_argument_group("cluster")
    cluster.add_argument("--namespace", default="neuqi", help="(default: neuqi)")
    cluster.add_argument("--replicas", type=int, default=1, metavar="N", help="pods (default: 1)")
    cluster.add_argument("--cores", type=int, default=4, metavar="N", help="cores of a pod (default: 4)")
    cluster.add_argument(
        "--image", metavar="IMAGE", help="image with tag or digest (default: the published one)"
    )


def run(args: argparse.Namespace) -> int:
    """Plan, and write the files."""
    from neuqi_serve.cli.plan import parse_size, specs_of
    from neuqi_serve.kubernetes.overlay import Deployment, files_of
    from neuqi_serve.plan.device import find_device
    from neuqi_serve.plan.plan import make_plan
    from neuqi_serve.plan.report import does_not_fit, shown

    deployment = Deployment(args.namespace, args.replicas, args.image, args.cores)
    _check_destination(args.output, args.overwrite)
    memory = None if args.fit is None else parse_size(args.fit)
    # What this machine measures says nothing of the cluster's; any number keeps it from being measured.
    device = find_device(args.device, memory, bandwidth_gb_s=1.0)
    plan = make_plan(
        args.model if args.config is None else str(args.config),
        device,
        args.context,
        args.concurrency,
        args.tensor_parallel,
        specs_of(args.bits, args.group_size),
        cache_dtype_bytes=1 if args.kv_cache_dtype == "fp8" else 2,
    )
    if plan.chosen is None:
        raise DoesNotFitError(does_not_fit(plan))
    _write(args.output, files_of(plan, plan.chosen, args.model, deployment))
    spec = plan.chosen.spec
    print(
        f"{args.output}: {args.model} at {spec.bits} bits, group {spec.group_size}, "
        f"{shown(plan.chosen.weights.total)} of weights, {plan.request.concurrency} requests of "
        f"{plan.request.context} tokens\n"
        f"kubectl -n {args.namespace} create secret generic neuqi-api-keys --from-file=keys=FILE\n"
        f"kubectl apply -k {args.output}"
    )
    return 0


def _check_destination(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / "kustomization.yaml").exists()):
        raise UsageError(f"expected a new folder or one with manifests, got {output}. Name another.")
    if any(output.iterdir()) and not overwrite:
        raise UsageError(
            f"expected a new folder, got {output} with manifests. Add --overwrite, or name another."
        )


def _write(output: Path, files: dict[str, str]) -> None:
    """Write the folder beside its place and move it there, so that it is whole or not there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        for name, content in files.items():
            path = made / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")
        made.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        made.rename(output)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        print(f"{output} was not written", file=sys.stderr)
        raise
