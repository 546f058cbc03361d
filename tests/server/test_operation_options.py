"""The options of the operation: where the status port is, and values that are refused."""

from __future__ import annotations

import pytest

from neuqi_serve.errors import UsageError
from neuqi_serve.server.command_line import read_early
from neuqi_serve.server.listen_address import ListenAddress


@pytest.mark.parametrize(
    ("words", "address"),
    [
        ([], ListenAddress("127.0.0.1", 9000)),
        (["--port", "8080", "--host", "0.0.0.0"], ListenAddress("0.0.0.0", 9080)),
        (["--port", "65000"], ListenAddress("127.0.0.1", 64000)),
        (["--status-port", "8001", "--status-host", "10.0.0.1"], ListenAddress("10.0.0.1", 8001)),
        (["--status-port", "0"], None),
        (["--uds", "/run/s"], None),
        (["--uds", "/run/s", "--status-port=8001"], ListenAddress("127.0.0.1", 8001)),
    ],
)
def test_the_status_port(words: list[str], address: ListenAddress | None) -> None:
    early = read_early(["m", *words])
    assert early.operation.status_address(early.address) == address


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--requests-per-minute", "0"], "--requests-per-minute above 0"),
        (["--tokens-per-minute", "-3"], "--tokens-per-minute above 0"),
        (["--max-request-bytes", "0"], "--max-request-bytes above 0"),
        (["--drain-timeout", "-1"], "--drain-timeout of 0 s or more"),
        (["--status-port", "70000"], "--status-port from 0 to 65535"),
    ],
)
def test_numbers_outside_their_range_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_early(["m", *words])
