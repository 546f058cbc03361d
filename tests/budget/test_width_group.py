from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuqi_serve.budget.width_group import bytes_at, group_name, kept_bytes, width_groups
from neuqi_serve.config import SUPPORTED_GROUP_SIZES, VocabularyBits, WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.format.source import open_source
from neuqi_serve.pipeline.quantize_checkpoint import plan_tensors
from neuqi_serve.pipeline.selection import select_modules

SPEC = WeightSpec(2, 32)
ONE_SIZE = (32,)


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        (["model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.v_proj"], "q_proj+k_proj+v_proj"),
        (["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"], "gate_proj+up_proj"),
        (["m.layers.3.mlp.experts.0.gate_proj", "m.layers.3.mlp.experts.17.down_proj"], "experts"),
        (["m.layers.3.block_sparse_moe.experts.1.w1", "m.layers.3.block_sparse_moe.experts.1.w2"], "experts"),
        (["model.layers.3.mlp.down_proj"], "down_proj"),
    ],
)
def test_what_vllm_runs_as_one_layer_is_one_group(modules: list[str], name: str) -> None:
    names = {group_name(module) for module in modules}
    assert len(names) == 1
    assert names.pop().endswith(name)
    assert group_name("model.layers.2.self_attn.q_proj") != group_name("model.layers.3.self_attn.q_proj")


@pytest.mark.parametrize("tied", [True, False])
def test_groups_cover_the_model_once(write_llama: Callable[..., Path], tied: bool) -> None:
    source = open_source(write_llama(tied=tied))
    selection = select_modules(source, SPEC)
    groups = width_groups(source, selection, VocabularyBits(), ONE_SIZE)
    modules = [module for group in groups for module in group.modules]
    assert sorted(modules) == sorted(selection.modules)
    assert len(modules) == len(set(modules))
    vocabulary = [group for group in groups if group.vocabulary]
    assert [[c.bits for c in group.choices] for group in vocabulary] == [[4, 8, 16]] * (1 if tied else 2)
    assert all([c.bits for c in g.choices] == [2, 3, 4, 8] for g in groups if not g.vocabulary)
    assert all([c.nbytes for c in g.choices] == sorted(c.nbytes for c in g.choices) for g in groups)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sizes_are_those_of_the_packed_folder(write_llama: Callable[..., Path], bits: int) -> None:
    source = open_source(write_llama())
    selection = select_modules(source, WeightSpec(bits, 32))
    planned = sum(spec.nbytes for spec in plan_tensors(source, selection).values())
    assert bytes_at(source, select_modules(source, SPEC), bits) == planned
    groups = width_groups(source, selection, VocabularyBits(), ONE_SIZE)
    wanted = {True: 8, False: bits}
    chosen = [c.nbytes for g in groups for c in g.choices if c.bits == wanted[g.vocabulary]]
    assert kept_bytes(source, selection) + sum(chosen) == planned


def test_half_a_bit_lies_half_way(write_llama: Callable[..., Path]) -> None:
    source = open_source(write_llama())
    selection = select_modules(source, SPEC)
    two, half, three = (bytes_at(source, selection, bits) for bits in (2, 2.5, 3))
    assert half == (two + three) // 2
    for bits in (1.5, 8.5):
        with pytest.raises(UsageError, match="from 2 to 8 bits"):
            bytes_at(source, selection, bits)


def test_a_width_that_was_asked_for_is_the_only_choice(write_llama: Callable[..., Path]) -> None:
    source = open_source(write_llama())
    asked = VocabularyBits(lm_head=4, embedding=16)
    groups = width_groups(source, select_modules(source, SPEC, asked), asked, ONE_SIZE)
    assert [[c.bits for c in g.choices] for g in groups if g.vocabulary] == [[4]]
    tied = open_source(write_llama("tied", tied=True))
    asked = VocabularyBits(lm_head=8)
    groups = width_groups(tied, select_modules(tied, SPEC, asked), asked, ONE_SIZE)
    assert [[c.bits for c in g.choices] for g in groups if g.vocabulary] == [[8]]


def test_group_sizes_that_divide_the_rows_are_choices_too(write_llama: Callable[..., Path]) -> None:
    source = open_source(write_llama())
    groups = width_groups(source, select_modules(source, SPEC), VocabularyBits(), SUPPORTED_GROUP_SIZES)
    sizes = {g.name.rpartition(".")[2]: {c.spec.group_size for c in g.choices if c.spec} for g in groups}
    # Rows of 64: a group of 64 stores what the whole row does, and is offered once. Rows of 96: 64 does not divide.
    assert sizes["o_proj"] == {32, 64}
    assert sizes["down_proj"] == {32, -1}
    for group in groups:
        nbytes = [choice.nbytes for choice in group.choices]
        assert nbytes == sorted(set(nbytes))
