"""Quantize a model's layers with the package ``hqq``, in a process of its own with the peers' folder on the path.

    python hqq_worker.py MODEL OUT BITS GROUP_SIZE LAYERS

``LAYERS``: names of linear layers, with commas between. Scales and zero-points, which HQQ keeps real as we do, are
rounded to float16, in which they would be stored. Writes the de-quantized weights, float32, as safetensors.
"""

import sys

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    model_path, out, bits, group_size, layers = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    found = {}
    for name in layers.split(","):
        weight = model.get_submodule(name).weight.detach()
        size = weight.shape[1] if int(group_size) == -1 else int(group_size)
        settings = BaseQuantizeConfig(nbits=int(bits), group_size=size, axis=1)["weight_quant_params"]
        codes, meta = Quantizer.quantize(
            weight, device="cpu", compute_dtype=torch.float32, bitpack=False, **settings
        )
        meta["scale"], meta["zero"] = meta["scale"].half().float(), meta["zero"].half().float()
        codes = codes.float()
        values = (codes - meta["zero"]) * meta["scale"]
        found[name] = values.reshape(weight.shape).contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main()
