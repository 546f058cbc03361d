"""A transformers causal language model of which one decoder block at a time is in memory.

The model is built on the meta device. Its embedding, and whatever else works before the blocks, is loaded to make the
inputs of the first block; blocks are loaded, run and dropped one after the other. What transformers hands each block
besides the hidden states (masks, rotary tables, which may differ from block to block) is recorded in one pass in which
the blocks let the hidden states through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neuqi_serve.errors import UnsupportedModelError
from neuqi_serve.pipeline.experts import StackedExperts, stacked_experts


class WeightReader(Protocol):
    """Where weights come from: a checkpoint, or one whose weights are changed on the way."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        ...

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        ...


@dataclass(frozen=True)
class BlockCall:
    """How transformers calls a block: arguments, of which the first tensor, the hidden states, is left out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_name: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call the block with these hidden states ``[B, T, D]``; return the next ones."""
        if self.hidden_name is None:
            result = block(hidden, *self.args, **self.kwargs)
        else:
            result = block(*self.args, **{**self.kwargs, self.hidden_name: hidden})
        return result[0] if isinstance(result, tuple) else result


class _Recorder(nn.Module):
    """Stands in for a block: keeps how it was called, lets the hidden states through."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Some models look at attributes of their blocks, e.g. the kind of attention.
        self.__dict__["original"] = original
        self.recorded: BlockCall | None = None
        self.hidden = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args else "hidden_states"
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.recorded, self.hidden = BlockCall(args[1:], kwargs, name), hidden
        return hidden


class BlockModel:
    """``config``: of transformers. ``names``: module names of the blocks, e.g. ``model.layers.0``, in order.

    ``reader``: its weights; they are converted to ``dtype`` on ``device``.

    Raises:
        UnsupportedModelError: transformers cannot build the model, or it has no list of decoder blocks.
    """

    def __init__(self, config: Any, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self._reader, self._device, self._dtype = reader, device, dtype
        config.use_cache = False
        try:
            with torch.device("meta"):
                self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        except (ValueError, KeyError, ImportError) as error:
            raise UnsupportedModelError(
                f"expected a causal language model that transformers can build, got {type(config).__name__} "
                f"({error}). Quantize it without calibration."
            ) from error
        self._blocks, prefix = _find_blocks(self.model)
        self.names = [f"{prefix}.{number}" for number in range(len(self._blocks))]
        self._fill_buffers()

    def checkpoint_name(self, parameter: str) -> str:
        """The name in the checkpoint of a parameter of the model.

        Raises:
            UnsupportedModelError: there is none.
        """
        for name in _spellings(parameter, self.model.base_model_prefix):
            if self._reader.has(name):
                return name
        raise UnsupportedModelError(
            f"expected a tensor {parameter} in the checkpoint, got none of this name. Calibration reads checkpoints "
            "in the layout of transformers: convert it, or quantize it without calibration."
        )

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """Yield a block with its weights, which are dropped afterwards."""
        block = self._blocks[number]
        self._load(block, self.names[number])
        try:
            yield block
        finally:
            for module in block.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        module._parameters[name] = _on_meta(parameter)

    def experts(self, number: int) -> list[StackedExperts]:
        """Mixtures of experts within a block, with the names of their layers in the checkpoint."""
        return stacked_experts(self._blocks[number], self.names[number], self._reader.has)

    def embed(self, windows: Sequence[Tensor]) -> tuple[list[Tensor], list[list[BlockCall]]]:
        """Hidden states ``[B, T, D]`` in front of the first block for batches of token ids ``[B, T]``, on the CPU.

        Returns them with, for each batch, how each block is to be called.
        """
        outside = [name for name, _ in self.model.named_parameters() if not self._in_block(name)]
        head = self.model.get_output_embeddings()
        base = self.model.base_model
        for name in outside:
            if _owner(self.model, name)[0] is not head:
                self._load_one(name)
        recorders = [_Recorder(block) for block in self._blocks]
        parent, attribute = _owner(self.model, self.names[0].rpartition(".")[0])
        hidden: list[Tensor] = []
        calls: list[list[BlockCall]] = []
        setattr(parent, attribute, nn.ModuleList(recorders))
        try:
            for window in windows:
                base(input_ids=window.to(self._device), use_cache=False)
                recorded = [recorder.recorded for recorder in recorders]
                hidden.append(recorders[0].hidden.cpu().clone())
                calls.append([call for call in recorded if call is not None])
        finally:
            setattr(parent, attribute, self._blocks)
            for name in outside:
                module, last = _owner(self.model, name)
                module._parameters[last] = _on_meta(module._parameters[last])
        return hidden, calls

    def _in_block(self, name: str) -> bool:
        return name.startswith(self.names[0].rpartition(".")[0] + ".")

    def _load(self, module: nn.Module, prefix: str) -> None:
        stacked = {id(one.module): one for one in stacked_experts(module, prefix, self._reader.has)}
        for path, part in module.named_modules():
            experts = stacked.get(id(part))
            if experts is not None:
                experts.load(self._reader.read, self._device, self._dtype)
                continue
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    self._load_one(".".join(filter(None, (prefix, path, name))))

    def _load_one(self, name: str) -> None:
        module, last = _owner(self.model, name)
        expected = module._parameters[last].shape
        stored = self.checkpoint_name(name)
        value = self._reader.read(stored)
        if value.shape != expected:
            raise UnsupportedModelError(
                f"expected {stored} of shape {list(expected)} as config.json says, got {list(value.shape)}. "
                "Correct config.json, or download the model again."
            )
        value = value.to(self._device, self._dtype)
        module._parameters[last] = nn.Parameter(value, requires_grad=False)

    def _fill_buffers(self) -> None:
        """Tables that no checkpoint holds: transformers computes them where it initialises weights."""
        for path, module in self.model.named_modules():
            names = [name for name, buffer in module._buffers.items() if buffer is not None]
            for name in names:
                buffer = module._buffers[name]
                blank = torch.empty(buffer.shape, dtype=buffer.dtype, device=self._device)
                module._buffers[name] = (
                    blank.fill_(float("nan")) if blank.is_floating_point() else blank.zero_()
                )
            if names:
                self.model._init_weights(module)
            for name in names:
                stored = f"{path}.{name}"
                if name not in module._non_persistent_buffers_set and self._reader.has(stored):
                    module._buffers[name] = self._reader.read(stored).to(module._buffers[name])
                if bool(module._buffers[name].isnan().any()):
                    raise UnsupportedModelError(
                        f"expected transformers to compute {stored}, got a model of which it does not. "
                        "Quantize it without calibration."
                    )


def _find_blocks(model: Any) -> tuple[nn.ModuleList, str]:
    """The list of decoder blocks and its name: the longest list of modules of one class."""
    lists = [
        (len(module), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(part) for part in module}) == 1
    ]
    expected = getattr(model.config, "num_hidden_layers", None)
    for count, name, module in lists:
        if count == expected:
            return module, name
    raise UnsupportedModelError(
        f"expected a model with a list of {expected} decoder blocks, got {type(model).__name__} without. "
        "Quantize it without calibration."
    )


def _spellings(name: str, base: str) -> list[str]:
    """Names under which checkpoints may hold a parameter."""
    plain = [name, name.removeprefix(f"{base}."), f"{base}.{name}"]
    return plain + [re.sub(r"\.mlp\.", ".block_sparse_moe.", one) for one in plain]


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _on_meta(parameter: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
