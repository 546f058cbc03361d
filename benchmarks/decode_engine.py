"""One engine in a process of its own: it loads a model, then measures whenever it is told to.

``python benchmarks/decode_engine.py '{"engine": "vllm" | "llama.cpp", "model": PATH, …}'`` prints a line of JSON when
the model is loaded, and another for each line ``run`` on its standard input. :class:`Engine` drives it from another
process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 8
WARMUP_TOKENS = 4
KERNEL_REPEATS = 5
START_TIMEOUT_SECONDS = 300
# vLLM's settings for a small machine, as `neuqi serve` chooses them.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "GOMP_SPINCOUNT": "20000",
}


class Engine:
    """An engine process, seen from the benchmark; ``told``: what it said when it had loaded."""

    def __init__(self, settings: dict[str, Any]) -> None:
        environment = (
            ENVIRONMENT | {"OMP_NUM_THREADS": str(settings["threads"])} | settings.get("environment", {})
        )
        command = [sys.executable, __file__, json.dumps(settings)]
        self._log = Path(settings["log"]).open("w", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | environment,
        )
        self.told = self._read()

    def measure(self) -> dict[str, Any]:
        """Decode and prefill once."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return result
        self._process.wait(60)
        self._log.flush()
        tail = Path(self._log.name).read_text(encoding="utf-8")[-2000:]
        raise RuntimeError(
            f"expected a measurement, the engine ended with {self._process.returncode}:\n{tail}"
        )


def tell(result: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(result), flush=True)


def memory() -> dict[str, int]:
    """Resident and peak resident bytes of this process."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return {
        name: int(fields[key].split()[0]) * 1024 for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))
    }


def per_step(seconds: list[float]) -> dict[str, float]:
    return {
        "decode_seconds": sum(seconds),
        "steps": len(seconds),
        "median_step": statistics.median(seconds),
        "min_step": min(seconds),
    }


class VllmEngine:
    """vLLM in this process; the engine's own steps are timed, one token of one request each."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        from neuqi_serve.server.defaults import NORM_OPERATIONS, NORM_PROVIDER

        self._settings = settings
        eager = settings.get("eager", True)
        self._llm = LLM(
            settings["model"],
            max_model_len=settings["context"],
            max_num_seqs=4,
            enforce_eager=eager,
            kv_cache_memory_bytes=256 << 20,
            enable_prefix_caching=False,
            distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
            ir_op_priority={name: [NORM_PROVIDER, "native"] for name in NORM_OPERATIONS if eager},
            disable_log_stats=True,
            seed=0,
            **settings.get("options", {}),
        )
        self._requests = 0
        self.run(WARMUP_TOKENS)
        self._layers = self._llm.llm_engine.apply_model(matrix_layers)[0]

    def _steps(self, prompt: int, tokens: int) -> list[float]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        ids = [3 + i * 7 % (self._settings["vocab"] - 3) for i in range(prompt)]
        engine = self._llm.llm_engine
        self._requests += 1
        engine.add_request(str(self._requests), {"prompt_token_ids": ids}, sampling)
        seconds = []
        while engine.has_unfinished_requests():
            began = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - began)
        return seconds

    def run(self, tokens: int) -> dict[str, Any]:
        prefill = self._steps(self._settings["prefill"], 1)
        # The first step is the prompt's.
        decode = self._steps(PROMPT_TOKENS, tokens + 1)[1:]
        return per_step(decode) | {"prefill_seconds": sum(prefill)}

    def kernels(self) -> dict[str, float]:
        """Seconds of all matrix products of a step, in the model's order, nothing else in between."""
        import torch

        times: dict[str, float] = {}
        for name, rows in (("kernel_step", 1), ("kernel_prefill", self._settings["prefill"])):
            runs = []
            inputs = {k: torch.randn(rows, k, dtype=torch.bfloat16) for k in {k for _, k, _ in self._layers}}
            for _ in range(KERNEL_REPEATS):
                began = time.perf_counter()
                with torch.inference_mode():
                    for layer, k, is_head in self._layers:
                        # Logits are wanted for the last token only.
                        layer.quant_method.apply(layer, inputs[k][-1:] if is_head else inputs[k], None)
                runs.append(time.perf_counter() - began)
            times[name] = statistics.median(runs)
        return times


def matrix_layers(model: Any) -> list[tuple[Any, int, bool]]:
    """Every linear layer and the output head, with its input size and whether it is the head."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return [
        (layer, int(layer.input_size), isinstance(layer, ParallelLMHead))
        for layer in model.modules()
        if isinstance(layer, LinearBase | ParallelLMHead)
    ]


class LlamaCppEngine:
    """llama.cpp through llama-cpp-python: as many threads, greedy."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from llama_cpp import Llama

        self._settings = settings
        self._llama = Llama(
            settings["model"],
            n_ctx=settings["context"],
            n_batch=512,
            n_threads=settings["threads"],
            n_threads_batch=settings["threads"],
            verbose=False,
        )
        self.run(WARMUP_TOKENS)

    def _eval(self, tokens: list[int]) -> int:
        import llama_cpp
        import numpy as np

        self._llama.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._settings["vocab"],))))

    def run(self, tokens: int) -> dict[str, Any]:
        self._llama.reset()
        began = time.perf_counter()
        self._eval([3 + i * 7 % (self._settings["vocab"] - 3) for i in range(self._settings["prefill"])])
        prefill = time.perf_counter() - began
        self._llama.reset()
        token = self._eval(list(range(3, 3 + PROMPT_TOKENS)))
        seconds = []
        for _ in range(tokens):
            began = time.perf_counter()
            token = self._eval([token])
            seconds.append(time.perf_counter() - began)
        return per_step(seconds) | {"prefill_seconds": prefill}

    def kernels(self) -> dict[str, float]:
        return {}


ENGINES: dict[str, Callable[[dict[str, Any]], Any]] = {"vllm": VllmEngine, "llama.cpp": LlamaCppEngine}


def main() -> int:
    settings = json.loads(sys.argv[1])
    began = time.perf_counter()
    engine = ENGINES[settings["engine"]](settings)
    tell({"load_seconds": time.perf_counter() - began})
    for _ in sys.stdin:
        tell(engine.run(settings["tokens"]) | engine.kernels() | memory())
    return 0


if __name__ == "__main__":
    code = main()
    # vLLM's threads need not be waited for.
    os._exit(code)
