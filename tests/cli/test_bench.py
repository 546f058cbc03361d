from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuqi_serve.cli.main import main

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@WITHOUT_GPU
def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sm_90.json"
    assert main(["bench", "kernels", "--tune", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "error: expected a GPU that the Triton kernels run on, the backend refuses: needs a CUDA GPU, torch sees none. "
        "Run this on a machine with one.\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "expected a shape as NxK"),
        (["--shapes", "0x64"], "expected a shape as NxK"),
        (["--shapes", "64x100"], "a multiple of 32"),
        (["--shapes", "64x192", "--group-sizes", "128"], "the group size 128"),
        (["--out", "x.json"], "expected --tune beside --out"),
        (["--bits", "5"], "invalid choice"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom neuqi_serve.cli.main import main\nassert main(['bench', '--help']) == 0\n"
        "print([name for name in ('torch', 'vllm', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_on_a_gpu_it_writes_a_table_that_the_kernels_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuqi_kernels.gpu import tuning_table
    from neuqi_kernels.gpu.plan import target_of

    out = tmp_path / "plans.json"
    arguments = ["--shapes", "512x1024", "--bits", "4", "--tokens", "1", "64", "--out", str(out)]
    assert main(["bench", "kernels", "--tune", *arguments]) == 0
    monkeypatch.setenv("NEUQI_GPU_TUNING", str(out))
    architecture = target_of(torch.device("cuda", 0)).architecture
    for m in (1, 64):
        assert tuning_table.find(architecture, 4, 128, 512, 1024, m) is not None
