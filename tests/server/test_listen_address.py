"""The address: where clients find it, and what happens when it is taken."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from neuqi_serve.errors import PortInUseError, UsageError
from neuqi_serve.server.listen_address import ListenAddress


@pytest.mark.parametrize(
    ("address", "url"),
    [
        (ListenAddress("127.0.0.1", 8000), "http://127.0.0.1:8000"),
        (ListenAddress("0.0.0.0", 8001), "http://127.0.0.1:8001"),
        (ListenAddress("", 8001), "http://127.0.0.1:8001"),
        (ListenAddress("::", 8002, tls=True), "https://[::1]:8002"),
        (ListenAddress("fe80::1", 8003), "http://[fe80::1]:8003"),
        (ListenAddress("", 8000, "/run/neuqi.sock"), "unix:/run/neuqi.sock"),
    ],
)
def test_url_is_one_that_a_local_client_can_open(address: ListenAddress, url: str) -> None:
    assert address.url == url


def test_a_taken_port_is_refused_with_the_next_one_as_remedy() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port} .*--port {port + 1}"):
            ListenAddress("127.0.0.1", port).check_free()
    ListenAddress("127.0.0.1", port).check_free()


def test_checking_leaves_the_port_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ListenAddress("127.0.0.1", port)
    address.check_free()
    address.check_free()


def test_an_address_of_another_machine_is_a_usage_error() -> None:
    # 192.0.2.0/24 is reserved for documentation (RFC 5737): no machine has it.
    with pytest.raises(UsageError, match=r"192\.0\.2\.1"):
        ListenAddress("192.0.2.1", 8000).check_free()


def test_an_existing_socket_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    ListenAddress("", 0, str(path)).check_free()
    path.touch()
    with pytest.raises(PortInUseError, match="remove it"):
        ListenAddress("", 0, str(path)).check_free()
