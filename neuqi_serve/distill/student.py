"""Student and teacher as transformers models: the packed one with trainable parameters, and its original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuqi_serve.distill.stored_rounding import StoredRounding
from neuqi_serve.distill.trainable_linear import TrainableLinear
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.reader import PackedCheckpoint
from neuqi_serve.format.safetensors_file import TORCH_NAMES
from neuqi_serve.hf.layer_choice import checkpoint_name
from neuqi_serve.hf.layers import PackedLinear, PackedMatrix, TiedHead

_PARTS = ("qweight", "scale", "zero")


@dataclass
class Student:
    """``model``: a transformers model with :class:`TrainableLinear` layers. Names are those of the checkpoint.

    ``linears``: packed layers. ``vectors``: norms, and biases of layers that are not packed: name → the parameter in
    float32, and the dtype in which it is stored.
    """

    model: Any
    linears: Mapping[str, TrainableLinear]
    vectors: Mapping[str, tuple[nn.Parameter, torch.dtype]]

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, float32, by names that do not change from run to run."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self.linears.items():
            found.update({f"{name}.{part}": value for part, value in layer.named_parameters()})
        found.update({name: parameter for name, (parameter, _) in self.vectors.items()})
        return found

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The tensors that training changed, by their names in the checkpoint, in their storage types, on the CPU."""
        values: dict[str, Tensor] = {}
        for name, layer in self.linears.items():
            packed = layer.stored()
            values |= {f"{name}.scale": packed.scale.cpu(), f"{name}.zero": packed.zero.cpu()}
            if layer.bias is not None:
                values[f"{name}.bias"] = layer.bias.detach().to(layer.bias_dtype).cpu()
        for name, (parameter, dtype) in self.vectors.items():
            values[name] = parameter.detach().to(dtype).cpu()
        return values


def load_student(
    checkpoint: PackedCheckpoint, device: torch.device, dtype: torch.dtype, with_head: bool
) -> Student:
    """Load a packed folder with trainable scales, zero-points, norms and biases.

    Embedding and output head are frozen; ``with_head``: gradients are to pass through the head. The model computes in
    ``dtype``.

    Raises:
        UnsupportedModelError: transformers cannot build the model, or its packed layers are no linear layers.
    """
    from transformers import AutoModelForCausalLM

    import neuqi_serve.hf  # noqa: F401  (transformers learns the method from it)

    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype).to(device).eval()
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(
            f"expected a packed model that transformers can build, got {checkpoint.path} ({error})."
        ) from error
    model.requires_grad_(False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linears: dict[str, TrainableLinear] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear) and module is not head:
            full = checkpoint_name(model, name)
            linears[full] = _trainable(module, _stored_dtype(checkpoint, f"{full}.bias"), dtype)
            model.set_submodule(name, linears[full])
    if with_head and isinstance(head, PackedLinear | TiedHead):
        frozen = _frozen_head(head, dtype)
        model.set_output_embeddings(frozen)
        head = frozen
    inside = {id(one) for one in linears.values()} | {id(head), id(embedding)}
    vectors = {}
    for name, module in list(model.named_modules()):
        if id(module) in inside or isinstance(module, PackedMatrix | TiedHead):
            continue
        for part, value in list(module.named_parameters(recurse=False)):
            if value.ndim == 1:
                full = checkpoint_name(model, f"{name}.{part}")
                stored = _stored_dtype(checkpoint, full)
                vectors[full] = (_trainable_vector(module, part, value, stored), stored)
    return Student(model, linears, vectors)


def _trainable(module: PackedLinear, bias_dtype: torch.dtype, dtype: torch.dtype) -> TrainableLinear:
    return TrainableLinear(module.packed(), module.spec, dtype, module.bias, bias_dtype)


def _frozen_head(head: PackedLinear | TiedHead, dtype: torch.dtype) -> TrainableLinear:
    matrix: PackedMatrix = head._embedding[0] if isinstance(head, TiedHead) else head
    frozen = TrainableLinear(matrix.packed(), matrix.spec, dtype, head.bias)
    return frozen.requires_grad_(False)


def _trainable_vector(module: nn.Module, part: str, value: Tensor, stored: torch.dtype) -> nn.Parameter:
    """Put a parameter in float32 in place of a vector, used as ``stored`` holds it and given in its old dtype."""
    setattr(module, part, nn.Parameter(value.detach().float()))
    parametrize.register_parametrization(module, part, StoredRounding(stored, value.dtype), unsafe=True)
    original: nn.Parameter = getattr(module.parametrizations, part).original
    return original


def _stored_dtype(checkpoint: PackedCheckpoint, name: str) -> torch.dtype:
    record = checkpoint.manifest.tensors.get(name)
    return torch.float32 if record is None else getattr(torch, TORCH_NAMES[record.spec.dtype])


def load_teacher(path: Path, checkpoint: PackedCheckpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the original of a packed model, frozen, and make sure that it is the original.

    Raises:
        UsageError: another model: a layer of another shape, or further from the packed one than its manifest says.
        UnsupportedModelError: no model there, or one that transformers cannot build.
    """
    from transformers import AutoModelForCausalLM

    from neuqi_serve.format.source import open_source

    source = open_source(path)
    try:
        teacher = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(
            f"expected a causal language model that transformers can build, got {path} ({error})."
        ) from error
    teacher.requires_grad_(False)
    if source.architecture != checkpoint.config.get("architectures", [""])[0]:
        raise UsageError(
            f"expected the original of {checkpoint.path}, a {checkpoint.config.get('architectures')}, got a "
            f"{source.architecture}: {path}. Name the model that was packed."
        )
    return teacher


def layer_of(model: Any, name: str) -> Any:
    """The layer of a model by its name in the checkpoint, None if it has none of this name."""
    modules = dict(model.named_modules())
    return next((module for key, module in modules.items() if checkpoint_name(model, key) == name), None)


def check_teacher(teacher: Any, student: Student, checkpoint: PackedCheckpoint) -> None:
    """Hold the teacher's weights against the packed ones.

    Raises:
        UsageError: a layer is absent, of another shape, or further from the packed one than the manifest says.
    """
    from neuqi_serve.pipeline.quantize_checkpoint import relative_error

    modules = {checkpoint_name(teacher, name): module for name, module in teacher.named_modules()}
    for name, layer in student.linears.items():
        original = modules.get(name)
        expected = [layer.out_features, layer.in_features]
        received = None if original is None else list(original.weight.shape)
        if original is None or received != expected:
            raise UsageError(
                f"expected the original of {checkpoint.path} as teacher, with a weight {expected} in {name}, got "
                f"{received or 'no such layer'}. Name the model that was packed."
            )
        listed = checkpoint.manifest.modules[name].relative_error
        found = relative_error(original.weight, layer.stored(), layer.spec)
        if found > (_FARTHEST if listed is None else listed * (1 + _SLACK) + _SLACK):
            raise UsageError(
                f"expected the original of {checkpoint.path} as teacher, whose {name} lies {listed} from the packed "
                f"one, got a model in which it lies {found:.3g} from it. Name the model that was packed."
            )


# Relative distance of two layers that have nothing to do with each other: about 1.4.
_FARTHEST = 0.9
# Of the distance that the manifest gives, computed from the weights as they are stored, to one from weights in bf16.
_SLACK = 0.02
