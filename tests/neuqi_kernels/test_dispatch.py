import pytest
import torch

from neuqi_kernels import dispatch
from neuqi_kernels.spec import GemmSpec


def spec(device: str = "cpu", **changes: object) -> GemmSpec:
    fields: dict[str, object] = {
        "n": 48,
        "k": 64,
        "bits": 3,
        "group_size": 32,
        "device_type": device,
        "dtype": torch.bfloat16,
    }
    return GemmSpec(**(fields | changes))


def test_a_cpu_layer_never_runs_on_the_slow_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUQI_KERNEL_BACKEND", raising=False)
    assert dispatch.choose(spec()).name.startswith("cpu_")


def test_an_unknown_device_falls_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUQI_KERNEL_BACKEND", raising=False)
    assert dispatch.choose(spec("xpu")).name == "reference"


def test_the_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "reference")
    assert dispatch.choose(spec()).name == "reference"


def test_a_forced_backend_that_refuses_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "cpu_blocks")
    with pytest.raises(ValueError, match=r"refuses: .*the weights are on cuda.*Unset NEUQI_KERNEL_BACKEND"):
        dispatch.choose(spec("cuda"))
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"expected a backend of .*'abacus'"):
        dispatch.choose(spec())


def test_explain_names_every_backend_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUQI_KERNEL_BACKEND", raising=False)
    text = dispatch.explain(spec())
    lines = text.splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(dispatch.backend_names())
    assert sum(line.split(": ")[1].startswith("runs") for line in lines[1:]) == 1
    assert "triton: refuses" in text


def test_groups_of_a_spec() -> None:
    assert (spec().group, spec().groups) == (32, 2)
    assert (spec(group_size=-1).group, spec(group_size=-1).groups) == (64, 1)
