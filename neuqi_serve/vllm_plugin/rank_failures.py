"""Why one rank of several failed, told to the process that started them all.

vLLM's executor learns of a worker that could not start only that it is gone; the reason is a traceback in the log, and
the error that ends the command says to look for it. Here a rank that fails with one of our errors leaves it in a folder
of the engine, and the engine raises the same error.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from neuqi_serve import errors
from neuqi_serve.env import FAILURE_DIR, read_environment

_SUFFIX = ".failure.json"


def report_failures() -> None:
    """Wrap the start of vLLM's executor and the loading of a model in its workers, once per process."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    if getattr(BaseModelLoader.load_model, "neuqi_reports", False):
        return
    # A worker process knows the plugin only since it was given its model.
    load, start_executor = BaseModelLoader.load_model, MultiprocExecutor._init_executor

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, *args, **kwargs)
        except Exception as error:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            leave_failure(error, rank)
            raise

    @functools.wraps(start_executor)
    def init_executor(self: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="neuqi-") as folder:
            before = os.environ.get(FAILURE_DIR)
            # Inherited by the workers, however they are started.
            os.environ[FAILURE_DIR] = folder
            try:
                start_executor(self)
            except Exception as error:
                found = first_failure(Path(folder))
                if found is not None:
                    raise found from error
                raise
            finally:
                os.environ.pop(FAILURE_DIR)
                if before is not None:
                    os.environ[FAILURE_DIR] = before

    load_model.neuqi_reports = True  # type: ignore[attr-defined]
    BaseModelLoader.load_model = load_model
    MultiprocExecutor._init_executor = init_executor


def leave_failure(error: BaseException, rank: int) -> None:
    """Write down the error of ours behind ``error``, if there is one and the engine asked for it."""
    folder = read_environment().failure_dir
    found: BaseException | None = error
    while found is not None and not isinstance(found, errors.NeuqiError):
        found = found.__cause__ or found.__context__
    if folder is None or not folder.is_dir() or found is None:
        return
    text = json.dumps({"kind": type(found).__name__, "message": str(found), "rank": rank})
    partial = folder / f"{rank}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.rename(folder / f"{rank}{_SUFFIX}")


def first_failure(folder: Path) -> errors.NeuqiError | None:
    """Return the error that the rank with the lowest number left, and say which ranks had the same."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*{_SUFFIX}"))]
    if not found:
        return None
    first = min(found, key=lambda failure: int(failure["rank"]))
    ranks = sorted(int(failure["rank"]) for failure in found if failure["message"] == first["message"])
    kind = getattr(errors, first["kind"], errors.NeuqiError)
    listed = ", ".join(map(str, ranks))
    return kind(f"rank{'s' if len(ranks) > 1 else ''} {listed}: {first['message']}")
