"""All that a server needs to let clients in, made ready and checked before anything slow: socket, TLS, keys."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import shlex
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

from service.errors import AddressError, UsageError
from service.gateway.address import Address, Certificate, TcpAddress, UnixAddress, listening, url_of
from service.gateway.api_keys import KeyRing
from service.keys import load_keys, reload_keys
from service.settings import ServeSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """A bound socket, and who may come in how. `tls` None means in clear, `keys` None everybody."""

    settings: ServeSettings
    address: Address
    sock: socket.socket
    tls: ssl.SSLContext | None
    keys: KeyRing | None

    @property
    def url(self) -> str:
        return url_of(self.sock, is_tls=self.tls is not None)

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """See `GatewaySettings`. On loopback without keys only the address and the network card keep strangers out, and
        a page in a browser on this machine is behind both.
        """
        given = self.settings.allowed_hosts
        if given or self.keys is not None or self.sock.family == socket.AF_UNIX:
            return given
        is_loopback = ipaddress.ip_address(self.sock.getsockname()[0]).is_loopback
        return ("localhost", self.settings.host) if is_loopback else ()

    def curl(self, path: str) -> str:
        """The beginning of a command that asks for `path`, for a shell. The key is to be in the environment."""
        where = f"{self.url}{path}"
        if isinstance(self.address, UnixAddress):
            scheme = "http" if self.tls is None else "https"
            where = f"--unix-socket {shlex.quote(str(self.address.path))} {scheme}://localhost{path}"
        key = "" if self.keys is None else ' -H "Authorization: Bearer $TESSERA_API_KEY"'
        return f"curl {where}{key}"

    @property
    def has_files(self) -> bool:
        """Whether `reload` would read anything."""
        return self.settings.ssl_certfile is not None or self.settings.api_key_file is not None

    def reload(self) -> None:
        """Reads certificate and keys again. What cannot be used is reported in the log and changes nothing."""
        certificate = certificate_of(self.settings)
        if certificate is not None and self.tls is not None:
            try:
                certificate.load_into(self.tls)
            except OSError as error:
                logger.error("the certificate stays as it was: %s", error)  # noqa: TRY400 - a line for an operator
            else:
                logger.info("%s is the certificate from now on", certificate.certfile)
        if self.keys is not None and self.settings.api_key_file is not None:
            reload_keys(self.settings, self.keys)


@contextlib.contextmanager
def open_front_door(settings: ServeSettings) -> Iterator[FrontDoor]:
    """The front door that `settings` ask for. Raises UsageError and AddressError."""
    keys = load_keys(settings)
    tls = _tls(settings)
    address = _address(settings)
    try:
        listener = listening(address)
        sock = listener.__enter__()
    except OSError as error:
        raise AddressError(address.explain(error)) from error
    with contextlib.ExitStack() as stack:
        stack.push(listener)
        yield FrontDoor(settings, address, sock, tls, keys)


def certificate_of(settings: ServeSettings) -> Certificate | None:
    """Raises UsageError for a key without a certificate."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise UsageError("--ssl-keyfile needs --ssl-certfile")
        return None
    return Certificate(settings.ssl_certfile, settings.ssl_keyfile)


def _tls(settings: ServeSettings) -> ssl.SSLContext | None:
    certificate = certificate_of(settings)
    if certificate is None:
        return None
    try:
        return certificate.context()
    except OSError as error:
        files = " and ".join(str(path) for path in (certificate.certfile, certificate.keyfile) if path is not None)
        raise UsageError(f"--ssl-certfile: {files}: {error.strerror or error}") from error


def _address(settings: ServeSettings) -> Address:
    if settings.uds is None:
        return TcpAddress(settings.host, settings.port)
    return UnixAddress(settings.uds, int(settings.uds_mode, 8))
