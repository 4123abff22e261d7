"""
gRPC, sync and aio: the correlation of each call, on both of its sides.

A server goes on with the session in a call's metadata, and tells each call by one
`api.response`.  A channel sends the correlation along, to targets in `propagate_to`.
`install()` does both for the servers and channels that are made after it; what is there
already is left alone, and so are calls that are handled without a thread
(`experimental_non_blocking`).  Opt out by `uninstall()`, by `track=False` for the
events, and by `exclude` for those of some methods.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import wrapt

from pgtrack import _errors
from pgtrack._context import current_frame, switch
from pgtrack._diagnostics import internal_error
from pgtrack._observe import steps, steps_async
from pgtrack._propagation import REQUEST_HEADER
from pgtrack.integrations._http import Served, Serving
from pgtrack.integrations._outbound import Outbound, absent
from pgtrack.integrations._patches import Patches
from pgtrack.integrations._requirement import requirement

with requirement("grpc", extra="grpc"):
    import grpc  # type: ignore[import-untyped, unused-ignore]
    import grpc.aio  # type: ignore[import-untyped, unused-ignore]

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from pgtrack._client import Client

__all__ = [
    "AioServerInterceptor",
    "ServerInterceptor",
    "install",
    "intercept_channel",
    "uninstall",
]

_outbound = Outbound()
_patches = Patches()
_options: dict[str, Any] = {}


def install(
    *,
    client: Client | None = None,
    track: bool = True,
    exclude: str | Iterable[str] = (),
) -> None:
    """
    Serve calls under their correlation, and send it along with calls.

    For servers and channels that are made from now on, by `grpc.server`,
    `grpc.insecure_channel`, `grpc.secure_channel` and their namesakes in `grpc.aio`.

    Args:
        client: Instead of the default client.

        track: Whether each call that is served makes an `api.response` event.

        exclude: The methods whose calls make none: `/grpc.health.v1.Health/*`.
    """
    Serving(client, track, exclude)  # a wrong option is told here and now
    _outbound.client = client
    _options.update(client=client, track=track, exclude=exclude)
    channels = [
        (module, name, _channel)
        for module in (grpc, grpc.aio)
        for name in ("insecure_channel", "secure_channel")
    ]
    servers = [(grpc, "server", _server), (grpc.aio, "server", _server)]
    _patches.install(*channels, *servers)


def uninstall() -> None:
    """Undo `install`, also for the servers and channels that were made since."""
    _patches.uninstall()


def _is_installed() -> bool:
    return _patches.is_on


def _always() -> bool:
    return True


# --- servers -----------------------------------------------------------------------


def _server(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a server, with our interceptor around all others."""
    is_aio = wrapped.__module__ != "grpc"
    interceptor: Any = (AioServerInterceptor if is_aio else ServerInterceptor)(
        **_options
    )
    interceptor._calls.is_on = _is_installed  # noqa: SLF001  it is ours
    if len(args) > _INTERCEPTORS:
        others = args[_INTERCEPTORS] or ()
        rest = args[_INTERCEPTORS + 1 :]
        args = (*args[:_INTERCEPTORS], (interceptor, *others), *rest)
    else:
        others = kwargs.get("interceptors") or ()
        kwargs = {**kwargs, "interceptors": (interceptor, *others)}
    return wrapped(*args, **kwargs)


_INTERCEPTORS = 2
"""The position of the interceptors among the arguments of `grpc.server`."""


class ServerInterceptor(grpc.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """
    Serve each call under its correlation; for `grpc.server(interceptors=[...])`.

    As the first it sees whatever the others answer.

    Args:
        client: Instead of the default client.

        track: Whether each call makes an `api.response` event.

        exclude: The methods whose calls make none; `*` stands for any text.
    """

    def __init__(
        self,
        *,
        client: Client | None = None,
        track: bool = True,
        exclude: str | Iterable[str] = (),
    ) -> None:
        self._calls = _Calls(Serving(client, track, exclude))

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """Return what handles the call, observed."""
        with _asking(handler_call_details) as is_outermost:
            handler = continuation(handler_call_details)
        return self._calls.observed(handler, handler_call_details, is_outermost)


class AioServerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """
    Serve each call under its correlation; for `grpc.aio.server(interceptors=[...])`.

    As the first it sees whatever the others answer.

    Args:
        client: Instead of the default client.

        track: Whether each call makes an `api.response` event.

        exclude: The methods whose calls make none; `*` stands for any text.
    """

    def __init__(
        self,
        *,
        client: Client | None = None,
        track: bool = True,
        exclude: str | Iterable[str] = (),
    ) -> None:
        self._calls = _Calls(Serving(client, track, exclude))

    async def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """Return what handles the call, observed."""
        with _asking(handler_call_details) as is_outermost:
            handler = await continuation(handler_call_details)
        return self._calls.observed(handler, handler_call_details, is_outermost)


_asked: set[int] = set()
"""The calls whose handler is being looked for, by the identity of their details."""

_served: dict[int, Served] = {}
"""The calls that are being served, by the identity of their details."""


@contextlib.contextmanager
def _asking(details: Any) -> Iterator[bool]:
    """Look for a handler; yield whether no other interceptor of ours does already."""
    key = id(details)
    is_outermost = key not in _asked
    _asked.add(key)
    try:
        yield is_outermost
    finally:
        if is_outermost:
            _asked.discard(key)


class _Calls:
    """
    How an interceptor serves calls.

    Attributes:
        is_on: Tells whether it does.
    """

    __slots__ = ("_serving", "is_on")

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self.is_on: Callable[[], bool] = _always

    def observed(self, handler: Any, details: Any, is_outermost: bool) -> Any:  # noqa: FBT001
        """Return *handler*, None where there is none, such that calls are observed."""
        if not self.is_on():
            return handler
        try:
            if handler is None:
                if is_outermost and (call := self.begin(details, None)) is not None:
                    call.leave()
                return None
            requests = "stream" if handler.request_streaming else "unary"
            responses = "stream" if handler.response_streaming else "unary"
            kind = f"{requests}_{responses}"
            function = getattr(handler, kind)
            return getattr(grpc, f"{kind}_rpc_method_handler")(
                wrapt.FunctionWrapper(
                    function,
                    functools.partial(_wrapper_of(function, responses), self, details),
                ),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        except Exception as error:  # noqa: BLE001  the call must be handled
            internal_error(error)
            return handler

    def begin(self, details: Any, context: Any) -> _Call | None:
        """Begin to serve a call; None where another interceptor does already."""
        served = _served.get(id(details))
        if served is not None:
            self._serving.join(served)
            return None
        metadata, method = details.invocation_metadata, details.method
        served = self._serving.begin(metadata, "POST", method)
        return None if served is None else _Call(served, details, context)


def _wrapper_of(function: Any, responses: str) -> Any:
    if inspect.isasyncgenfunction(function):
        return _step_async
    if inspect.iscoroutinefunction(function):
        return _await
    return _step if responses == "stream" else _run


def _run(
    calls: _Calls, details: Any, wrapped: Any, _: Any, args: Any, kwargs: Any
) -> Any:
    """Call a function that returns the answer."""
    request, context, *rest = args
    context = _knowing(context)
    call = calls.begin(details, context)
    try:
        answer = wrapped(request, context, *rest, **kwargs)
    except BaseException as error:
        if call is not None:
            call.leave(error)
        raise
    if call is not None:
        call.leave()
    return answer


async def _await(
    calls: _Calls, details: Any, wrapped: Any, _: Any, args: Any, kwargs: Any
) -> Any:
    """Call a coroutine function, which returns the answer or writes its parts."""
    _request, context = args
    call = calls.begin(details, context)
    try:
        answer = await wrapped(*args, **kwargs)
    except BaseException as error:
        if call is not None:
            call.leave(error)
        raise
    if call is not None:
        call.leave()
    return answer


def _step(
    calls: _Calls, details: Any, wrapped: Any, _: Any, args: Any, kwargs: Any
) -> Any:
    """Call a function that returns an iterator, whose steps run under its frame."""
    request, context, *rest = args
    context = _knowing(context)
    outside = current_frame()
    call = calls.begin(details, context)
    if call is None:
        return wrapped(request, context, *rest, **kwargs)
    try:
        answers = wrapped(request, context, *rest, **kwargs)
    except BaseException as error:
        call.leave(error)
        raise
    inside = switch(outside)
    return steps(_generator(answers), lambda: call, inside)


def _generator(answers: Iterator[Any]) -> Generator[Any, Any, Any]:
    """Return what can be closed, as generators can."""
    return answers if inspect.isgenerator(answers) else _each(answers)


def _each(answers: Iterator[Any]) -> Generator[Any, Any, Any]:
    while True:
        try:
            answer = next(answers)
        except StopIteration:
            return
        yield answer


def _step_async(
    calls: _Calls, details: Any, wrapped: Any, _: Any, args: Any, kwargs: Any
) -> Any:
    """Call an async generator function, whose steps run under its frame."""
    _request, context = args
    start = functools.partial(calls.begin, details, context)
    return steps_async(wrapped(*args, **kwargs), start, current_frame())


class _Call:
    """One call that is being served."""

    __slots__ = ("_context", "_key", "_served")

    def __init__(self, served: Served, details: Any, context: Any) -> None:
        self._served = served
        self._key = id(details)
        self._context = context
        _served[self._key] = served
        try:
            self._echo()
        except Exception as error:  # noqa: BLE001  the call must be handled
            internal_error(error)

    def _echo(self) -> None:
        """Answer with the request id, behind the answer, where nothing waits for it."""
        context = self._context
        if context is not None:
            known: Any = getattr(context, "trailing_metadata", tuple)() or ()
            echo = (REQUEST_HEADER.lower(), self._served.request_id)
            context.set_trailing_metadata((*known, echo))

    def leave(self, error: BaseException | None = None, result: object = None) -> None:
        """End the call."""
        del result
        served = self._served
        _served.pop(self._key, None)
        try:
            error = self._end(error)
        except Exception as problem:  # noqa: BLE001  the host must not see our errors
            internal_error(problem)
        served.leave(error)

    def _end(self, error: BaseException | None) -> BaseException | None:
        """Tell the status, and return the error that escaped, if one did."""
        served = self._served
        context = self._context
        code = _UNIMPLEMENTED if context is None else _code_of(context)
        is_abort = _is_abort(error, code)
        is_closed = isinstance(sys.exc_info()[1], GeneratorExit)
        if context is not None and (is_closed or _is_cancelled(context, error)):
            left = context.time_remaining()
            is_late = left is not None and left <= 0
            code = _DEADLINE_EXCEEDED if is_late else _CANCELLED
            if (
                isinstance(error, asyncio.CancelledError)
                or type(error) is grpc.RpcError
            ):
                error = None
        elif code is None or (error is not None and code is _OK):
            code = _OK if error is None else _UNKNOWN
        if is_abort:
            self._explain(code, error)
            error = None
        elif error is None and not _is_told_by(served.request.error):
            self._explain(code, None)
        served.answer_with(_STATUSES.get(code, 500))
        served.complete()
        return error

    def _explain(self, code: Any, abort: BaseException | None) -> None:
        """Let the error of a 500 be of the call's code and details, which say more."""
        kind = _FAILURES.get(code)
        served = self._served
        served.request.error = None
        if kind is None:
            return
        session_id = str(served.frame.session_id)
        if abort is not None and not _errors.is_first_time(abort, session_id):
            served.request.error = abort  # a step that it passed through told it
            return
        details = getattr(self._context, "details", str)() or ""
        if isinstance(details, bytes):
            details = details.decode("utf-8", "replace")
        served.request.error = kind(details or _errors.phrase(_STATUSES[code]))


_OK = grpc.StatusCode.OK
_CANCELLED = grpc.StatusCode.CANCELLED
_DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
_UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
_UNKNOWN = grpc.StatusCode.UNKNOWN

_STATUSES = {
    getattr(grpc.StatusCode, name): status
    for name, status in {
        "OK": 200,
        "CANCELLED": 499,
        "UNKNOWN": 500,
        "INVALID_ARGUMENT": 400,
        "DEADLINE_EXCEEDED": 504,
        "NOT_FOUND": 404,
        "ALREADY_EXISTS": 409,
        "PERMISSION_DENIED": 403,
        "UNAUTHENTICATED": 401,
        "RESOURCE_EXHAUSTED": 429,
        "FAILED_PRECONDITION": 400,
        "ABORTED": 409,
        "OUT_OF_RANGE": 400,
        "UNIMPLEMENTED": 501,
        "INTERNAL": 500,
        "UNAVAILABLE": 503,
        "DATA_LOSS": 500,
    }.items()
}
"""The HTTP status of each code (google.rpc.Code, in googleapis' code.proto)."""

_FAILURES = {
    code: type(code.name, (Exception,), {})
    for code, status in _STATUSES.items()
    if status >= 500  # noqa: PLR2004
}
"""Errors that are called as their codes, for calls that end by no exception."""


def _code_of(context: Any) -> Any:
    """Return the code that the handler has set, or None; odd ones as servers do."""
    code = context.code()
    if code is None or code in _STATUSES:
        return code
    return next((each for each in _STATUSES if each.value[0] == code), _UNKNOWN)


def _is_abort(error: BaseException | None, code: Any) -> bool:
    """Return whether *error* is how `context.abort` leaves the handler."""
    if isinstance(error, grpc.aio.AbortError):
        return True
    return type(error) is Exception and not error.args and code is not None


def _is_told_by(error: BaseException | None) -> bool:
    """Return whether *error*, the handler's own, says what went wrong."""
    return error is not None and _errors.is_failure(error)


def _is_cancelled(context: Any, error: BaseException | None) -> bool:
    if isinstance(error, asyncio.CancelledError):
        return True
    is_active = getattr(context, "is_active", None)  # not in aio
    return is_active is not None and not is_active()


def _knowing(context: Any) -> Any:
    """Return a context that knows its code; that of sync handlers in aio does not."""
    return context if hasattr(context, "code") else _Context(context)


class _Context(wrapt.ObjectProxy):  # type: ignore[misc, type-arg, unused-ignore]
    """The context of a sync handler of an aio server, with its code and details."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._self_code: Any = None
        self._self_details: str = ""

    def abort(self, code: Any, details: str = "", *rest: Any, **named: Any) -> Any:
        self._self_code, self._self_details = code, details
        return self.__wrapped__.abort(code, details, *rest, **named)

    def set_code(self, code: Any) -> None:
        self._self_code = code
        self.__wrapped__.set_code(code)

    def set_details(self, details: str) -> None:
        self._self_details = details
        self.__wrapped__.set_details(details)

    def code(self) -> Any:
        return self._self_code

    def details(self) -> str:
        return self._self_details


# --- channels ----------------------------------------------------------------------


def intercept_channel(
    channel: Any, target: str, *, client: Client | None = None
) -> Any:
    """
    Return *channel*, such that it sends the correlation along.

    Around it may be other interceptors; the metadata that they and callers give stays.

    Args:
        channel: A channel of `grpc` or `grpc.aio`.

        target: The target that it was made for, which `propagate_to` has to list.

        client: Whose `propagate_to` counts, instead of that of the default client.
    """
    return _Channel(channel, _Target(target, Outbound(client), _always))


def _channel(
    wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    channel = wrapped(*args, **kwargs)
    try:
        target = args[0] if args else kwargs["target"]
        return _Channel(channel, _Target(target, _outbound, _is_installed))
    except Exception as error:  # noqa: BLE001  the host must have its channel
        internal_error(error)
        return channel


_NOT_DNS = re.compile(r"(?:unix|unix-abstract|vsock|xds|passthrough):").match
_DNS = re.compile(r"dns:(?://[^/]*/)?")
_IPS = re.compile(r"ipv[46]:").match
_ADDRESS = re.compile(
    r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?"
).fullmatch


def _addresses(target: Any) -> list[tuple[str, int | None]]:
    """
    Return the hosts and ports of a target, none where it is of another kind.

    gRPC Name Resolution (grpc/doc/naming.md): `dns:[//authority/]host[:port]`, of which
    `host[:port]` is short, and lists of addresses behind `ipv4:` and `ipv6:`.
    """
    text = target.decode("latin-1") if isinstance(target, bytes) else str(target)
    if _NOT_DNS(text):
        return []
    if _IPS(text):
        parts = text.partition(":")[2].split(",")
    else:
        parts = [_DNS.sub("", text, count=1) if _DNS.match(text) else text]
    found = []
    for part in parts:
        match = _ADDRESS(part)
        if match is None:
            return []
        host, port = match.groups()
        found.append((host, None if port is None else int(port)))
    return found


class _Target:
    """
    Where the calls of a channel go.

    Args:
        target: As the channel has it.

        outbound: What goes along.

        is_on: Tells whether it does.
    """

    __slots__ = ("_addresses", "_is_on", "_outbound")

    def __init__(
        self, target: Any, outbound: Outbound, is_on: Callable[[], bool]
    ) -> None:
        self._addresses = _addresses(target)
        self._outbound = outbound
        self._is_on = is_on

    def correlate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call, with more metadata."""
        try:
            found = self._headers()
            if not found:
                return args, kwargs
            if len(args) > _METADATA:
                more = _with(args[_METADATA], found)
                return (*args[:_METADATA], more, *args[_METADATA + 1 :]), kwargs
            return args, {**kwargs, "metadata": _with(kwargs.get("metadata"), found)}
        except Exception as error:  # noqa: BLE001  the host's call must go out
            internal_error(error)
            return args, kwargs

    def _headers(self) -> dict[str, str]:
        """Return what goes to all addresses; nothing, where it must not go to one."""
        found: dict[str, str] = {}
        if self._is_on():
            for host, port in self._addresses:
                # Without a port gRPC takes that of https.
                found = self._outbound.headers("https", host, port)
                if not found:
                    break
        return found


_METADATA = 2
"""The position of the metadata among the arguments of a call."""


def _with(given: Any, headers: dict[str, str]) -> Any:
    """Return metadata with more pairs, behind those that are *given*."""
    pairs = () if given is None else tuple(given)
    added = absent(headers, (pair[0] for pair in pairs)).items()
    pairs += tuple((name.lower(), value) for name, value in added)
    return grpc.aio.Metadata(*pairs) if isinstance(given, grpc.aio.Metadata) else pairs


class _Channel(wrapt.ObjectProxy):  # type: ignore[misc, type-arg, unused-ignore]
    """A channel whose calls carry the correlation."""

    def __init__(self, channel: Any, target: _Target) -> None:
        super().__init__(channel)
        self._self_target = target

    def __enter__(self) -> Any:
        self.__wrapped__.__enter__()
        return self

    async def __aenter__(self) -> Any:
        await self.__wrapped__.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> Any:
        return await self.__wrapped__.__aexit__(*details)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        method = self.__wrapped__.unary_unary(*args, **kwargs)
        return _Method(method, self._self_target)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        method = self.__wrapped__.unary_stream(*args, **kwargs)
        return _Method(method, self._self_target)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        method = self.__wrapped__.stream_unary(*args, **kwargs)
        return _Method(method, self._self_target)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        method = self.__wrapped__.stream_stream(*args, **kwargs)
        return _Method(method, self._self_target)


class _Method(wrapt.ObjectProxy):  # type: ignore[misc, type-arg, unused-ignore]
    """A method of a channel, to be called in one way or another."""

    def __init__(self, method: Any, target: _Target) -> None:
        super().__init__(method)
        self._self_target = target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._self_target.correlate(args, kwargs)
        return self.__wrapped__(*args, **kwargs)

    def with_call(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._self_target.correlate(args, kwargs)
        return self.__wrapped__.with_call(*args, **kwargs)

    def future(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._self_target.correlate(args, kwargs)
        return self.__wrapped__.future(*args, **kwargs)
