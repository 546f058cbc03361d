"""A transformers model whose output head and embedding hold de-quantized weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.quantized_copy import Quantizer
from neuqi_serve.quant.affine import dequantize
from neuqi_serve.quant.quantize import quantize_weight


# The mode belongs to the calling thread, while solvers work in several: their tensors must be ordinary ones.
@torch.inference_mode(False)
@torch.no_grad()
def quantized_vocabulary(
    model: Any, head: WeightSpec | None, embedding: WeightSpec | None, quantize: Quantizer = quantize_weight
) -> Any:
    """Copy a model with its output head and embedding ``[V, K]`` replaced by ``(q − zero)·scale``.

    None leaves one as it is. The copy shares every tensor that is not replaced with the original, which stays as it
    was.

    Raises:
        UsageError: head and embedding are one tensor and their specs differ.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied and head != embedding:
        raise UsageError(
            f"expected one spec for head and embedding, which this model ties, got {head} and {embedding}."
        )
    shared: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)

    def replaced(weight: Tensor, spec: WeightSpec) -> nn.Parameter:
        values = dequantize(quantize(weight.detach(), spec), weight.dtype)
        return nn.Parameter(values, requires_grad=False)

    if embedding is not None:
        weight = replaced(model.get_input_embeddings().weight, embedding)
        twin.get_input_embeddings().weight = weight
        if tied:
            twin.get_output_embeddings().weight = weight
    if head is not None and not tied:
        twin.get_output_embeddings().weight = replaced(model.get_output_embeddings().weight, head)
    return twin
