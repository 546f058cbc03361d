"""The run of the GPU benchmark. Without a GPU: on stand-ins for the graphs, which check its decisions and no speed."""

from __future__ import annotations

import contextlib
import json
import time
from types import SimpleNamespace

import pytest
import torch


class StandInGraph:
    def replay(self) -> None:
        time.sleep(1e-5)


class StandInPeer:
    """The dense product under another name, with a fault."""

    def __init__(self, load, name: str, fault: str = "", integer: bool = False) -> None:
        self.name, self.fault, self.integer = name, fault, integer
        self.dense = load("gpu_peers.dense").DENSE
        self.built: list[str] = []

    def refuse(self, case):
        return "has no kernel" if self.fault == "refuses" else None

    def build(self, case, layer, rotated_bytes):
        self.built.append(str(case))
        if self.fault == "raises":
            raise RuntimeError("no such symbol")
        contender = self.dense.build(
            case, layer.with_integer_zeros() if self.integer else layer, rotated_bytes
        )
        if self.fault == "wrong":
            return type(contender)([lambda x: torch.full((len(x), case.n), torch.nan)] * 2, 1, layer, 0.1)
        return contender


@pytest.fixture
def script(load, monkeypatch):
    load("gpu_peers.layer").DEVICE = "cpu"
    script = load("gpu_kernels")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(L2_cache_size=1 << 16, uuid="none")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(script, "require_gpu", lambda: None)
    monkeypatch.setattr(script, "COPIED_BYTES", 1 << 10)
    monkeypatch.setattr(script, "NEUQI", StandInPeer(load, "neuqi"))
    peers = (
        StandInPeer(load, "right", integer=True),
        *(StandInPeer(load, fault, fault) for fault in ("refuses", "raises", "wrong")),
    )
    monkeypatch.setattr(script, "PEERS", peers)
    return script


def test_a_run_records_the_right_ones_and_says_why_not_the_others(script, tmp_path):
    script.main(
        [
            "--shapes",
            "64x128",
            "96x64",
            "--bits",
            "3",
            "--group-sizes",
            "64",
            "--tokens",
            "5",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "gpu_kernels.json").read_text())
    cases = {(r["case"]["contender"], r["case"]["n"], r["case"]["tokens"]) for r in result["records"]}
    names = ("torch bf16", "neuqi", "right")
    assert cases == {(name, n, tokens) for name in names for n in (64, 96) for tokens in (1, 5)}
    zeros = {record["case"]["contender"]: record["case"]["zeros"] for record in result["records"]}
    assert zeros == {"torch bf16": "real", "neuqi": "real", "right": "integer"}
    metrics = {record["metric"] for record in result["records"]}
    assert metrics == {"time", "time_p10", "time_p90", "packed_bandwidth", "error"}
    absent = result["notes"]["absent"]
    assert absent["refuses"] == {"has no kernel": ["64x128, 3 bits, group 64", "96x64, 3 bits, group 64"]}
    assert list(absent["raises"]) == ["failed: RuntimeError: no such symbol"]
    assert list(absent["wrong"]) == ["its rel-L2 against float64 is nan, more than 0.1"]
    assert len(absent["wrong"].popitem()[1]) == 4
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_what_does_not_fit_is_named(script, tmp_path, capsys):
    script.main(["--minutes", "0.1", "--quick", "--bits", "2", "--out", str(tmp_path)])
    assert "left out for lack of time: 512x1024, 2 bits, group 128" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_our_own_wrong_product_ends_the_run(script, load, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "NEUQI", StandInPeer(load, "neuqi", "wrong"))
    with pytest.raises(SystemExit, match=r"expected a right product of neuqi in 512x1024, 4 bits.*nan"):
        script.main(["--quick", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_an_unknown_peer_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--peers", "abacus"])
    assert "got ['abacus']" in capsys.readouterr().err


def test_a_graph_is_filled_by_whole_rounds(load):
    call_count = load("gpu_capture").call_count
    assert call_count(2e-5, 3) == 63
    assert call_count(2e-4, 3) == 9
    assert call_count(2e-5, 100) == 100
    assert call_count(5e-3, 7) == 2


def test_percentiles(load):
    percentiles = load("gpu_kernels").percentiles
    assert percentiles([float(value) for value in range(11)]) == (1.0, 9.0)
    assert percentiles([3.0]) == (3.0, 3.0)
