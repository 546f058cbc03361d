from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neuqi_serve.config import DEFAULT_SKIP, VocabularyBits, WeightSpec
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.source import open_source
from neuqi_serve.pipeline.families import ties_vocabulary
from neuqi_serve.pipeline.selection import Selection, natural_order, select_modules

LINEAR = {
    f"self_attn.{name}_proj" for name in "qkvo"
} | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # fmt: skip


def select(folder: Path, group_size: int = 32, **vocabulary: int) -> Selection:
    return select_modules(open_source(folder), WeightSpec(3, group_size), VocabularyBits(**vocabulary))


def in_blocks_in_order(selection: Selection) -> list[str]:
    return [name for name in selection.modules if ".layers." in name]


def in_blocks(selection: Selection) -> set[str]:
    return set(in_blocks_in_order(selection))


@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_of_the_blocks_are_selected_and_the_vocabulary(
    write_llama: Callable[..., Path], tied: bool
) -> None:
    selection = select(write_llama(tied=tied))
    assert in_blocks(selection) == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LINEAR}
    vocabulary = {"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"}
    assert set(selection.modules) - in_blocks(selection) == vocabulary
    assert selection.recipe.modules == {name: WeightSpec(8, 32) for name in ("lm_head", "embed_tokens")}
    assert selection.tied == tied
    assert selection.modules["model.layers.1.mlp.down_proj"] == (64, 96)
    assert selection.unfit == {}
    assert selection.recipe.modules_to_not_convert == DEFAULT_SKIP
    assert selection.recipe.spec == WeightSpec(3, 32)


def test_vocabulary_has_the_widths_asked_for(write_llama: Callable[..., Path]) -> None:
    selection = select(write_llama(), lm_head=16, embedding=4)
    assert "lm_head" not in selection.modules
    assert selection.recipe.keeps("lm_head")
    assert selection.recipe.spec_of("model.embed_tokens") == WeightSpec(4, 32)


def test_a_tied_embedding_has_the_heads_width(write_llama: Callable[..., Path]) -> None:
    folder = write_llama(tied=True)
    assert select(folder, lm_head=4).recipe.spec_of("model.embed_tokens") == WeightSpec(4, 32)
    assert select(folder, lm_head=16).recipe.keeps("model.embed_tokens")
    with pytest.raises(UsageError, match="one width"):
        select(folder, lm_head=4, embedding=16)


def test_a_head_beside_a_tied_configuration_is_a_tensor_of_its_own(write_llama: Callable[..., Path]) -> None:
    selection = select(write_llama(config={"tie_word_embeddings": True}), lm_head=4, embedding=8)
    assert not selection.tied
    assert selection.recipe.spec_of("lm_head").bits == 4


def test_models_whose_vllm_class_takes_no_packed_vocabulary_keep_it(write_llama: Callable[..., Path]) -> None:
    folder = write_llama(config={"architectures": ["GemmaForCausalLM"]})
    selection = select(folder)
    assert set(selection.modules) == in_blocks(selection)
    assert selection.recipe.keeps("model.embed_tokens")
    with pytest.raises(UsageError, match="16 bits for lm_head"):
        select(folder, lm_head=8)


def test_blocks_come_in_their_order(write_llama: Callable[..., Path]) -> None:
    numbers = [int(name.split(".")[2]) for name in in_blocks_in_order(select(write_llama(layers=11)))]
    assert numbers == sorted(numbers)


def test_natural_order_puts_2_before_10() -> None:
    assert sorted(["a.10.b", "a.2.b", "a.b", "a.2.a"], key=natural_order) == [
        "a.2.a",
        "a.2.b",
        "a.10.b",
        "a.b",
    ]


@pytest.mark.parametrize(("group_size", "rows"), [(64, r"\[96\]"), (128, r"\[64, 96\]")])
def test_group_size_that_does_not_divide_every_row_is_an_error(
    write_llama: Callable[..., Path], group_size: int, rows: str
) -> None:
    with pytest.raises(UsageError, match=rf"got group size {group_size} and rows of {rows} .*\[32, -1\]"):
        select(write_llama(), group_size=group_size)


def test_rows_that_are_no_multiple_of_32_are_reported(write_llama: Callable[..., Path]) -> None:
    odd = {f"model.layers.{layer}.mlp.down_proj.weight": torch.ones(64, 88) for layer in (0, 1)}
    selection = select(write_llama(tensors=odd), group_size=-1)
    assert all("multiple of 32" in reason for reason in selection.unfit.values())
    assert len(selection.unfit) == 2


def test_routers_and_matrices_outside_the_blocks_are_kept_and_named(write_llama: Callable[..., Path]) -> None:
    extra = {
        "model.layers.0.mlp.gate.weight": torch.ones(4, 64),
        "model.project_in.weight": torch.ones(64, 64),
    }
    selection = select(write_llama(tensors=extra))
    assert not {name.removesuffix(".weight") for name in extra} & set(selection.modules)
    assert selection.recipe.keeps("model.layers.0.mlp.gate")
    assert selection.recipe.modules_to_not_convert == (*DEFAULT_SKIP, "model.project_in")


def test_model_whose_rows_all_miss_32_cannot_be_packed(write_llama: Callable[..., Path]) -> None:
    names = [f"model.layers.0.{name}.weight" for name in sorted(LINEAR)]
    odd: dict[str, torch.Tensor | None] = {name: torch.ones(24, 24) for name in names}
    with pytest.raises(UsageError, match="cannot be packed"):
        select(write_llama(layers=1, tensors=odd, config={"hidden_size": 24}), group_size=-1)


def test_missing_block_is_an_error(write_llama: Callable[..., Path]) -> None:
    with pytest.raises(IntegrityError, match=r"expected 3 decoder blocks.* without the blocks \[2\]"):
        select(write_llama(config={"num_hidden_layers": 3}))
    with pytest.raises(IntegrityError, match="got 2 of them"):
        select(write_llama("other", config={"num_hidden_layers": 1}))


def test_checkpoint_without_blocks_is_an_error(write_llama: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="Hugging Face layout"):
        select(write_llama(config={"architectures": ["GPTNeoXForCausalLM"]}))


def test_blocks_without_linear_layers_are_an_error(write_llama: Callable[..., Path]) -> None:
    absent = {f"model.layers.0.{name}.weight": None for name in LINEAR}
    with pytest.raises(UnsupportedModelError, match="expected linear layers"):
        select(write_llama(layers=1, tensors=absent))


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [("self_attn.q_proj", (64, 32), "K = 64"), ("mlp.down_proj", (32, 96), "N = 64")],
)
def test_shape_that_contradicts_the_configuration_is_an_error(
    write_llama: Callable[..., Path], name: str, shape: tuple[int, int], part: str
) -> None:
    with pytest.raises(IntegrityError, match=part):
        select(write_llama(tensors={f"model.layers.1.{name}.weight": torch.ones(shape)}))


def test_weight_that_is_not_floating_point_is_an_error(write_llama: Callable[..., Path]) -> None:
    weight = torch.ones(64, 64, dtype=torch.int8)
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.weight in one of"):
        select(write_llama(tensors={"model.layers.1.self_attn.q_proj.weight": weight}))


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"architectures": ["Gemma3ForCausalLM"]}, True),
        ({"architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": False}, False),
        ({"architectures": ["OPTForCausalLM"]}, True),
        ({"architectures": ["LlamaForCausalLM"]}, False),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}, True),
        ({}, False),
    ],
)
def test_what_a_configuration_leaves_out_is_the_default_of_its_class(
    config: dict[str, object], tied: bool
) -> None:
    assert ties_vocabulary(config) is tied
