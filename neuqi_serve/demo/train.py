"""Trains the demo model from nothing: ``python -m neuqi_serve.demo.train --out DIR [--seed 0] [--steps N]
[--resume]``.

The batch of a step depends on the seed and the step only, and the checkpoint holds the optimizers, so a run
that is stopped and resumed gives the weights of a run that was not (same machine, same number of threads).
The learning rate is constant after a warm-up and falls in the last part only, so a run may also be resumed
with another --steps as long as that fall has not begun.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from neuqi_serve.demo.export import write_model
from neuqi_serve.demo.network import Network, NetworkShape
from neuqi_serve.demo.tokens import ChatRows, Row, train_tokenizer
from neuqi_serve.demo.workers import add_up, place, run_workers
from neuqi_serve.errors import NeuqiError, UsageError


@dataclass(frozen=True)
class TrainConfig:
    """What a run depends on besides the code; ``blocks`` are the (rows, tokens per row) of a step."""

    seed: int = 0
    steps: int = 1920
    blocks: tuple[tuple[int, int], ...] = ((24, 128), (4, 512))
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    weight_decay: float = 0.03
    warmup: int = 60
    decay_share: float = 0.271
    save_every: int = 100
    compile: bool = False

    def factor(self, step: int) -> float:
        """Share of the full rate at ``step`` (from 0): warm-up, constant, linear fall to almost zero."""
        fall = max(1, round(self.steps * self.decay_share))
        return min((step + 1) / self.warmup, 1.0, max((self.steps - step) / fall, 0.01))


class Run:
    """A network with its optimizers and the number of finished steps."""

    def __init__(self, config: TrainConfig, shape: NetworkShape, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.network = Network(shape, config.seed)
        self.done = 0
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, weight in self.network.named_parameters():
            (matrices if weight.dim() == 2 and "embed" not in name else rest).append(weight)
        self.muon = torch.optim.Muon(matrices, lr=config.muon_rate, weight_decay=config.weight_decay)
        self.adam = torch.optim.AdamW(rest, lr=config.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        if config.compile:
            for layer in self.network.model.layers:
                layer.compile(dynamic=False)

    def step(self) -> tuple[float, int]:
        """One optimizer step; returns (mean loss per answer token in nats, number of tokens read)."""
        config = self.config
        source = ChatRows(self.tokenizer, f"{config.seed} step {self.done}")
        blocks = [[source.row(width) for _ in range(rows)] for rows, width in config.blocks]
        count = sum(len(chat.targets) for chats in blocks for chat in chats)
        total = torch.zeros(1)
        rank, workers = place()
        for chats in blocks:
            tokens, sources, targets = _batch(chats[rank::workers])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = self.network(tokens, sources)
            loss = F.cross_entropy(logits, targets, reduction="sum") / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        grads = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        add_up([total, *grads])
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        factor = config.factor(self.done)
        for optimizer, rate in ((self.muon, config.muon_rate), (self.adam, config.adam_rate)):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
        self.done += 1
        return total.item(), sum(rows * width for rows, width in config.blocks)

    def save(self, out: Path) -> None:
        """Write the checkpoint and the exported model; neither is ever seen half written."""
        state = {
            "done": self.done,
            "network": self.network.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "seed": self.config.seed,
        }
        draft = out / "checkpoint.pt.part"
        torch.save(state, draft)
        os.replace(draft, out / "checkpoint.pt")
        write_model(out / "model", self.network, self.tokenizer)

    def load(self, out: Path) -> None:
        """Continue from the checkpoint in ``out``; raises UsageError when it belongs to another seed."""
        state: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
        if state["seed"] != self.config.seed:
            raise UsageError(
                f"expected a checkpoint of seed {self.config.seed}, got {state['seed']}; use that --seed"
            )
        self.network.load_state_dict(state["network"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.done = state["done"]


def _batch(chats: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens int64 (chats, width), flat source positions int64 (n,) and target ids int64 (n,)."""
    width = len(chats[0].tokens)
    tokens = torch.tensor([chat.tokens for chat in chats])
    sources = torch.tensor(
        [i * width + position for i, chat in enumerate(chats) for position in chat.sources]
    )
    return tokens, sources, torch.tensor([target for chat in chats for target in chat.targets])


def load_tokenizer(out: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of this run: read from ``out`` when it is there, else trained and written."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tokenizer.json"
    if not path.is_file():
        draft = out / "tokenizer.json.part"
        train_tokenizer(vocab_size).save(str(draft))
        os.replace(draft, path)
    return Tokenizer.from_file(str(path))


def train(
    out: Path, config: TrainConfig, shape: NetworkShape, resume: bool = False, stop: int | None = None
) -> Run:
    """Train until ``config.steps`` (or until ``stop`` steps, to continue later) and return the finished run.

    ``out`` receives tokenizer.json, checkpoint.pt, train.log (one JSON object a line) and the folder model/.
    Raises UsageError when ``out`` holds a checkpoint and ``resume`` is false, or the other way round.
    """
    if (out / "checkpoint.pt").exists() != resume:
        if resume:
            raise UsageError(f"expected a checkpoint in {out}, found none; start without --resume")
        raise UsageError(f"expected no checkpoint in {out}; continue with --resume or choose another folder")
    run = Run(config, shape, load_tokenizer(out, shape.vocab_size))
    if resume:
        run.load(out)
    last = config.steps if stop is None else min(stop, config.steps)
    began, logged, tokens, losses = time.monotonic(), time.monotonic(), 0, []
    with (out / "train.log" if place()[0] == 0 else Path(os.devnull)).open("a", encoding="utf-8") as log:
        log.write(json.dumps({"config": asdict(config), "shape": asdict(shape), "from": run.done}) + "\n")
        while run.done < last:
            loss, read = run.step()
            losses.append(loss)
            tokens += read
            now = time.monotonic()
            if now - logged > 20 or run.done == last:
                entry = {
                    "step": run.done, "loss": round(sum(losses) / len(losses), 4), "tokens": tokens,
                    "seconds": round(now - began), "tokens_per_second": round(tokens / (now - began)),
                }  # fmt: skip
                log.write(json.dumps(entry) + "\n")
                log.flush()
                logged, losses = now, []
            if place()[0] == 0 and (run.done % config.save_every == 0 or run.done == last):
                run.save(out)
    return run


def _work(out: Path, config: TrainConfig, resume: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    train(out, config, NetworkShape(), resume=resume)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m neuqi_serve.demo.train", description="Train the demo model."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the rows of every step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a process")
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler)")
    options = parser.parse_args(arguments)
    config = TrainConfig(seed=options.seed, steps=options.steps, compile=options.compile)
    try:
        load_tokenizer(options.out, NetworkShape().vocab_size)
        run_workers(options.workers, _work, options.out, config, options.resume, options.threads)
    except NeuqiError as error:
        raise SystemExit(f"{parser.prog}: {error}") from error


if __name__ == "__main__":
    main()
