"""Sockets: ports and files, what is in the way of them, who may use them, TLS on them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from service.gateway import http_server
from service.gateway.address import Address, Certificate, TcpAddress, UnixAddress, listening, url_of
from service.gateway.app import create_app
from service.gateway.drain import Drain
from tests.gateway.certificates import make_certificate, trusting
from tests.gateway.fake_engine import FakeEngine, say
from tests.gateway.server import served_model


def test_a_port_in_use_is_explained() -> None:
    with TcpAddress("127.0.0.1", 0).bind() as first:
        first.listen()
        address = TcpAddress("127.0.0.1", first.getsockname()[1])
        with pytest.raises(OSError, match="in use") as caught:
            address.bind()
        assert f"port {address.port} on 127.0.0.1 is in use" in address.explain(caught.value)


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")]
)
def test_a_sockets_url_is_one_to_click(host: str, url: str) -> None:
    if ":" in host and not _has_ipv6():
        pytest.skip("no IPv6 here")
    with TcpAddress(host, 0).bind() as sock:
        assert url_of(sock) == f"{url}{sock.getsockname()[1]}"
        assert url_of(sock, is_tls=True) == f"{url}{sock.getsockname()[1]}".replace("http", "https")


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_a_unix_socket_has_the_mode_it_was_given_and_is_removed(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "s"
    umask = os.umask(0o022)
    with listening(UnixAddress(path, mode)) as sock:
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert url_of(sock) == f"unix:{path}"
    assert not path.exists()
    assert os.umask(umask) == 0o022


def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    address = UnixAddress(tmp_path / "s")
    address.bind().close()
    assert address.path.exists()
    with listening(address) as sock:
        sock.listen()
        with pytest.raises(OSError, match="in use") as caught:
            address.bind()
        assert "--uds" in address.explain(caught.value)
        assert address.path.exists()


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    address = UnixAddress(tmp_path / "file")
    address.path.write_text("precious")
    with pytest.raises(FileExistsError) as caught:
        address.bind()
    assert "is no socket" in address.explain(caught.value)
    assert address.path.read_text() == "precious"
    link = UnixAddress(tmp_path / "link")
    link.path.symlink_to(address.path)
    with pytest.raises(FileExistsError):
        link.bind()
    missing = UnixAddress(tmp_path / "no" / "s")
    with pytest.raises(OSError, match="No such file") as caught_missing:
        missing.bind()
    assert "cannot listen on" in missing.explain(caught_missing.value)


def test_a_successors_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(UnixAddress(path)):
        path.unlink()
        with UnixAddress(path).bind():
            pass
    assert path.exists()


@contextlib.asynccontextmanager
async def serving(
    address: Address, *, proxies: tuple[str, ...] = (), cert: Certificate | None = None
) -> AsyncIterator[str]:
    """A gateway there, on this loop; gives its URL."""
    app = create_app(FakeEngine(say([5, 6])), served_model())
    drain: Drain = app.state.drain
    tls = cert.context() if cert else None
    ready = asyncio.Event()
    with listening(address) as sock:
        serving = asyncio.create_task(
            http_server.serve(
                app,
                sock,
                drain,
                drain_timeout_s=1.0,
                on_ready=ready.set,
                on_drain=lambda: None,
                tls=tls,
                trusted_proxies=proxies,
            )
        )
        async with asyncio.timeout(60):
            await ready.wait()
        try:
            yield url_of(sock, is_tls=tls is not None)
        finally:
            os.kill(os.getpid(), 15)
            await serving


async def test_completions_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(UnixAddress(path)):
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            answer = await client.post("/v1/completions", json={"prompt": [1], "stream": True})
            assert answer.status_code == 200
            assert answer.text.endswith("data: [DONE]\n\n")


async def test_completions_over_tls_and_nothing_in_clear(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    async with serving(TcpAddress("127.0.0.1", 0), cert=Certificate(cert, key)) as url:
        assert url.startswith("https://127.0.0.1:")
        async with httpx.AsyncClient(base_url=url, verify=trusting(cert), timeout=60) as client:
            answer = await client.post("/v1/completions", json={"prompt": [1], "stream": True})
            assert answer.text.endswith("data: [DONE]\n\n")
        async with httpx.AsyncClient(base_url=url, timeout=60) as stranger:
            with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
                await stranger.get("/livez")
        async with httpx.AsyncClient(base_url=url.replace("https", "http"), timeout=60) as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get("/livez")


async def test_old_tls_is_refused(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    assert Certificate(cert, key).context().minimum_version >= ssl.TLSVersion.TLSv1_2


def test_a_new_certificate_is_taken_and_a_bad_one_is_not(tmp_path: Path) -> None:
    first, second = make_certificate(tmp_path, "first"), make_certificate(tmp_path, "second")
    certificate = Certificate(*first)
    context = certificate.context()
    for file, new in zip(first, second, strict=True):
        file.write_bytes(new.read_bytes())
    certificate.load_into(context)
    first[1].write_text("no key")
    with pytest.raises(OSError):
        certificate.load_into(context)
    assert subject(context, second[0]) == "second"


def subject(context: ssl.SSLContext, trusted: Path) -> str:
    """Whose certificate a server with `context` shows."""
    incoming, outgoing, server_in, server_out = (ssl.MemoryBIO() for _ in range(4))
    client = trusting(trusted).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    server = context.wrap_bio(server_in, server_out, server_side=True)
    for _ in range(5):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        server_in.write(outgoing.read())
        incoming.write(server_out.read())
    shown = client.getpeercert()
    assert shown is not None
    return str(dict(pair[0] for pair in shown["subject"])["commonName"])  # type: ignore[misc]


def test_an_encrypted_key_is_an_error_and_no_question(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(key), "-out", str(locked), "-passout", "pass:secret"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    with pytest.raises(OSError):
        Certificate(cert, locked).context()


@pytest.mark.parametrize(
    ("proxies", "seen"), [((), "127.0.0.1"), (("127.0.0.0/8",), "203.0.113.9"), (("10.0.0.1",), "127.0.0.1")]
)
async def test_only_trusted_proxies_are_believed(
    proxies: tuple[str, ...], seen: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(TcpAddress("127.0.0.1", 0), proxies=proxies) as url, httpx.AsyncClient(timeout=60) as client:
        with caplog.at_level("INFO", logger="tessera.access"):
            await client.get(f"{url}/version", headers={"X-Forwarded-For": "203.0.113.9"})
    [record] = [record for record in caplog.records if record.name == "tessera.access"]
    assert record.fields["client"] == seen  # type: ignore[attr-defined]
