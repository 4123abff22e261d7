"""
One attempt over HTTP: encode the batch, compress, POST, read the answer.

The only file that uses httpx, and only from the delivering thread: importing it takes
longer than anything else here, so it is loaded with the first batch.

httpx's transport is used without its client.  The client would log a line for each
request at INFO, follow settings of its own for redirects, cookies and `netrc`,
and be patched by whoever traces httpx.
"""

from __future__ import annotations

import gzip
import platform
import socket
import sys
import threading
import urllib.parse
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import attrs

from pgtrack._clock import SYSTEM_CLOCK
from pgtrack._config import is_loopback
from pgtrack._retry import classify, short_reason
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import httpcore
    import httpx

    from pgtrack._config import Config

__all__ = [
    "HttpTransport",
    "allow_imports",
    "forget_imports",
    "hold_imports",
    "importing",
    "load",
]

_COMPRESS_FROM = 8 * 1024
_COMPRESS_LEVEL = 6
_MAX_ANSWER = 1024 * 1024
_WRITE_AT_ONCE = 16 * 1024
_COMPRESSION_REFUSED = frozenset({400, 415})

# Reentrant, for an import may itself fork: it may start a program.
_import_lock = threading.RLock()


@contextmanager
def importing() -> Iterator[None]:
    """
    Hold off forks while modules are imported.

    A child that is forked in the middle of an import finds the module half made and
    its lock held by a thread it does not have: its own import would wait for ever.
    """
    with _import_lock:
        yield


def hold_imports(timeout: float) -> bool:
    """Wait until no import is under way, and hold off further ones; before a fork."""
    return _import_lock.acquire(timeout=timeout)


def allow_imports() -> None:
    """Undo a `hold_imports` that returned True; after a fork, in the parent."""
    _import_lock.release()


def forget_imports() -> None:
    """Start with a free lock, whoever held it; after a fork, in the child."""
    global _import_lock  # noqa: PLW0603  a lock cannot be released for a dead thread
    _import_lock = threading.RLock()


def load() -> None:
    """Load what a first batch needs, for children that are forked from now on."""
    with importing():
        import httpcore  # noqa: PLC0415  where somebody asks for it
        import httpx  # noqa: PLC0415  same

        del httpcore, httpx
        "localhost".encode("idna")
        short_reason("")


class HttpTransport:
    """
    Posts batches to a ProductGraph server, with one connection kept alive.

    Args:
        config: The settings of the client.

        http: Another transport of httpx, for tests.
    """

    is_immediate = False

    def __init__(self, config: Config, http: httpx.BaseTransport | None = None) -> None:
        self._config = config
        self._given = http
        self._http: httpx.BaseTransport | None = http
        self._exchange = _Exchange()
        self._takes_gzip = config.compression != "none"
        if "gevent" in sys.modules:
            # Its resolver imports this with the first look-up, which may be at exit,
            # when the module can no longer be imported.
            import concurrent.futures.thread  # noqa: F401, PLC0415

    def send(self, events: Sequence[bytes], timeout: float) -> Answer:
        """Post *events* once; a compressed body that is refused is sent again plain."""
        self._exchange.begin(timeout)
        body = self._body(events)
        count = len(events)
        if self._is_worth_compressing(body):
            packed = gzip.compress(body, compresslevel=_COMPRESS_LEVEL, mtime=0)
            answer, status = self._post(packed, count, encoding="gzip")
            if status not in _COMPRESSION_REFUSED:
                return answer
            plain, status = self._post(body, count)
            if plain.verdict is Verdict.TAKEN:
                self._takes_gzip = False  # proven: the batch was fine, only packed
            return attrs.evolve(plain, sent_bytes=plain.sent_bytes + len(packed))
        return self._post(body, count)[0]

    def _body(self, events: Sequence[bytes]) -> bytes:
        """Return the body that carries *events*."""
        return b'{"events":[' + b",".join(events) + b"]}"

    def _headers(self) -> dict[str, str]:
        """Return the headers that are the endpoint's own."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._config.api_key is not None:
            headers["X-PG-API-Key"] = self._config.api_key
        return headers

    def _secrets(self) -> Iterable[str]:
        """Return what is sent with each request, and must not be logged."""
        return () if self._config.api_key is None else (self._config.api_key,)

    def _hide_secrets(self, text: bytes) -> bytes:
        """Return what the endpoint says without the secrets that it quotes."""
        for secret in self._secrets():
            text = text.replace(secret.encode(), b"***")
        return text

    def _answer(
        self, status: int, headers: Mapping[str, str], text: bytes, count: int
    ) -> Answer:
        """Return what the endpoint's answer to *count* events means."""
        text = self._hide_secrets(text)
        return classify(status, headers, text, count, SYSTEM_CLOCK.time_ns() / 1e9)

    def _is_worth_compressing(self, body: bytes) -> bool:
        if not self._takes_gzip:
            return False
        return self._config.compression == "gzip" or len(body) > _COMPRESS_FROM

    def _post(
        self, body: bytes, count: int, encoding: str | None = None
    ) -> tuple[Answer, int]:
        with importing():
            import httpx  # noqa: PLC0415  loaded with the first batch

            http = self._http = self._http or self._connect()
        headers = {
            "Accept-Encoding": "identity",
            "User-Agent": _user_agent(),
            **self._headers(),
        }
        if encoding is not None:
            headers["Content-Encoding"] = encoding
        timeout = httpx.Timeout(self._exchange.left()).as_dict()
        request = httpx.Request(
            "POST",
            str(self._config.endpoint),
            content=body,
            headers=headers,
            extensions={"timeout": timeout},
        )
        try:
            response = http.handle_request(request)
            status, text = response.status_code, self._read(response)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            reason = f"{type(error).__name__} {short_reason(str(error))}".rstrip()
            return Answer(verdict=Verdict.RETRY, reason=reason), 0
        answer = self._answer(status, response.headers, text, count)
        return attrs.evolve(answer, sent_bytes=len(body)), status

    def _read(self, response: httpx.Response) -> bytes:
        """Read the body up to a bound; read whole, the connection can be used again."""
        chunks, size = [], 0
        try:
            for chunk in response.stream:  # type: ignore[union-attr]
                chunks.append(chunk)
                size += len(chunk)
                if size > _MAX_ANSWER:
                    break
        finally:
            response.close()
        return b"".join(chunks)

    def _connect(self) -> httpx.BaseTransport:
        import httpx  # noqa: PLC0415  loaded with the first batch

        # What a first request would import on its way, outside of `importing`.
        "localhost".encode("idna")
        short_reason("")
        config = self._config
        limits = httpx.Limits(
            max_connections=1, max_keepalive_connections=1, keepalive_expiry=60.0
        )
        transport = httpx.HTTPTransport(
            verify=_ssl_context(config), limits=limits, proxy=_proxy(config)
        )
        # httpx bounds each read and write, not the whole exchange: a server that sends
        # a byte now and then would hold the worker for ever.  httpcore lets its network
        # backend be replaced; httpx has no argument for it.
        pool: Any = transport._pool  # noqa: SLF001
        inner = pool._network_backend  # noqa: SLF001
        pool._network_backend = _backend(inner, self._exchange)  # noqa: SLF001
        return transport

    def abort(self) -> None:
        """Cut the exchange that is under way, from another thread."""
        self._exchange.abort()

    def disown(self) -> None:
        """Give up the parent's connection in a forked child, without a word on it."""
        sock = self._exchange.socket
        if sock is not None:
            with suppress(OSError):  # the host may have closed what it did not know
                sock.close()

    def close(self) -> None:
        """Close the connection."""
        if self._http is not None:
            self._http.close()
            self._http = self._given


def _user_agent() -> str:
    from pgtrack import __version__  # noqa: PLC0415  the package imports us

    return f"pgtrack/{__version__} Python/{platform.python_version()}"


def _ssl_context(config: Config) -> ssl.SSLContext:
    import ssl  # noqa: PLC0415  not needed before the first batch

    import httpx  # noqa: PLC0415  loaded with the first batch

    if urllib.parse.urlsplit(str(config.endpoint)).scheme == "http":
        # Never used; the default one would read all of the machine's certificates.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if config.ca_bundle is None:
        context = httpx.create_ssl_context()
    else:
        context = ssl.create_default_context(cafile=config.ca_bundle)
    if config.client_cert is not None:
        context.load_cert_chain(*config.client_cert)
    return context


def _proxy(config: Config) -> str | None:
    """Return the proxy of the settings, else of the environment; none to loopback."""
    from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415

    if config.proxy is not None:
        return config.proxy
    url = urllib.parse.urlsplit(str(config.endpoint))
    host = url.hostname or ""
    if is_loopback(host) or proxy_bypass(url.netloc):
        return None
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy is not None and "://" not in proxy:
        proxy = f"http://{proxy}"
    return proxy


class _Exchange:
    """The deadline of the exchange under way, and the socket that carries it."""

    def __init__(self) -> None:
        self._deadline = 0.0
        self.socket: socket.socket | None = None

    def begin(self, timeout: float) -> None:
        self._deadline = SYSTEM_CLOCK.monotonic() + timeout

    def left(self) -> float:
        """Return the seconds left, a little more than none at the least."""
        return max(self._deadline - SYSTEM_CLOCK.monotonic(), 0.001)

    def bound(self, timeout: float | None) -> float:
        """Return *timeout*, or what is left if that is less; raise if nothing is."""
        import httpcore  # noqa: PLC0415  loaded with the first batch

        left = self._deadline - SYSTEM_CLOCK.monotonic()
        if left <= 0:
            msg = "the exchange took too long"
            raise httpcore.ReadTimeout(msg)
        return left if timeout is None else min(timeout, left)

    @contextmanager
    def handshake(self) -> Iterator[None]:
        """Keep a handle on the connection, which a handshake takes from its socket."""
        sock = self.socket
        if type(sock) is not socket.socket:  # TLS within TLS leaves the socket as it is
            yield
            return
        with sock.dup() as handle:
            self.socket = handle
            yield

    def abort(self) -> None:
        self._deadline = 0.0
        sock = self.socket
        if sock is not None:
            with suppress(OSError):  # closed meanwhile
                # Not the method of an SSLSocket, which would drop its TLS state while
                # the other thread reads through it.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _backend(inner: httpcore.NetworkBackend, exchange: _Exchange) -> Any:
    """Wrap httpcore's network backend so that every wait ends at the deadline."""
    import httpcore  # noqa: PLC0415  loaded with the first batch

    class Stream(httpcore.NetworkStream):
        def __init__(self, stream: httpcore.NetworkStream) -> None:
            self._stream = stream
            exchange.socket = stream.get_extra_info("socket")

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            return self._stream.read(max_bytes, exchange.bound(timeout))

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            # Piece by piece: the stream begins a new wait with each that gets through.
            for start in range(0, len(buffer), _WRITE_AT_ONCE):
                piece = buffer[start : start + _WRITE_AT_ONCE]
                self._stream.write(piece, exchange.bound(timeout))

        def close(self) -> None:
            exchange.socket = None
            self._stream.close()

        def start_tls(
            self,
            ssl_context: ssl.SSLContext,
            server_hostname: str | None = None,
            timeout: float | None = None,
        ) -> Stream:
            timeout = exchange.bound(timeout)
            with exchange.handshake():
                return Stream(
                    self._stream.start_tls(ssl_context, server_hostname, timeout)
                )

        def get_extra_info(self, info: str) -> Any:
            return self._stream.get_extra_info(info)

    class Backend(httpcore.NetworkBackend):
        def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Any = None,
        ) -> Stream:
            timeout = exchange.bound(timeout)
            return Stream(
                inner.connect_tcp(host, port, timeout, local_address, socket_options)
            )

    return Backend()
