"""Packed weights from the cache, found or made in a process of its own while this one imports vLLM.

An unquantized model is packed into the cache once, and served from there: this start and every later one load packed
weights. Whatever keeps the cache from being used (no room, a model that cannot be packed ahead of time) is a reason
that is shown, and the model is quantized while it loads.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from neuqi_serve import load_status
from neuqi_serve.budget.budget import Budget
from neuqi_serve.config import DEFAULT_PRESET, SUPPORTED_GROUP_SIZES, VocabularyBits, WeightSpec
from neuqi_serve.env import read_environment
from neuqi_serve.errors import (
    DoesNotFitError,
    IntegrityError,
    NeuqiError,
    UnsupportedModelError,
    UsageError,
)
from neuqi_serve.server.engine_process import reason_not_to_fork
from neuqi_serve.server.process_memory import own_memory
from neuqi_serve.server.served_model import ServedModel, find_model

# Options of vLLM with which the packed weights would not be what is asked for.
CONFLICTING_OPTIONS = (
    "additional-config",
    "config",
    "headless",
    "hf-config-path",
    "hf-overrides",
    "load-format",
    "model-loader-extra-config",
    "nnodes",
    "quantization",
    "quantization-config",
)
# Folders that belong to a model and are no part of a packed checkpoint.
_KEPT_FOLDERS = ("1_Pooling", "additional_chat_templates")
_HUB_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "*.md",
    "LICENSE*",
)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Request:
    """What to pack: ``name`` is a folder or a hub name with its ``revision``.

    ``budget``: layers get widths of their own under it, with groups of one of ``group_sizes``.
    """

    name: str
    revision: str | None
    spec: WeightSpec
    preset: str | None
    importance: Path | None
    on_cpu: bool
    vocabulary: VocabularyBits = field(default_factory=VocabularyBits)
    budget: Budget | None = None
    group_sizes: tuple[int, ...] = SUPPORTED_GROUP_SIZES


@dataclass(frozen=True)
class Answer:
    """``key`` of an entry, or the ``reason`` why there is none, or the ``error`` that the user has to see."""

    key: str | None = None
    found: bool = False
    seconds: float = 0.0
    reason: str = ""
    error: NeuqiError | None = None
    peak_bytes: int = 0


class CachedWeights:
    """The process that looks into the cache. Use as a context manager around the life of the server.

    ``reason``: why the cache is not used, None while it may be. ``found``: whether the entry was there, None until that
    is known. ``peak_bytes``: the most memory that the process held.
    """

    def __init__(self) -> None:
        self.reason: str | None = "it was not asked for"
        self.detail = ""
        self.found: bool | None = None
        self.peak_bytes = 0
        self._process: multiprocessing.process.BaseProcess | None = None
        self._receiver: Connection | None = None
        self._lock: object | None = None

    def __enter__(self) -> CachedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def refuse(self, reason: str) -> None:
        """Do without the cache, and say why."""
        self.reason = reason

    def start(self, request: Request) -> None:
        """Begin to look for the entry, or to make it."""
        self.reason = None
        load_status.begin("cache")
        # A fork shares the imports; where it is not safe they are made once more.
        context = multiprocessing.get_context("spawn" if reason_not_to_fork() else "fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_work, args=(request, sender, os.getpid()), name="NeuqiCache"
        )
        self._process.start()
        sender.close()

    def model(self, original: ServedModel) -> ServedModel:
        """Wait for the entry and return it in place of the ``original``; the original where there is none.

        Raises:
            NeuqiError: the model is damaged, or the settings do not fit it.
        """
        if self._receiver is None:
            return original
        answer = self._answer()
        self.peak_bytes = answer.peak_bytes
        if answer.error is not None:
            raise answer.error
        if answer.key is None:
            self.reason = answer.reason
            return original
        from neuqi_serve.cache.store import Cache

        environment = read_environment()
        cache = Cache(environment.cache_dir, environment.cache_max_bytes)
        try:
            self._lock = cache.hold(answer.key)
            entry = find_model(str(cache.entry_path(answer.key)))
        except (NeuqiError, OSError) as error:
            self.reason = f"the entry has gone: {error}"
            return original
        done = "found and verified" if answer.found else "packed"
        self.found = answer.found
        self.detail = f"{done} in {answer.seconds:.1f} s: {entry.reference}"
        return replace(entry, name=original.name)

    def _answer(self) -> Answer:
        assert self._receiver is not None
        assert self._process is not None
        try:
            answer = self._receiver.recv()
        except EOFError:
            answer = None
        self._receiver = None
        self._process.join()
        if answer is None:
            answer = Answer(reason=f"the process that packs ended with {self._process.exitcode}")
        assert isinstance(answer, Answer)
        return answer


def no_widths(budget: Budget, reason: str) -> UsageError:
    """Return the error of a start that cannot choose widths under a budget."""
    return UsageError(
        f"expected the cache for {budget.option()}, which packs the model with a width for each layer, but {reason}. "
        f"Pack it with `neuqi quantize MODEL -o OUT {budget.option()}` and serve OUT."
    )


def conflict(model: ServedModel, options: frozenset[str]) -> str | None:
    """Return why the cache cannot be used for this model and these options of vLLM (without dashes)."""
    # "--hf-overrides.key value" sets one key of an object.
    given = sorted({option.partition(".")[0] for option in options} & set(CONFLICTING_OPTIONS))
    if given:
        return f"--{given[0]} was given"
    folder = Path(model.reference)
    kept = [name for name in _KEPT_FOLDERS if (folder / name).is_dir()]
    return f"the model has a folder {kept[0]}, which is not packed" if kept else None


def _work(request: Request, sender: Connection, parent: int) -> None:
    """Look up or pack in a process of its own, and tell the parent."""
    # Gone with the parent, and through the clean-up of what is half written.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    sender.send(replace(_prepared(request), peak_bytes=own_memory().peak))
    sender.close()


def _prepared(request: Request) -> Answer:
    from neuqi_serve.cache.prepare import WantedWidths, prepare
    from neuqi_serve.cache.store import Cache
    from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings

    started = time.monotonic()
    environment = read_environment()
    cache = Cache(environment.cache_dir, environment.cache_max_bytes)
    try:
        settings = QuantizationSettings(
            request.spec,
            request.preset or DEFAULT_PRESET,
            device=_device(request.on_cpu),
            importance=request.importance,
            vocabulary=request.vocabulary,
        )
        folder = _folder(request)
        wanted = None if request.budget is None else WantedWidths(request.budget, request.group_sizes)
        prepared = prepare(folder, settings, cache, _tell, sys.stderr, wanted)
    except (DoesNotFitError, UnsupportedModelError) as error:
        # Widths are chosen ahead of time only: there is nothing to fall back to.
        return Answer(reason=str(error)) if request.budget is None else Answer(error=error)
    except (UsageError, IntegrityError) as error:
        return Answer(error=error)
    except Exception as error:
        # A full or read-only disk, no memory, no network: the model can still be quantized while it loads.
        reason = f"{type(error).__name__}: {error}"
        return (
            Answer(reason=reason)
            if request.budget is None
            else Answer(error=no_widths(request.budget, reason))
        )
    return Answer(prepared.key, prepared.found, time.monotonic() - started)


def _device(on_cpu: bool) -> str:
    import torch

    return "cuda" if not on_cpu and torch.cuda.is_available() else "cpu"


def _folder(request: Request) -> Path:
    if Path(request.name).is_dir():
        return Path(request.name)
    from huggingface_hub import snapshot_download

    load_status.begin("download")
    started = time.monotonic()
    folder = snapshot_download(
        request.name,
        revision=request.revision,
        allow_patterns=list(_HUB_FILES),
        ignore_patterns=["*/*"],
    )
    load_status.end("download", time.monotonic() - started)
    return Path(folder)


def _tell(text: str) -> None:
    print(f"neuqi: {text}", file=sys.stderr, flush=True)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
