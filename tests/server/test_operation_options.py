"""Where the status port is, by the options and the main address."""

from __future__ import annotations

import pytest

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
