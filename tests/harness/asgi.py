"""
Call an ASGI application by hand, message by message, or serve it by a real server.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Message = dict[str, Any]

# In seconds: how long a server may take to end.
_PATIENCE = 10.0


def http_scope(
    method: str = "GET",
    path: str = "/",
    headers: Iterable[tuple[str, str]] = (),
    /,
    **changes: Any,
) -> dict[str, Any]:
    """
    Return the scope of a request, as a server makes it; *changes* replace its keys.
    """
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("latin-1", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in headers
        ],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 80),
        "state": {},
        **changes,
    }


class Call:
    """
    Be one connection: the messages the application receives, and those it sends.

    Args:
        scope: Its scope.

        messages: What it receives, one after the other; then it is disconnected. By
            default the request's empty body.

    Attributes:
        sent: What it sent.
    """

    def __init__(
        self, scope: dict[str, Any], messages: Iterable[Message] | None = None
    ) -> None:
        self.scope = scope
        if messages is None:
            messages = [{"type": "http.request", "body": b"", "more_body": False}]
        self._messages = deque(messages)
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        """
        Return the next message.
        """
        if self._messages:
            return self._messages.popleft()
        return {"type": f"{self.scope['type']}.disconnect"}

    async def send(self, message: Message) -> None:
        """
        Keep a message.
        """
        self.sent.append(message)

    async def run(self, app: Any) -> Call:
        """
        Serve the connection by *app*.
        """
        await app(self.scope, self.receive, self.send)
        return self

    @property
    def start(self) -> Message:
        """
        The first message that starts an answer.
        """
        starts = ("http.response.start", "websocket.accept")
        return next(m for m in self.sent if m["type"] in starts)

    @property
    def status(self) -> int:
        """
        The status of the answer.
        """
        return int(self.start["status"])

    def headers(self, name: str) -> list[str]:
        """
        Return the values of all headers of a name.
        """
        key = name.lower().encode()
        pairs = self.start.get("headers", ())
        return [v.decode("latin-1") for k, v in pairs if k.lower() == key]

    @property
    def body(self) -> bytes:
        """
        The whole body.
        """
        return b"".join(m.get("body", b"") for m in self.sent)


@contextmanager
def uvicorn_server(app: Any, **options: Any) -> Iterator[tuple[str, int]]:
    """
    Serve *app* by uvicorn, in a thread, and return host and port.
    """
    import uvicorn

    config = uvicorn.Config(app, log_config=None, access_log=False, **options)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(_PATIENCE)
            assert not thread.is_alive(), "uvicorn did not end"
