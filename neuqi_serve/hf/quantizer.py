"""The quantizer that ``from_pretrained`` of transformers calls: packed folders, and quantization while loading."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.manifest import MANIFEST_NAME
from neuqi_serve.format.quantization_config import QUANT_METHOD
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.safetensors_file import DTYPE_CODES, TensorSpec, read_header
from neuqi_serve.hf.config import NeuqiConfig
from neuqi_serve.hf.experts import STACKED, PackedExperts, is_experts, matrices, matrix_names
from neuqi_serve.hf.layer_choice import (
    checkpoint_name,
    is_tied,
    online_recipe,
    packed_layers,
    packed_modules,
)
from neuqi_serve.hf.layers import PackedEmbedding, PackedLinear, PackedMatrix, TiedHead
from neuqi_serve.hf.save import save_packed

try:
    from transformers.core_model_loading import ConversionOps
except ImportError as error:
    raise UsageError(
        "expected transformers 5 or newer, whose loader quantizes tensor by tensor, got an older one. Update it."
    ) from error


class NeuqiHfQuantizer(HfQuantizer):
    """Puts packed layers in place of linear layers, output head and embedding before their weights are loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **_: Any
    ) -> Any:
        config: Any = self.quantization_config
        if self.pre_quantized:
            specs = packed_layers(model, config.recipe)
            _check_files(model, specs, [Path(file) for file in checkpoint_files or ()])
        else:
            config.recipe = online_recipe(model, config.settings)
            specs = packed_layers(model, config.recipe)
        dtype = dtype or torch.get_default_dtype()
        _replace_experts(model, specs, dtype, expect_weight=not self.pre_quantized)
        for name, spec in specs.items():
            _replace(model, name, spec, dtype, expect_weight=not self.pre_quantized)
        _tie(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Whether this is the weight of a layer that is packed while it is loaded."""
        name, _, part = param_name.rpartition(".")
        module = model.get_submodule(name)
        if isinstance(module, PackedExperts):
            return part in STACKED
        return part == "weight" and isinstance(module, PackedMatrix) and module.expects_weight

    def get_quantize_ops(self) -> Any:
        """Return the operation that packs one weight."""
        return _PackWeight(self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        experts = {name: one for name, one in model.named_modules() if isinstance(one, PackedExperts)}
        for name, module in (experts | packed_modules(model)).items():
            if module.expects_weight or any(buffer.is_meta for buffer in module.buffers()):
                raise IntegrityError(
                    f"expected {checkpoint_name(model, name)}.weight in the checkpoint, got no such tensor. The "
                    "checkpoint is incomplete: download it again."
                )
        # The method of the class writes tensors only; a packed folder has a manifest.
        model.save_pretrained = types.MethodType(save_packed, model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dtype = dtype or torch.get_default_dtype()
        if any(isinstance(module, PackedExperts) for module in model.modules()):
            raise UnsupportedModelError("expected a dense model, got experts. Start from the original.")
        for name, module in packed_modules(model).items():
            weight = nn.Parameter(module.dequantized(dtype), requires_grad=False)
            if isinstance(module, PackedLinear):
                model.set_submodule(name, _plain_linear(weight, module.bias))
            elif isinstance(module, PackedEmbedding) and module.embed_scale is None:
                model.set_submodule(name, nn.Embedding(module.rows, module.columns, _weight=weight))
            else:
                raise UnsupportedModelError(
                    f"expected an embedding of torch's own kind, got a scaled one in {name}. Start from the original."
                )
        for name, head in list(model.named_modules()):
            if isinstance(head, TiedHead):
                model.set_submodule(name, _plain_linear(model.get_input_embeddings().weight, head.bias))
        del model.save_pretrained
        return model

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the packed weights can be trained."""
        return False


class _PackWeight(ConversionOps):
    """Packs a weight that has just been read, into the module that stands for it."""

    def __init__(self, config: NeuqiConfig) -> None:
        self._config = config

    def convert(self, input_dict: Mapping[str, Any], **context: Any) -> dict[str, Tensor]:
        """Fill the module in; nothing is left for transformers to load."""
        value = next(iter(input_dict.values()))
        weight = value[0] if isinstance(value, list) else value
        model, full = context["model"], context["full_layer_name"]
        name, _, part = full.rpartition(".")
        module = model.get_submodule(name)
        preset = self._config.recipe.preset

        def importance(layer: str, columns: int) -> Tensor | None:
            found = self._config.importance
            return None if found is None else found.of(checkpoint_name(model, layer), columns)

        if isinstance(module, PackedExperts):
            packed = module.quantize(part, weight, lambda one, k: importance(f"{name}.{one}", k), preset)
            names = [f"{name}.{matrix}" for matrix in packed]
        else:
            mass = importance(name, module.columns) if isinstance(module, PackedLinear) else None
            module.quantize(weight, mass, preset)
            names = [name]
        missing = context.get("missing_keys")
        if missing is not None:
            missing.discard(full)
            missing.difference_update(
                f"{one}.{part}" for one in names for part in ("qweight", "scale", "zero")
            )
        return {}


def register() -> None:
    """Tell transformers about the method ``neuqi``; safe to call again."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(NeuqiConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(NeuqiHfQuantizer)


def _plain_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def _replace_experts(
    model: Any, specs: Mapping[str, WeightSpec], dtype: torch.dtype, expect_weight: bool
) -> None:
    names = matrix_names(model)
    for name, old in [item for item in model.named_modules() if is_experts(item[1])]:
        own = {matrix: specs[f"{name}.{matrix}"] for matrix, _ in matrices(old, names)}
        packed = PackedExperts(old, names, own)
        if expect_weight:
            packed.expect_weight(old, dtype)
        model.set_submodule(name, packed)


def _replace(model: Any, name: str, spec: WeightSpec, dtype: torch.dtype, expect_weight: bool) -> None:
    old = model.get_submodule(name)
    if isinstance(old, PackedMatrix):
        return
    rows, columns = old.weight.shape
    packed: PackedMatrix
    if isinstance(old, nn.Embedding):
        packed = PackedEmbedding(rows, columns, spec, dtype)
        if type(old) is not nn.Embedding:
            if not hasattr(old, "scalar_embed_scale"):
                raise UnsupportedModelError(
                    f"expected an embedding of torch's own kind, got a {type(old).__name__} in {name}. Leave it "
                    "unquantized with embedding_bits=16."
                )
            packed.embed_scale = float(old.scalar_embed_scale)  # type: ignore[arg-type]
    else:
        packed = PackedLinear(rows, columns, spec, old.bias)
    if expect_weight:
        packed.expect_weight(dtype)
    model.set_submodule(name, packed)


def _tie(model: Any) -> None:
    """Let a tied head use the packed embedding, and keep transformers from tying their weights itself."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, PackedEmbedding) or head is None or not is_tied(model):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, TiedHead(embedding, head.bias))
    model._tied_weights_keys = None
    for owner in model.modules():
        if hasattr(owner, "all_tied_weights_keys"):
            owner.all_tied_weights_keys = {}


def _shapes(model: Any) -> dict[str, tuple[int, int]]:
    """Name → ``[N, K]`` of all linear layers, embeddings and matrices of experts."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            rows, columns = module.weight.shape
            shapes[name] = rows, columns
        elif is_experts(module):
            shapes |= {f"{name}.{matrix}": shape for matrix, shape in matrices(module, matrix_names(model))}
    return shapes


def _check_files(model: Any, specs: Mapping[str, WeightSpec], files: Sequence[Path]) -> None:
    """Hold the headers of the shards against the recipe; a folder with a manifest is held against that too.

    transformers fills what it does not find with random numbers, after a warning.

    Raises:
        IntegrityError: a tensor is missing or has another dtype or shape.
    """
    if files and (files[0].parent / MANIFEST_NAME).is_file():
        open_checkpoint(files[0].parent).validate()
    found: dict[str, TensorSpec] = {}
    for file in files:
        found.update({name: stored.spec for name, stored in read_header(file).items()})
    prefix = f"{model.base_model_prefix}."
    shapes = _shapes(model)
    for name, spec in specs.items():
        rows, columns = shapes[name]
        parameters = TensorSpec(DTYPE_CODES[spec.scale_dtype], (rows, spec.groups(columns)))
        expected = {"qweight": TensorSpec("I32", (rows, columns * spec.bits // 32))}
        expected |= {"scale": parameters, "zero": parameters}
        full = checkpoint_name(model, name)
        for part, wanted in expected.items():
            names = (f"{full}.{part}", f"{full.removeprefix(prefix)}.{part}")
            received = next((found[one] for one in names if one in found), None)
            if received != wanted:
                raise IntegrityError(
                    f"expected {full}.{part} {wanted} in the checkpoint, got {received or 'no such tensor'}. Pack or "
                    "download the model again."
                )
