"""Where a server listens: a TCP port or a Unix socket, in clear or behind TLS. Knows no HTTP."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A port of a host; port 0 is any that is free."""

    host: str
    port: int

    def bind(self) -> socket.socket:
        """A socket bound to the address, not yet listening. Raises OSError where that cannot be.

        Binding comes first in a server's life, so that a port in use is known before a model is loaded.
        """
        family, _, _, _, address = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
        return sock

    def explain(self, error: OSError) -> str:
        """One line for a person: what is wrong with the address, and what to do."""
        if error.errno == errno.EADDRINUSE:
            return f"port {self.port} on {self.host} is in use: stop what listens there, or choose another with --port"
        return f"cannot listen on {self.host} port {self.port}: {error.strerror or error}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system, which those may open whom `mode` lets read and write it."""

    path: Path
    mode: int = 0o600

    def bind(self) -> socket.socket:
        """A socket bound to the path, not yet listening; one that a dead server left there is replaced.

        Raises OSError where that cannot be. For the start of a process: its umask is changed for a moment.
        """
        self._clear()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Nobody may connect before the mode is set.
        before = os.umask(0o177)
        try:
            sock.bind(str(self.path))
            self.path.chmod(self.mode)
        except OSError:
            sock.close()
            raise
        finally:
            os.umask(before)
        return sock

    def explain(self, error: OSError) -> str:
        """One line for a person: what is wrong with the path, and what to do."""
        if error.errno == errno.EADDRINUSE:
            return f"{self.path} is in use: stop what listens there, or choose another with --uds"
        if error.errno == errno.EEXIST:
            return f"{self.path} is there and is no socket: remove it, or choose another with --uds"
        return f"cannot listen on {self.path}: {error.strerror or error}"

    def _clear(self) -> None:
        """Removes a socket to which nobody listens. Raises OSError where something else is in the way."""
        try:
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise FileExistsError(errno.EEXIST, "not a socket", str(self.path))
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink()
                return
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), str(self.path))


Address = TcpAddress | UnixAddress


@contextlib.contextmanager
def listening(address: Address) -> Iterator[socket.socket]:
    """A bound socket, closed on leaving; a file that it made is removed, unless it is another server's by then."""
    with address.bind() as sock:
        if isinstance(address, TcpAddress):
            yield sock
            return
        made = address.path.stat()
        try:
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(address.path.stat(), made):
                    address.path.unlink()


def url_of(sock: socket.socket, *, is_tls: bool = False) -> str:
    """The URL of a bound socket, as a client on this machine writes it; `unix:PATH` for one in the file system."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    scheme = "https" if is_tls else "http"
    return f"{scheme}://[{host}]:{port}" if address.version == 6 else f"{scheme}://{host}:{port}"


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files of a certificate with its chain and of its private key, which may be one file."""

    certfile: Path
    keyfile: Path | None = None

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 and newer with this certificate. Raises OSError, of which ssl.SSLError is one."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        self.load_into(context)
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Makes new connections use what the files hold now. Raises OSError and leaves it as it was."""
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*self._files)
        context.load_cert_chain(*self._files)

    @property
    def _files(self) -> tuple[Path, Path | None, str]:
        # With a password, if a wrong one, OpenSSL fails where it would otherwise ask the terminal for it.
        return self.certfile, self.keyfile, "none"
