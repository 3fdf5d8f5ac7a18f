"""Where load may go: only to this machine, unless its owner says otherwise. A name is resolved once."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from loadtests.errors import TargetError


@dataclass(frozen=True, slots=True)
class Target:
    """One server. `address` is the numeric address that connections go to, `prefix` what stands before `/v1`."""

    host: str
    address: str
    port: int
    prefix: str = ""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}{self.prefix}"


def resolve_target(url: str, *, is_owned: bool = False) -> Target:
    """Returns the target of `url`; raises TargetError where load must not or cannot go.

    Every address of the name has to be a loopback address unless `is_owned`. The address checked is the address
    used, so a name that changes its mind between two look-ups changes nothing.
    """
    parts = urlsplit(url)
    if parts.scheme != "http":
        raise TargetError(f"{url!r}: this client speaks plain http:// only")
    if parts.hostname is None or parts.username is not None or parts.query or parts.fragment:
        raise TargetError(f"{url!r}: give http://HOST:PORT, without user, query or fragment")
    port = _port(url)
    addresses = _addresses(parts.hostname, port)
    outside = [address for address in addresses if not is_loopback(address)]
    if outside and not is_owned:
        raise TargetError(
            f"{parts.hostname} is {outside[0]}, not this machine; load goes to other hosts only with --i-own-this-host"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Target(host, addresses[0], port, parts.path.rstrip("/").removesuffix("/v1"))


def is_loopback(address: str) -> bool:
    """Whether a numeric address never leaves this machine."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def _port(url: str) -> int:
    try:
        port = urlsplit(url).port
    except ValueError:
        port = None
    if not port:
        raise TargetError(f"{url!r}: name the port, as in http://127.0.0.1:8000")
    return port


def _addresses(host: str, port: int) -> list[str]:
    """Numeric addresses of `host`, IPv4 first: servers that listen on one family listen on that one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TargetError(f"{host}: {error.strerror or error}") from error
    return sorted({str(entry[4][0]) for entry in found}, key=lambda address: (":" in address, address))
