import socket
from typing import Any

import pytest

from loadtests.errors import TargetError
from loadtests.target import is_loopback, resolve_target


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_loopback_addresses(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "10.0.0.1", "192.0.2.1", "128.0.0.1", "::", "fe80::1%eth0", "::ffff:8.8.8.8"]
)
def test_addresses_that_are_not_loopback(address: str) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://localhost:8000/", "http://localhost:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/behind/v1/", "http://127.0.0.1:8000/behind"),
    ],
)
def test_urls_of_this_machine(url: str, expected: str) -> None:
    target = resolve_target(url)
    assert target.url == expected
    assert is_loopback(target.address)


@pytest.mark.parametrize("url", ["http://192.0.2.1:80", "http://[2001:db8::1]:80", "http://0.0.0.0:80"])
def test_load_goes_nowhere_else(url: str) -> None:
    with pytest.raises(TargetError, match="i-own-this-host"):
        resolve_target(url)


def test_the_owner_may_name_another_host() -> None:
    assert resolve_target("http://192.0.2.1:80", is_owned=True).address == "192.0.2.1"


def test_a_name_with_one_address_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", ("127.0.0.1", 80)), (0, 0, 0, "", ("192.0.2.1", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(TargetError, match=r"192\.0\.2\.1"):
        resolve_target("http://two-faced:80")


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:80",
        "127.0.0.1:80",
        "http://127.0.0.1",
        "http://127.0.0.1:0",
        "http://127.0.0.1:x",
        "http://u:p@127.0.0.1:80",
        "http://127.0.0.1:80/?a=b",
        "http://no-such-host.invalid:80",
    ],
)
def test_what_is_not_a_target(url: str) -> None:
    with pytest.raises(TargetError):
        resolve_target(url)
