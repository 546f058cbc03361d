"""Bytes of a packed model's weights by component, whole and on one of several ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from neuqi_serve.config import EMBEDDING, LM_HEAD, WHOLE_ROW, VocabularyBits, WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.format.manifest import PackedModule
from neuqi_serve.format.quantization_config import is_name_of
from neuqi_serve.format.source import SourceCheckpoint
from neuqi_serve.pipeline.families import Family, family_of
from neuqi_serve.pipeline.selection import Selection, select_modules

# vLLM pads the vocabulary to a multiple of this before it shares it out.
VOCABULARY_PADDING = 64
_EXPERT = re.compile(r"\.experts\.\d+\.")
_INPUT_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight")
_KEY_VALUE = ("k_proj", "v_proj")
# vLLM makes one layer of each of these; the largest layer decides the peak of loading.
_FUSED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}


@dataclass(frozen=True)
class Weights:
    """Bytes of the packed model.

    ``codes``: of the linear layers in the blocks; ``scales``: their scales and zero-points; ``head``, ``embedding``:
    what output head and embedding take, all parts (a tied pair counts once, as ``head``); ``kept``: everything that
    stays as it was. ``original``: before. ``largest_layer``: the largest layer before, fused as vLLM fuses it.
    ``read_per_token``: what one decoding step reads of them; of the experts, those that are chosen.
    """

    codes: int
    scales: int
    head: int
    embedding: int
    kept: int
    original: int
    largest_layer: int
    read_per_token: int
    linear_weights: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.codes + self.scales + self.head + self.embedding + self.kept

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the linear layers, scales and zero-points included."""
        return 8 * (self.codes + self.scales) / self.linear_weights if self.linear_weights else 0.0


def weights_of(
    source: SourceCheckpoint,
    spec: WeightSpec,
    vocabulary: VocabularyBits | None = None,
    ranks: int = 1,
) -> Weights:
    """Return the bytes of this checkpoint packed with ``spec``, on one of ``ranks`` tensor-parallel ranks.

    With one rank the sum is that of the packed folder's tensors, to the byte. With several it is the largest rank's:
    columns and rows are shared out, norms and biases are on every rank.

    Raises:
        UnsupportedModelError: an architecture that cannot be packed.
        UsageError: the group size divides no layer's rows, or the layers cannot be shared out so.
    """
    selection = select_modules(source, spec, vocabulary)
    family = family_of(source.architecture, source.config)
    if ranks > 1:
        check_ranks(source, selection, family, ranks)
    sums = dict.fromkeys(("codes", "scales", "head", "embedding", "read", "weights"), 0)
    chosen = _chosen_share(source)
    for name, shape in selection.modules.items():
        packed = PackedModule(
            selection.recipe.spec_of(name), shape, source.tensors[f"{name}.weight"].spec.dtype
        )
        share = 1 / ranks if ranks > 1 else 1.0
        if is_name_of(LM_HEAD, name) or is_name_of(EMBEDDING, name):
            nbytes = _vocabulary_bytes(packed, ranks)
            head = selection.tied or is_name_of(LM_HEAD, name)
            sums["head" if head else "embedding"] += nbytes
            sums["read"] += nbytes if head else 0
            continue
        if ranks > 1 and name.rpartition(".")[2] in _KEY_VALUE:
            share = max(share, 1 / _kv_heads(source))
        codes = packed.tensors["qweight"].nbytes
        sums["codes"] += round(codes * share)
        sums["scales"] += round((packed.packed_bytes - codes) * share)
        sums["weights"] += round(shape[0] * shape[1] * share)
        sums["read"] += round(packed.packed_bytes * share * (chosen if _EXPERT.search(name) else 1.0))
    kept = _kept_bytes(source, selection, ranks)
    unread = 0 if selection.tied else _unpacked_embedding(source, selection, ranks)
    return Weights(
        codes=sums["codes"],
        scales=sums["scales"],
        head=sums["head"],
        embedding=sums["embedding"],
        kept=kept,
        original=sum(tensor.spec.nbytes for tensor in source.tensors.values()) // ranks,
        largest_layer=_largest_layer(source, selection.modules) // ranks,
        read_per_token=sums["read"] + kept - unread,
        linear_weights=sums["weights"],
    )


def check_ranks(source: SourceCheckpoint, selection: Selection, family: Family, ranks: int) -> None:
    """Refuse a number of ranks that the heads or the groups of the row-parallel layers do not allow.

    Raises:
        UsageError: with the numbers that are allowed.
    """
    problem = _rank_problem(source, selection, family, ranks)
    if problem is not None:
        legal = [count for count in range(1, 65) if _rank_problem(source, selection, family, count) is None]
        raise UsageError(
            f"expected a tensor-parallel size that shares out every layer, got {ranks}: {problem}. "
            f"Sizes that do: {legal}."
        )


def _rank_problem(source: SourceCheckpoint, selection: Selection, family: Family, ranks: int) -> str | None:
    heads, kv_heads = int(source.config.get("num_attention_heads") or 1), _kv_heads(source)
    if heads % ranks:
        return f"{heads} attention heads"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} key-value heads"
    for name, (rows, columns) in selection.modules.items():
        last = name.rpartition(".")[2]
        spec = selection.recipe.spec_of(name)
        if last in family.writes or last == "w2":
            part, odd = divmod(columns, ranks)
            if odd or part % 32 or (spec.group_size != WHOLE_ROW and part % spec.group_size):
                return f"rows of {columns} weights in groups of {spec.group_size} ({last})"
        elif last not in _KEY_VALUE and rows % ranks and not _is_vocabulary(name):
            return f"{rows} outputs ({last})"
    return None


def _is_vocabulary(name: str) -> bool:
    return is_name_of(LM_HEAD, name) or is_name_of(EMBEDDING, name)


def _kv_heads(source: SourceCheckpoint) -> int:
    config = source.config
    return int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 1)


def _vocabulary_bytes(packed: PackedModule, ranks: int) -> int:
    if ranks == 1:
        return packed.packed_bytes
    rows = -(-packed.shape[0] // VOCABULARY_PADDING) * VOCABULARY_PADDING
    return packed.packed_bytes // packed.shape[0] * -(-rows // ranks)


def _kept_bytes(source: SourceCheckpoint, selection: Selection, ranks: int) -> int:
    total = 0
    for name, stored in source.tensors.items():
        if name.removesuffix(".weight") in selection.modules:
            continue
        # Output head and embedding are shared out also where they stay as they are; the rest is on every rank.
        shared = _has_vocabulary_rows(source, stored.spec.shape)
        total += stored.spec.nbytes // ranks if shared else stored.spec.nbytes
    return total


def _unpacked_embedding(source: SourceCheckpoint, selection: Selection, ranks: int) -> int:
    """Bytes of an embedding that stays as it is, of which a step reads one row per token."""
    sizes = [
        stored.spec.nbytes
        for name, stored in source.tensors.items()
        if name.endswith(_INPUT_EMBEDDINGS)
        and _has_vocabulary_rows(source, stored.spec.shape)
        and name.removesuffix(".weight") not in selection.modules
    ]
    return sum(sizes) // ranks


def _has_vocabulary_rows(source: SourceCheckpoint, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == source.config.get("vocab_size")


def _chosen_share(source: SourceCheckpoint) -> float:
    config = source.config
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
    chosen = config.get("num_experts_per_tok")
    return min(1.0, int(chosen) / int(experts)) if experts and chosen else 1.0


def _largest_layer(source: SourceCheckpoint, modules: Iterable[str]) -> int:
    layers: dict[str, int] = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        layer = f"{parent}.{_FUSED.get(last, last)}"
        layers[layer] = layers.get(layer, 0) + source.tensors[f"{name}.weight"].spec.nbytes
    return max(layers.values(), default=0)


def components(weights: Weights, tied: bool) -> Mapping[str, int]:
    """Return the components in the order of a table, those that are there."""
    rows = {
        "codes": weights.codes,
        "scales and zero-points": weights.scales,
        "output head and embedding" if tied else "output head": weights.head,
        "embedding": weights.embedding,
        "unquantized": weights.kept,
    }
    return {name: nbytes for name, nbytes in rows.items() if nbytes}
