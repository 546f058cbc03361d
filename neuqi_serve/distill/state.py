"""The state of an unfinished run: one file beside the destination, replaced in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from neuqi_serve.errors import IntegrityError, UsageError


@dataclass
class Saved:
    """``step``: steps done, of which ``tensors`` are the parameters and the optimizer's means. ``trials``: learning
    rates tried before the run, with their losses. ``loss_before``: the held-out loss at the very beginning.
    """

    step: int = 0
    trials: dict[float, float] = field(default_factory=dict)
    loss_before: float | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


class StateFile:
    """The state of the run that writes the folder ``output``, in ``.NAME.distill`` beside it.

    ``identity``: everything that decides the result. ``restart``: throw away what is there.

    Raises:
        UsageError: a state of a run with other settings.
        IntegrityError: a damaged file.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        output = output.resolve()
        self.path = output.parent / f".{output.name}.distill"
        self._identity = json.dumps(identity, sort_keys=True)
        if restart:
            self.discard()
        if self.path.exists() and self._metadata().get("identity") != self._identity:
            raise UsageError(
                f"expected the state of this very run in {self.path}, got one of other settings. Give the options of "
                "the interrupted run, name another output, or throw it away with --restart."
            )

    def read(self) -> Saved:
        """Return the saved state, that of the beginning if there is none.

        Raises:
            IntegrityError: a damaged file.
        """
        if not self.path.exists():
            return Saved()
        from safetensors import safe_open

        metadata = self._metadata()
        with safe_open(self.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = json.loads(metadata["progress"])
        trials = {float(rate): float(loss) for rate, loss in progress["trials"]}
        return Saved(progress["step"], trials, progress["loss_before"], tensors)

    def write(self, saved: Saved) -> None:
        """Replace the state."""
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        progress = {
            "step": saved.step,
            "trials": [[repr(rate), repr(loss)] for rate, loss in saved.trials.items()],
            "loss_before": saved.loss_before,
        }
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        save_file(
            {name: tensor.contiguous() for name, tensor in saved.tensors.items()},
            temporary,
            {"identity": self._identity, "progress": json.dumps(progress)},
        )
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def discard(self) -> None:
        """Remove the state."""
        self.path.unlink(missing_ok=True)

    def _metadata(self) -> dict[str, str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                found = file.metadata() or {}
        except SafetensorError as error:
            raise IntegrityError(
                f"expected the state of an interrupted run in {self.path}, got a damaged file ({error}). Throw it away "
                "with --restart."
            ) from None
        return found if "progress" in found else {}
