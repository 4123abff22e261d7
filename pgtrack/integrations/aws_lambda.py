"""
AWS Lambda: the correlation of each invocation, and delivery before the freeze.

For functions behind API Gateway (REST and HTTP APIs), an Application Load Balancer or a
function URL, and for those that SQS, SNS, EventBridge or anybody else invokes.  Left
alone are what the handler returns, but for the header `X-Request-ID` of an HTTP answer,
what it raises, and batches, each record of which has a correlation of its own.  Opt out
by `track=False` for the events.
"""

from __future__ import annotations

import inspect
import re
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, overload

import attrs
import wrapt

from pgtrack import _api, _propagation
from pgtrack._clock import SYSTEM_CLOCK
from pgtrack._context import is_request_id, switch
from pgtrack._diagnostics import internal_error
from pgtrack._observe import name_of
from pgtrack.exceptions import ConfigError
from pgtrack.integrations._http import REQUEST_HEADER, Served

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgtrack._client import Client

__all__ = ["handler", "message_headers"]

F = TypeVar("F", bound="Callable[..., Any] | classmethod[Any, Any, Any]")

_MARGIN = 0.25
"""Seconds that are left to the runtime, which has to send the answer in time."""

_MAX_TIMEOUT = 900
"""Most seconds that an invocation may take (Lambda quotas)."""


@overload
def handler(function: F, /) -> F: ...


@overload
def handler(
    *, client: Client | None = None, track: bool = True, flush_timeout: float = 1.0
) -> Callable[[F], F]: ...


def handler(
    function: Any = None,
    /,
    *,
    client: Client | None = None,
    track: bool = True,
    flush_timeout: float = 1.0,
) -> Any:
    """
    Run each invocation of a Lambda handler under the correlation that its event brings.

    An invocation by HTTP makes one `api.response` event, and its answer carries
    `X-Request-ID`.  What escapes from any is tracked and raised again.  Works bare and
    with options, on functions, methods and callables.

    What was emitted is delivered before the invocation ends, since Lambda freezes the
    process then; what that takes is added to the answer's time, up to *flush_timeout*.

    Args:
        function: The handler, called with the event and the context.

        client: Instead of the default client.

        track: Whether invocations make events; False leaves correlation and delivery.

        flush_timeout: Most seconds to wait for the delivery, less where the invocation
            has less left.  What is not delivered then is by a later invocation.

    Raises:
        ConfigError: If *flush_timeout* is no number from 0 to 900.

        TypeError: If what is decorated cannot be called, is a class, or returns
            something to be awaited or iterated, which Lambda does neither with.
    """
    given: object = flush_timeout
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not is_number or not 0 <= flush_timeout <= _MAX_TIMEOUT:
        raise ConfigError(
            "`flush_timeout` must be a number of seconds from 0 to 900 "
            f"(got {given!r}). Use 0 not to wait for the delivery."
        )

    def decorate(function: Any) -> Any:
        name = name_of(function)
        inner = inspect.unwrap(getattr(function, "__func__", function))
        for one in (inner, type(inner).__call__):
            if any(is_late(one) for is_late in _LATE):
                raise TypeError(
                    f"a Lambda handler must return its answer (got {name}, which is a "
                    "coroutine function or a generator). Decorate the plain function "
                    "that Lambda calls, and use asyncio.run() in it."
                )
        wrapper = _Wrapper(name, client, track, flush_timeout)
        return wrapt.FunctionWrapper(function, wrapper)

    return decorate if function is None else decorate(function)


_LATE = (
    inspect.iscoroutinefunction,
    inspect.isgeneratorfunction,
    inspect.isasyncgenfunction,
)
"""Tell what runs after it has returned."""


def message_headers(record: Any) -> dict[str, str]:
    """
    Return what one record of SQS or SNS carries, as `continued_from` takes it.

    Args:
        record: One of `event["Records"]`; of other services it carries nothing.

    Returns:
        Its message attributes that are texts.
    """
    record = _dict(record)
    attributes = _dict(
        record.get("messageAttributes")
        or _dict(record.get("Sns")).get("MessageAttributes")
    )
    found = {
        name: _dict(value).get("stringValue", _dict(value).get("Value"))
        for name, value in attributes.items()
    }
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _dict(value: object) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


# --- what an event says ---


@attrs.frozen(kw_only=True)
class _Call:
    """
    What an event says of its invocation.

    Attributes:
        headers: What it carries, the first of a name counts.

        is_trusted: Whether only those write it whom the account allows to.

        method: The HTTP method; None for what is no HTTP, or has no HTTP answer.

        path: The path as the client sees it, without the stage.

        route: The template that the gateway found.
    """

    headers: list[tuple[Any, Any]] = attrs.field(factory=list)
    is_trusted: bool = False
    method: str | None = None
    path: str = ""
    route: str | None = None

    @property
    def is_preflight(self) -> bool:
        """Whether this is CORS asking what may be asked (Fetch standard, 4.8)."""
        names = {name.lower() for name, _ in self.headers if isinstance(name, str)}
        wanted = {"origin", "access-control-request-method"}
        return self.method == "OPTIONS" and wanted <= names


def _read(event: object) -> _Call:
    """
    Read an event, by the shapes in the Lambda and API Gateway developer guides.

    Those of API Gateway are the payload formats 1.0 and 2.0; a load balancer sends
    nearly the former, a function URL the latter.
    """
    given = _dict(event)
    records = given.get("Records")
    if isinstance(records, list):
        # Of several each has a session of its own, and none is the invocation's.
        only = records[0] if len(records) == 1 else None
        return _Call(headers=[*message_headers(only).items()], is_trusted=True)
    headers = _headers(given)
    context = _dict(given.get("requestContext"))
    method = given.get("httpMethod") or _dict(context.get("http")).get("method")
    # An authorizer is asked about a request, and answers with a policy.
    if not isinstance(method, str) or "methodArn" in given or "routeArn" in given:
        return _Call(headers=headers)
    path = given.get("rawPath") or given.get("path") or "/"
    stage = context.get("stage")
    # Paths of HTTP APIs contain the stage, those of REST APIs do not.
    if given.get("version") and f"{path}/".startswith(f"/{stage}/"):
        path = path[len(f"/{stage}") :] or "/"
    return _Call(headers=headers, method=method, path=str(path), route=_route(given))


def _headers(event: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Return the headers, of several values the first."""
    several = _dict(event.get("multiValueHeaders")).items()
    pairs = [(name, value) for name, values in several for value in values or ()]
    return pairs or [*_dict(event.get("headers")).items()]


_CATCH_ALL = re.compile(r"/\{[^/{}]*\+\}").fullmatch
"""Matches the one route of an application that has a router of its own."""


def _route(event: dict[Any, Any]) -> str | None:
    """Return the template: `resource`, or what follows the method in `routeKey`."""
    route = event.get("resource") or str(event.get("routeKey")).partition(" ")[2]
    return route if isinstance(route, str) and route and not _CATCH_ALL(route) else None


# --- an invocation ---

_is_running: ContextVar[bool] = ContextVar("pgtrack_lambda", default=False)
"""Whether an invocation is under way, so that a handler may call another one."""


@attrs.frozen
class _Wrapper:
    """What `handler` was given; calls the function."""

    name: str
    own_client: Client | None
    track: bool
    flush_timeout: float

    def __call__(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        del instance
        if _is_running.get():
            return wrapped(*args, **kwargs)
        event = args[0] if args else kwargs.get("event")
        context = args[1] if len(args) > 1 else kwargs.get("context")
        outside = switch(None)  # whatever an invocation before left open
        running = _is_running.set(True)
        try:
            invocation = self._begin(event, context)
            if invocation is None:
                return wrapped(*args, **kwargs)
            try:
                result = wrapped(*args, **kwargs)
            except BaseException as error:
                invocation.leave(error)
                raise
            return invocation.end(result)
        finally:
            _is_running.reset(running)
            switch(outside)
            self._flush(context)

    @property
    def client(self) -> Client:
        """The client of the handler, else the default one."""
        return _api.default_client() if self.own_client is None else self.own_client

    def _begin(self, event: object, context: object) -> _Invocation | None:
        client = self.client
        try:
            call = _read(event)
            is_told = self.track and client.is_enabled and not call.is_preflight
            invocation = _Invocation(
                client,
                call.headers,
                call.method,
                call.path,
                is_told=is_told,
                is_trusted=call.is_trusted,
            )
            invocation.name(call, event, context, self.name)
        except Exception as error:  # noqa: BLE001  the host must go on
            internal_error(error)
            return None
        return invocation

    def _flush(self, context: object) -> None:
        """Deliver what was emitted, in the time there is; raises nothing."""
        try:
            left = min(self.flush_timeout, _seconds_left(context) - _MARGIN)
            deadline = SYSTEM_CLOCK.monotonic() + left
            if left > 0 and _api.stats().pending:
                _api.flush(left)
            own = self.own_client
            left = deadline - SYSTEM_CLOCK.monotonic()
            if left > 0 and own is not None and own.stats().pending:
                own.flush(left)
        except Exception as error:  # noqa: BLE001  the host must go on
            internal_error(error)


def _seconds_left(context: object) -> float:
    """Return how long the invocation may take yet; for ever where nobody says."""
    ask = getattr(context, "get_remaining_time_in_millis", None)
    left = ask() if callable(ask) else None
    return left / 1000 if isinstance(left, (int, float)) else float("inf")


class _Invocation(Served):
    """One invocation of a handler."""

    __slots__ = ("_echo",)

    def name(self, call: _Call, event: object, context: object, name: str) -> None:
        """Give it the names that are Lambda's: request id, route and function."""
        self.request.component = name
        if call.route is not None:
            self.request.find_route = lambda: call.route
        if _propagation.extract(call.headers).request_id is None:
            own = getattr(context, "aws_request_id", None)
            if is_request_id(own):
                self.frame.request_id = own
        self._echo: str | None = None
        if call.method is not None and not call.is_preflight:
            # A load balancer takes several values, and nothing else, where it sends so.
            is_several = "headers" not in _dict(event) and call.headers
            self._echo = "multiValueHeaders" if is_several else "headers"

    def end(self, result: Any) -> Any:
        """Tell the invocation, and return its answer, which carries the request id."""
        answer = result
        try:
            if self.method is not None:
                self.answer_with(_status(result))
                self.complete()
            answer = self._echoed(result)
        except Exception as error:  # noqa: BLE001  the host must go on
            internal_error(error)
        self.leave(None, result)
        return answer

    def _echoed(self, answer: Any) -> Any:
        """Return *answer* with the request id; what is no answer of HTTP as it is."""
        key = self._echo
        if key is None or not isinstance(answer, dict) or "statusCode" not in answer:
            return answer  # the gateway makes a body of what has no status
        given = [answer.get("headers") or {}, answer.get("multiValueHeaders") or {}]
        if not all(isinstance(headers, dict) for headers in given):
            return answer
        names = {str(name).lower() for headers in given for name in headers}
        if REQUEST_HEADER.lower() in names:
            return answer
        value: Any = self.request_id if key == "headers" else [self.request_id]
        return {**answer, key: {**(answer.get(key) or {}), REQUEST_HEADER: value}}


def _status(answer: Any) -> Any:
    """Return the status that an answer says, 200 where it says none."""
    status = answer.get("statusCode", 200) if isinstance(answer, dict) else 200
    is_spelt = isinstance(status, str) and status.isdecimal()
    return int(status) if is_spelt else status
