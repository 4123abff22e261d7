"""
OpenTelemetry: sessions on spans, span ids on events, the ledger as metrics.

`install()` once a process.  Spans say, as they start, in whose session they are; events
say in their metadata in which span they were emitted; the ledger is among the metrics.
Spans are neither made nor ended, and no attribute is set that is there.  Opt out by not
calling `install`, or by `uninstall`.

`OTLPTransport` sends events as log records to any OTLP endpoint; it needs no `install`.
That pgtrack's own requests make no spans needs none, either.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from pgtrack import __version__, _api, _tracing
from pgtrack._context import current_frame
from pgtrack._diagnostics import internal_error, note
from pgtrack.integrations._metrics import METRICS, Metric
from pgtrack.integrations._otlp import OTLPTransport
from pgtrack.integrations._patches import Patches
from pgtrack.integrations._requirement import requirement

with requirement("opentelemetry", extra="opentelemetry"):
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import SpanKind, format_span_id, format_trace_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.sdk.trace import Span as SDKSpan
    from opentelemetry.trace import Span, TracerProvider

    from pgtrack._context import Frame

__all__ = ["OTLPTransport", "install", "uninstall"]

_SESSION, _USER = "session.id", "user.id"
_JOURNEY, _REQUEST = "productgraph.journey.id", "productgraph.request.id"

_SERVING = (SpanKind.SERVER, SpanKind.CONSUMER)
"""The kinds of spans that stand for a request, task or message as a whole."""

_installing = threading.RLock()
"""Held while what is watched changes."""


def install(
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """
    Bring OpenTelemetry's traces and metrics and pgtrack's events together.

    May be called again, with other providers, too; each is watched once.

    Args:
        tracer_provider: Whose spans get the attributes; the global one by default, also
            where that is only set later.

        meter_provider: Where the ledger is among the metrics; the global one by
            default, also where that is only set later.

    Raises:
        TypeError: If the tracer provider takes no span processors: it must be the SDK's
            or like it.
    """
    with _installing:
        provider = tracer_provider
        if provider is None:
            provider = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider):  # of one to be set later
            _patches.install((trace, "_set_tracer_provider", _on_set))
        else:
            _watch(provider)
        _state.is_on = True
        _tracing.tracer = _tracer
        _meter(meter_provider)


def uninstall() -> None:
    """
    Undo `install`.

    A provider cannot be made to forget a processor or an instrument: ours stay with it
    and do nothing.
    """
    with _installing:
        _state.is_on = False
        _tracing.tracer = None
        _patches.uninstall()


class _State:
    """What is installed in this process."""

    def __init__(self) -> None:
        self.is_on = False
        self.watched: weakref.WeakSet[Any] = weakref.WeakSet()
        self.metered: weakref.WeakSet[Any] = weakref.WeakSet()
        self.has_metered_global = False


_state = _State()
_patches = Patches()


# --- spans -----------------------------------------------------------------------


def _watch(provider: Any) -> None:
    """Let the spans of *provider* get our attributes as they start."""
    if provider in _state.watched:
        return
    add = getattr(provider, "add_span_processor", None)
    if add is None:
        msg = (
            "the tracer provider must have add_span_processor, as that of "
            f"opentelemetry-sdk has (got {type(provider).__name__}). Set the provider "
            "before, or hand it over: install(tracer_provider=...)."
        )
        raise TypeError(msg)
    add(_processor)
    _state.watched.add(provider)


def _on_set(
    wrapped: Callable[..., Any],
    instance: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Watch the global provider as it is set."""
    del instance
    result = wrapped(*args, **kwargs)
    try:
        with _installing:
            _watch(trace.get_tracer_provider())
    except TypeError as error:
        note("opentelemetry", f"pgtrack cannot follow the spans: {error}")
    except Exception as error:  # noqa: BLE001  the host must go on
        internal_error(error)
    return result


def _mark(span: Any, frame: Frame) -> None:
    """Say on *span* in whose unit of work it is, where it does not say so itself."""
    values = {
        _SESSION: frame.session_id,
        _USER: frame.cell.user_id,
        _JOURNEY: frame.journey_id,
        _REQUEST: frame.request_id,
    }
    present = _attributes_of(span)
    for key, value in values.items():
        if value is not None and key not in present:
            span.set_attribute(key, value)
    kept = frame.cell.span
    if kept is None or not kept.is_recording():  # as where a session outlives messages
        frame.cell.span = span if getattr(span, "kind", None) in _SERVING else None


def _attributes_of(span: Any) -> Mapping[str, Any]:
    """Return the attributes of a span; none where it does not show them."""
    return getattr(span, "attributes", None) or {}


class _Processor(SpanProcessor):
    """Marks each span as it starts."""

    def on_start(self, span: SDKSpan, parent_context: Context | None = None) -> None:
        del parent_context
        frame = current_frame()
        if frame is None or not _state.is_on:
            return
        try:
            _mark(span, frame)
        except Exception as error:  # noqa: BLE001  the host must go on
            internal_error(error)


class _Tracer:
    """OpenTelemetry, as `pgtrack._tracing` asks and tells it."""

    def present_span(self) -> Mapping[str, str] | None:
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        return {
            "trace_id": format_trace_id(context.trace_id),
            "span_id": format_span_id(context.span_id),
            "trace_flags": format(context.trace_flags, "02x"),
        }

    def begun(self, frame: Frame) -> None:
        """
        Mark the span of the request, where the server's instrumentation began it.

        Only that: any other span that is active here is of whoever runs the server, or
        of the call that came out as this request.
        """
        span: Any = trace.get_current_span()
        is_serving = getattr(span, "kind", None) in _SERVING and span.is_recording()
        if is_serving and _SESSION not in _attributes_of(span):
            _mark(span, frame)

    def identified(self, frame: Frame) -> None:
        """Name the user on the active span and on that of the request as a whole."""
        user_id = frame.cell.user_id
        if user_id is not None and frame.session_id is not None:
            for span in (trace.get_current_span(), frame.cell.span):
                if _is_of(span, frame):
                    span.set_attribute(_USER, user_id)


def _is_of(span: Span | None, frame: Frame) -> bool:
    """Return whether *span* is under way, and in the session of *frame*."""
    if span is None or not span.is_recording():
        return False
    return _attributes_of(span).get(_SESSION) == frame.session_id


_processor = _Processor()
_tracer = _Tracer()


# --- metrics ---------------------------------------------------------------------


def _meter(given: MeterProvider | None) -> None:
    """Put the ledger among the metrics of a provider, once."""
    standing = metrics.get_meter_provider()
    provider: Any = standing if given is None else given
    is_global = provider is standing
    if provider in _state.metered or (is_global and _state.has_metered_global):
        return
    _state.metered.add(provider)
    _state.has_metered_global |= is_global
    meter = provider.get_meter("pgtrack", __version__)
    make = {
        "counter": meter.create_observable_counter,
        "level": meter.create_observable_up_down_counter,
        "gauge": meter.create_observable_gauge,
    }
    for metric in METRICS:
        make[metric.kind](
            f"pgtrack.{metric.name}",
            callbacks=[_observe(metric)],
            unit=metric.unit,
            description=metric.text,
        )


def _observe(metric: Metric) -> Callable[[CallbackOptions], Iterator[Observation]]:
    """Return what reads *metric* off the ledger."""

    def observe(options: CallbackOptions) -> Iterator[Observation]:
        del options
        if _state.is_on:
            for value, labels in metric.values(_api.stats()):
                yield metrics.Observation(value, labels)

    return observe
