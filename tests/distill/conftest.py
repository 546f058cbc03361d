"""A tiny model with a tokenizer, a text, and the model packed to 2 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """A random model with the demo's layout, whose norms differ from one."""
    from neuqi_serve.demo.export import write_model
    from neuqi_serve.demo.network import Network, NetworkShape
    from neuqi_serve.demo.tokens import train_tokenizer

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shape = NetworkShape(vocab_size=400, hidden_size=64, intermediate_size=96, layers=2, heads=1, kv_heads=1)
    network = Network(shape)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim == 1:
                value.copy_(1 + 0.2 * torch.randn(value.shape))
            elif "embed" not in name:
                value.mul_(3.0)
    write_model(folder, network, train_tokenizer(400, sample=300))
    return folder


@pytest.fixture(scope="session")
def packed(original, tmp_path_factory) -> Path:
    from neuqi_serve.config import WeightSpec
    from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

    folder = tmp_path_factory.mktemp("packed") / "tiny-2bit"
    quantize_checkpoint(original, folder, QuantizationSettings(WeightSpec(2, 32)))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    from neuqi_serve.demo.tasks import held_out_tasks

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(f"{task.prompt} {task.answer}" for task in held_out_tasks(400, 5)))
    return file
