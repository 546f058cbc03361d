"""Quantize a model with the package ``auto-round``, in a process of its own with the peers' folder on the path.

    python auto_round_worker.py MODEL OUT BITS GROUP_SIZE ITERATIONS WINDOWS KEPT

``WINDOWS``: safetensors with the token ids ``windows [S, T]``. ``KEPT``: names of layers that stay, with commas
between. Writes the de-quantized weights of the quantized layers, float32, as safetensors.
"""

import sys

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def main() -> None:
    model_path, out, bits, group_size, iterations, windows_path, kept = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    windows = load_file(windows_path)["windows"]
    parts = [part for part in windows.split(BATCH) if len(part) == BATCH]
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]
    before = {name: module.weight.detach().clone() for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear)}  # fmt: skip
    tuner = AutoRound(
        model,
        tokenizer,
        bits=int(bits),
        group_size=int(group_size),
        sym=False,
        iters=int(iterations),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=BATCH,
        dataset=data,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
        layer_config={name: {"bits": 16, "data_type": "float"} for name in filter(None, kept.split(","))},
    )
    tuned, _ = tuner.quantize()
    found = {
        name: module.weight.detach().float().contiguous()
        for name, module in tuned.named_modules()
        if name in before and not torch.equal(module.weight.float(), before[name])
    }
    save_file(found, out)


if __name__ == "__main__":
    main()
