"""Running vLLM's ``serve`` inside this process: its imports in one go, its engine from ours, its errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

from neuqi_serve.errors import NeuqiError, UnsupportedModelError, UsageError
from neuqi_serve.server.engine_process import EngineProcesses
from neuqi_serve.server.lifecycle import engine_died

# Imported before the fork, so that API and engine process share them; whatever is missing in a vLLM version is
# imported later by vLLM itself.
_API_MODULES = ("vllm.entrypoints.cli.serve", "vllm.v1.engine.async_llm")
_ENGINE_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.model_loader.default_loader",
)


class EngineStartError(NeuqiError):
    """The engine process or vLLM itself gave up; the message is theirs, and so is the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def import_heavy(config: Mapping[str, Any], on_cpu: bool) -> None:
    """Import what the API process needs, and on CPUs what the engine needs: the worker and the model's class."""
    for name in _API_MODULES:
        importlib.import_module(name)
    if not on_cpu:
        return
    for name in _ENGINE_MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    _import_model_class(config)


def _import_model_class(config: Mapping[str, Any]) -> None:
    """Import the model's class here, and let vLLM inspect it here: on CPUs there is no device to keep untouched.

    vLLM starts a process, which imports all of vLLM again, to look at a model class that it has not seen before.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()
    for architecture in config.get("architectures") or ():
        known = registry.ModelRegistry.models.get(architecture)
        if known is not None:
            known.load_model_cls()


def check_tracing(args: argparse.Namespace) -> None:
    """Refuse to trace without the libraries for it, before anything is loaded.

    Raises:
        UsageError: ``--otlp-traces-endpoint`` without OpenTelemetry.
    """
    from vllm.tracing import is_tracing_available

    if getattr(args, "otlp_traces_endpoint", None) and not is_tracing_available():
        raise UsageError(
            "expected OpenTelemetry for --otlp-traces-endpoint, got none installed. Install opentelemetry-sdk and "
            "opentelemetry-exporter-otlp, or leave the option out."
        )


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuse a model that vLLM knows neither itself nor through Transformers or code in the checkpoint.

    Raises:
        UnsupportedModelError: an architecture that nothing here implements.
    """
    import transformers
    from vllm.model_executor.models.registry import ModelRegistry

    names = list(config.get("architectures") or ())
    if (
        any(name in ModelRegistry.models or hasattr(transformers, name) for name in names)
        or "auto_map" in config
    ):
        return
    raise UnsupportedModelError(
        f"expected an architecture that vLLM or Transformers implements, got {names or 'none'} in config.json. Choose "
        "another model, or a newer vLLM."
    )


def run(args: argparse.Namespace, processes: EngineProcesses) -> int:
    """Run vLLM's server until it is told to stop.

    Raises:
        EngineStartError: the engine process failed; with its own message and exit code.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    command = ServeSubcommand()
    command.validate(args)
    with _engine_processes(processes), _own_termination():
        try:
            command.cmd(args)
        except NeuqiError:
            raise
        except Exception as error:
            failure = processes.failure()
            if failure is None:
                raise EngineStartError(f"vLLM did not start: {_message(error)}", 1) from error
            raise EngineStartError(
                f"the engine did not start: {failure.kind}: {failure.message}", failure.exit_code
            ) from error
    if engine_died():
        failure = processes.failure()
        reason = "" if failure is None else f": {failure.kind}: {failure.message}"
        raise EngineStartError(f"the engine died while the server ran{reason}. Its log is above.", 1)
    return 0


def _message(error: Exception) -> str:
    """Return what went wrong; of a pydantic error the messages without its dump of the input."""
    details = getattr(error, "errors", None)
    if callable(details):
        return "; ".join(str(detail.get("msg", detail)) for detail in details())
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _own_termination() -> Iterator[None]:
    """Keep our handler of SIGTERM while the engine starts: the exception that vLLM's raises there gets lost."""
    from vllm.entrypoints.launchers.api_server import entry

    original = entry.signal
    entry.signal = _Signals()
    try:
        yield
    finally:
        entry.signal = original


class _Signals:
    """Stands in for the module ``signal`` where vLLM would replace the handler."""

    def signal(self, number: int, handler: Any) -> None:
        """Leave the handler as it is."""

    def __getattr__(self, name: str) -> Any:
        return getattr(signal, name)


@contextlib.contextmanager
def _engine_processes(processes: EngineProcesses) -> Iterator[None]:
    from vllm.v1.engine import utils

    original = utils.get_mp_context
    utils.get_mp_context = lambda: processes.context(original())
    try:
        yield
    finally:
        utils.get_mp_context = original
