"""``NeuqiConfig``: what vLLM knows about a model quantized with the method ``neuqi``.

The class stays at module level: vLLM pickles its instance into the engine process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from neuqi_serve.config import EMBEDDING, LM_HEAD, WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.importance import Importance, read_importance
from neuqi_serve.format.online_settings import (
    ADDITIONAL_CONFIG,
    ADDITIONAL_CONFIG_KEY,
    HF_OVERRIDES,
    merge_settings,
    settings_object,
)
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.vllm_plugin import compat
from neuqi_serve.vllm_plugin.folder import check_folder, check_packed_settings
from neuqi_serve.vllm_plugin.layer_names import UnusedNames, is_skipped, shard_names
from neuqi_serve.vllm_plugin.linear import NeuqiOnlineLinearMethod, NeuqiPackedLinearMethod
from neuqi_serve.vllm_plugin.progress import LoadProgress
from neuqi_serve.vllm_plugin.sanity import SanityCheck
from neuqi_serve.vllm_plugin.slices import check_slice
from neuqi_serve.vllm_plugin.vocabulary import (
    NeuqiOnlineVocabularyMethod,
    NeuqiPackedVocabularyMethod,
    UnquantizedHeadMethod,
)

# A child of vLLM's logger, so that its handler prints our lines in every process.
logger = init_logger("vllm.neuqi")

# Beside the recipe's keys: a file of format.importance.
IMPORTANCE_KEY = "importance"


class NeuqiConfig(QuantizationConfig):
    """Bits and groups of every layer, and whether they come from a packed checkpoint or are made while loading.

    The on-the-fly settings are those of ``--additional-config '{"neuqi": {…}}'`` and of
    ``--hf-overrides '{"quantization_config": {"quant_method": "neuqi", …}}'`` together (two values for one key are an
    error), then the defaults (4 bits, group 128; output head and embedding 8 bits). Both are part of vLLM's
    compile-cache key, as environment variables are not.
    """

    def __init__(
        self,
        recipe: QuantizationRecipe | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.online = recipe is None
        self.settings = dict(settings or {})
        self.importance = _importance_of(self.settings)
        self.recipe = QuantizationRecipe.for_online(self.settings) if recipe is None else recipe
        self.progress = LoadProgress(silent=not self.online)
        self.sanity = SanityCheck()
        self._mapper: Any = None
        self._completed = False
        self.unused_names = UnusedNames()

    def __repr__(self) -> str:
        source = "on the fly" if self.online else "packed"
        spec = self.recipe.spec
        return f"NeuqiConfig({source}, bits={spec.bits}, group_size={spec.group_size})"

    @classmethod
    def get_name(cls) -> str:
        """Return the name under which vLLM registers the method."""
        return "neuqi"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the activation dtypes that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the lowest CUDA compute capability, times ten (Ampere: bf16 and asynchronous copies)."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: vLLM then builds the class without arguments for an unquantized checkpoint."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NeuqiConfig:
        """Build from ``config.json["quantization_config"]`` or its ``--hf-overrides`` twin.

        Raises:
            UsageError: bits, group size or scale dtype outside the supported set; no such importance file.
            IntegrityError: an unknown format version, a damaged importance file.
        """
        settings = dict(config)
        online = bool(settings.pop("online", False))
        return cls(settings=settings) if online else cls(QuantizationRecipe.from_dict(settings))

    @classmethod
    def from_config_dict_json(cls, text: str) -> NeuqiConfig:
        """Build from ``--hf-overrides '{"quantization_config_dict_json": "{…}"}'`` (unquantized checkpoints)."""
        return cls.from_config({"online": True, **json.loads(text)})

    @classmethod
    def from_config_file(cls, path: str) -> NeuqiConfig:
        """Build from ``--hf-overrides '{"quantization_config_file": "PATH"}'`` (unquantized checkpoints)."""
        return cls.from_config_dict_json(Path(path).read_text(encoding="utf-8"))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules of the recipe when vLLM names the model's modules differently."""
        self._mapper = hf_to_vllm_mapper
        self.recipe = self.recipe.renamed(hf_to_vllm_mapper.apply_list, hf_to_vllm_mapper.apply_dict)
        if self.importance is not None:
            self.importance = self.importance.renamed(hf_to_vllm_mapper.apply_dict)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """Check a packed folder's headers before anything is loaded.

        Raises:
            IntegrityError: the folder is not what its manifest says.
            UnsupportedModelError: it was packed for another architecture or recipe, or is to be quantized again.
        """
        check_folder(Path(model_name), self.online, self.recipe, getattr(hf_config, "architectures", None))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose the method of one layer: linear layers, experts, output head and embedding if the recipe names them.

        Raises:
            UnsupportedModelError: experts that the kernels cannot run, or fused shards that a recipe treats
                differently.
            UsageError: the group size does not divide the layer's input size.
        """
        self._complete_recipe()
        self.unused_names.see(prefix, shard_names(prefix, self.packed_modules_mapping))
        if compat.is_expert_layer(layer):
            return self._expert_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        if is_skipped(prefix, self.recipe.modules_to_not_convert, self.packed_modules_mapping):
            return UnquantizedLinearMethod()
        # Column and row parallel layers know their slice already, replicated ones have the whole input.
        whole = int(layer.input_size)
        if not _packs(prefix, whole):
            return UnquantizedLinearMethod()
        spec = self.spec_for(prefix)
        check_slice(spec, prefix, whole, int(getattr(layer, "input_size_per_partition", whole)), self.online)
        if self.online:
            return NeuqiOnlineLinearMethod(self, spec, self.importance_for(prefix, int(layer.input_size)))
        return NeuqiPackedLinearMethod(self, spec)

    def _expert_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        # Here, as not every model has experts and the module imports much.
        from neuqi_serve.vllm_plugin.expert_layer import expert_layer, matrix_names
        from neuqi_serve.vllm_plugin.experts import NeuqiOnlineExpertsMethod, NeuqiPackedExpertsMethod

        # None is vLLM's own method for unquantized experts.
        if self.recipe.keeps(prefix):
            return None
        self.unused_names.see(prefix, matrix_names(layer, prefix))
        experts = expert_layer(layer, prefix, self.recipe)
        if experts is None:
            return None
        method = NeuqiOnlineExpertsMethod if self.online else NeuqiPackedExpertsMethod
        return method(self, layer, experts)

    def _vocabulary_method(self, layer: VocabParallelEmbedding, prefix: str) -> QuantizeMethodBase | None:
        is_head = isinstance(layer, ParallelLMHead)
        # Some of vLLM's models do not tell the name of their embedding.
        name = prefix or (LM_HEAD if is_head else EMBEDDING)
        spec = self.recipe.vocabulary_spec(name)
        if spec is None or not _packs(name, layer.embedding_dim):
            return UnquantizedHeadMethod() if is_head else None
        check_slice(spec, name, layer.embedding_dim, layer.embedding_dim, self.online)
        if self.online:
            return NeuqiOnlineVocabularyMethod(self, spec)
        return NeuqiPackedVocabularyMethod(self, spec)

    def spec_for(self, prefix: str) -> WeightSpec:
        """Return the spec of the vLLM module ``prefix``.

        Raises:
            UnsupportedModelError: the shards that vLLM fuses into this module have different specs.
        """
        names = shard_names(prefix, self.packed_modules_mapping)
        # What is said of the fused module holds for its shards, unless they are named themselves.
        fused = self.recipe.spec_of(prefix)
        specs = {name: self.recipe.exception_of(name) or fused for name in names}
        if len(set(specs.values())) > 1:
            listed = ", ".join(f"{name}: {s.bits} bits g{s.group_size}" for name, s in specs.items())
            raise UnsupportedModelError(
                f"expected one width for all parts of {prefix!r}, which vLLM fuses into one layer; got {listed}. "
                "Quantize them alike."
            )
        return specs[names[0]]

    def importance_for(self, prefix: str, in_features: int) -> torch.Tensor | None:
        """Return h float32 ``[in_features]`` of the vLLM module ``prefix``, or None: then all inputs weigh alike.

        Raises:
            UsageError: the file has another length for this layer.
        """
        if self.importance is None:
            return None
        names = shard_names(prefix, self.packed_modules_mapping)
        found = (self.importance.of(name, in_features) for name in names)
        # Shards that are fused read the same input, for which they all give the same.
        importance = next((values for values in found if values is not None), None)
        if importance is None:
            logger.warning_once(
                "neuqi: %s has no importance for some layers, the first is %s: their inputs weigh alike",
                self.importance.path,
                prefix,
            )
        return importance

    def _complete_recipe(self) -> None:
        """Read what is known only while the model is built: the additional configuration, and whether it is tied."""
        if self._completed:
            return
        self._completed = True
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None:
            return
        additional = vllm_config.additional_config
        given = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
        settings = settings_object(given, ADDITIONAL_CONFIG)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            # A stage has some of the layers only.
            self.unused_names.silence()
        if not self.online:
            self.unused_names.silence()
            check_packed_settings(self.recipe, settings)
            return
        model_config = vllm_config.model_config
        # vLLM has already set it to false when the checkpoint brings a head of its own.
        tied = (
            bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
            if model_config
            else False
        )
        self.importance = _importance_of(settings) or self.importance
        merged = merge_settings([(HF_OVERRIDES, self.settings), (ADDITIONAL_CONFIG, settings)])
        architectures = getattr(model_config.hf_config, "architectures", None) if model_config else None
        self.recipe = QuantizationRecipe.for_online(
            merged, tied=tied, architecture=(architectures or [""])[0]
        )
        if self._mapper is not None:
            self.apply_vllm_mapper(self._mapper)
        self.unused_names.expect([*self.recipe.modules, *self.recipe.modules_to_not_convert])


def _packs(name: str, in_features: int) -> bool:
    """Whether rows of this length can be packed; says so where they cannot."""
    if in_features % 32 == 0:
        return True
    logger.warning_once(
        "neuqi: %s stays unquantized: its rows of %d weights are no multiple of 32", name, in_features
    )
    return False


def _importance_of(settings: dict[str, Any]) -> Importance | None:
    """Take the importance file out of the settings and read it."""
    path = settings.pop(IMPORTANCE_KEY, None)
    if path is not None and not isinstance(path, str):
        raise UsageError(f'expected "{IMPORTANCE_KEY}" to be the name of a file, got {path!r}. Correct it.')
    return None if path is None else read_importance(Path(path))
