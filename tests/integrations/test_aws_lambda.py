"""AWS Lambda: events of the shapes in its developer guide, and how invocations end."""

# ruff: noqa: D102  methods of small classes need no documentation

from __future__ import annotations

import copy
import functools
import inspect
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from harness import Server, hang, start_together, status
from pgtrack import _diagnostics
from pgtrack._context import current_frame
from pgtrack.integrations import aws_lambda
from pgtrack.integrations.aws_lambda import handler, message_headers
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pgtrack.testing import Events

AWS_ID = "7d1b2c3e-4f50-4a6b-8c7d-9e0f1a2b3c4d"
IDS = {"X-Session-ID": "sess_web", "X-Request-ID": "req_web"}


class Context:
    """
    What Lambda passes beside the event.
    """

    function_name = "shop"
    aws_request_id = AWS_ID

    def __init__(self, seconds_left: float = 30.0) -> None:
        self._millis = int(seconds_left * 1000)

    def get_remaining_time_in_millis(self) -> int:
        return self._millis


CONTEXT = Context()


def rest(
    headers: dict[str, str] | None = None,
    method: str = "GET",
    path: str = "/users/7",
    resource: str = "/users/{id}",
    **more: Any,
) -> dict[str, Any]:
    """
    Return an event of API Gateway, REST API, proxy integration.
    """
    headers = {"Accept": "*/*", "Host": "api.example", **(headers or {})}
    return {
        "resource": resource,
        "path": path,
        "httpMethod": method,
        "headers": headers,
        "multiValueHeaders": {name: [value] for name, value in headers.items()},
        "queryStringParameters": {"q": "1"},
        "multiValueQueryStringParameters": {"q": ["1"]},
        "pathParameters": {"id": "7"},
        "stageVariables": None,
        "requestContext": {
            "resourcePath": resource,
            "httpMethod": method,
            "path": f"/prod{path}",
            "stage": "prod",
            "requestId": "gateway-id",
            "identity": {"sourceIp": "192.0.2.1", "userAgent": "curl"},
        },
        "body": None,
        "isBase64Encoded": False,
        **more,
    }


def http(
    headers: dict[str, str] | None = None,
    method: str = "GET",
    path: str = "/users/7",
    route: str = "GET /users/{id}",
    stage: str = "$default",
    **more: Any,
) -> dict[str, Any]:
    """
    Return an event of API Gateway, HTTP API, payload format 2.0.
    """
    given = {"accept": "*/*", "host": "api.example", **(headers or {})}
    return {
        "version": "2.0",
        "routeKey": route,
        "rawPath": path if stage == "$default" else f"/{stage}{path}",
        "rawQueryString": "q=1",
        "cookies": ["a=1", "b=2"],
        "headers": {name.lower(): value for name, value in given.items()},
        "queryStringParameters": {"q": "1"},
        "requestContext": {
            "accountId": "123456789012",
            "http": {
                "method": method,
                "path": path,
                "protocol": "HTTP/1.1",
                "sourceIp": "192.0.2.1",
                "userAgent": "curl",
            },
            "requestId": "gateway-id",
            "routeKey": route,
            "stage": stage,
            "timeEpoch": 1767225600000,
        },
        "isBase64Encoded": False,
        **more,
    }


def http_1(headers: dict[str, str] | None = None) -> dict[str, Any]:
    """
    Return an event of an HTTP API in payload format 1.0, whose path has the stage.
    """
    return rest(headers, path="/prod/users/7", version="1.0")


def url(headers: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """
    Return an event of a function URL.
    """
    return http(headers, route="$default", **options)


def balancer(headers: dict[str, str] | None = None) -> dict[str, Any]:
    """
    Return an event of an Application Load Balancer, whose headers are lower-cased.
    """
    return {
        "requestContext": {"elb": {"targetGroupArn": "arn:aws:elb:::targetgroup/t"}},
        "httpMethod": "GET",
        "path": "/users/7",
        "queryStringParameters": {"q": "1"},
        "headers": {name.lower(): value for name, value in (headers or {}).items()},
        "body": "",
        "isBase64Encoded": False,
    }


def balancer_many(headers: dict[str, str] | None = None) -> dict[str, Any]:
    """
    Return one of a target group with multi-value headers.
    """
    event = balancer()
    del event["headers"]
    given = {"Accept": "*/*", **(headers or {})}
    event["multiValueHeaders"] = {k.lower(): [v, "other"] for k, v in given.items()}
    return event


def sqs(*attributes: dict[str, str]) -> dict[str, Any]:
    """
    Return a batch of SQS, a record for each.
    """
    return {
        "Records": [
            {
                "messageId": f"m{i}",
                "body": "{}",
                "attributes": {"ApproximateReceiveCount": "1"},
                "messageAttributes": {
                    "Retry": {"dataType": "Binary", "binaryValue": "AA=="},
                    **{
                        name: {"stringValue": value, "dataType": "String"}
                        for name, value in given.items()
                    },
                },
                "eventSource": "aws:sqs",
            }
            for i, given in enumerate(attributes)
        ]
    }


def sns(attributes: dict[str, str]) -> dict[str, Any]:
    """
    Return a notification of SNS.
    """
    given = {k: {"Type": "String", "Value": v} for k, v in attributes.items()}
    record = {"Message": "hello", "MessageAttributes": given}
    return {"Records": [{"EventSource": "aws:sns", "Sns": record}]}


SCHEDULED = {
    "version": "0",
    "id": "53dc4d37-cffa-4f76-80c9-8b7d4a4d2eaa",
    "detail-type": "Scheduled Event",
    "source": "aws.events",
    "detail": {},
}
S3 = {"Records": [{"eventSource": "aws:s3", "s3": {"object": {"key": "a.csv"}}}]}
WEBSOCKET = {
    "headers": {"X-Session-ID": "sess_web"},
    "requestContext": {"routeKey": "$connect", "connectionId": "c1", "stage": "prod"},
    "isBase64Encoded": False,
}

HTTP: dict[str, Callable[..., dict[str, Any]]] = {
    "REST API": rest,
    "HTTP API": http,
    "HTTP API, format 1.0": http_1,
    "function URL": url,
    "load balancer": balancer,
    "load balancer, multi-value": balancer_many,
}
OTHERS: dict[str, Any] = {
    "EventBridge": SCHEDULED,
    "S3": S3,
    "none": None,
    "text": "hello",
    "list": [1, 2],
    "no records": {"Records": []},
    "odd records": {"Records": [None]},
    "odd": {"headers": "x", "requestContext": 7, "multiValueHeaders": {"a": None}},
}


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


def ids() -> tuple[str | None, str | None]:
    """
    Return session and request.
    """
    now = pgtrack.current()
    return now.session_id, now.request_id


@handler
def seen(event: Any, context: Any) -> Any:
    """
    Return session and request.
    """
    return ids()


@handler
def answering(event: Any, context: Any) -> Any:
    """
    Answer what the event tells to.
    """
    return event.get("answer", {"statusCode": 200, "body": "ok"})


class TestCorrelation:
    """
    What an invocation belongs to.
    """

    @pytest.mark.parametrize("shape", HTTP)
    def test_headers(self, shape: str) -> None:
        """Session and request come from the headers, in whatever case."""
        assert ("sess_web", "req_web") == seen(HTTP[shape](IDS), CONTEXT)

    @pytest.mark.parametrize("shape", HTTP)
    def test_no_headers(self, shape: str) -> None:
        """Without them the session is a fresh one, and the request is Lambda's."""
        first = seen(HTTP[shape](), CONTEXT)
        second = seen(HTTP[shape](), CONTEXT)

        assert first[0].startswith("srv-")
        assert first[0] != second[0]
        assert AWS_ID == first[1] == second[1]

    @pytest.mark.parametrize("event", OTHERS.values(), ids=OTHERS)
    def test_other_events(self, event: Any) -> None:
        """So it is for events that carry nothing."""
        session_id, request_id = seen(event, CONTEXT)

        assert session_id.startswith("srv-")
        assert AWS_ID == request_id

    def test_refused(self, events: Events) -> None:
        """Ids that do not fit are replaced, and counted; Lambda's id takes over."""
        bad = {"X-Session-ID": "no way", "X-Request-ID": "<script>"}

        session_id, request_id = seen(rest(bad), CONTEXT)

        assert session_id.startswith("srv-")
        assert AWS_ID == request_id
        adjusted = pgtrack.stats().adjusted
        assert (1, 1) == (adjusted["session_id"], adjusted["request_id"])

    @pytest.mark.parametrize("context", [None, object(), "context"])
    def test_without_a_context(self, context: Any) -> None:
        """Without Lambda's id the request has a new one, as in a test of the host's."""
        session_id, request_id = seen(rest(), context)

        assert session_id.startswith("srv-")
        assert request_id
        assert AWS_ID != request_id

    def test_users_of_browsers(self) -> None:
        """Headers of HTTP name no user, and no journey."""
        headers = {**IDS, "X-User-ID": "u_forged", "X-Journey-ID": "forged"}

        now = handler(lambda *_: pgtrack.current())(http(headers), CONTEXT)

        assert (None, None) == (now.user_id, now.journey_id)

    @pytest.mark.parametrize("make", [sqs, sns])
    def test_messages(self, make: Any) -> None:
        """A single message goes on with all that its attributes carry."""
        with pgtrack.session("sess_a", user_id="u_1"), pgtrack.journey("checkout"):
            carried = pgtrack.propagation_headers(trusted=True)

        now = handler(lambda *_: pgtrack.current())(make(carried), CONTEXT)

        assert ("sess_a", AWS_ID, "u_1", "checkout") == (
            now.session_id,
            now.request_id,
            now.user_id,
            now.journey_id,
        )

    def test_batch(self) -> None:
        """A batch is nobody's; each record says itself what it belongs to."""
        found = []

        @handler
        def work(event: Any, context: Any) -> None:
            found.append(pgtrack.current().session_id)
            for record in event["Records"]:
                with pgtrack.continued_from(message_headers(record), trusted=True):
                    found.append(pgtrack.current().session_id)

        work(sqs({"X-Session-ID": "sess_a"}, {"X-Session-ID": "sess_b"}), CONTEXT)

        assert str(found[0]).startswith("srv-")
        assert ["sess_a", "sess_b"] == found[1:]

    def test_other_records(self) -> None:
        """Of other services' records, and what is none, nothing is read."""
        assert [{}, {}, {}] == [*map(message_headers, (S3["Records"][0], None, "x"))]
        assert {"a": "1"} == message_headers(sqs({"a": "1"})["Records"][0])

    def test_nothing_left_behind(self) -> None:
        """A warm start sees nothing of the invocation before, whatever that left."""
        mine = handler(lambda *_: pgtrack.current())

        @handler
        def careless(event: Any, context: Any) -> None:
            pgtrack.session("sess_left", metadata={"k": 1}).__enter__()
            pgtrack.identify("u_left")

        careless(rest(IDS), CONTEXT)
        assert current_frame() is None
        now = mine(rest(), CONTEXT)

        assert str(now.session_id).startswith("srv-")
        assert (None, {}) == (now.user_id, now.metadata)

    def test_nothing_comes_in(self) -> None:
        """What was on while the module was imported stays out, and is on afterwards."""
        with pgtrack.session("sess_import", metadata={"k": 1}):
            now = handler(lambda *_: pgtrack.current())(rest(), CONTEXT)

            assert "sess_import" == pgtrack.current().session_id
        assert str(now.session_id).startswith("srv-")
        assert {} == now.metadata

    def test_two_at_once_never_mix(self, events: Events) -> None:
        """Of thousands of invocations in several threads none is mixed up."""
        barrier = threading.Barrier(8)

        @handler
        def work(event: Any, context: Any) -> dict[str, Any]:
            pgtrack.identify(f"u_{ids()[0]}")
            barrier.wait(10)
            return {"statusCode": 200, "headers": {"Seen": ids()[0]}}

        def invoke(i: int) -> list[tuple[str, str, str]]:
            answers = []
            for j in range(250):
                session_id = f"sess_{i}.{j}"
                headers = {"X-Session-ID": session_id, "X-Request-ID": f"r{i}.{j}"}
                got = work(http(headers), CONTEXT)["headers"]
                answers.append((session_id, got["Seen"], got["X-Request-ID"]))
            return answers

        answers = [answer for part in start_together(8, invoke) for answer in part]

        assert 2_000 == len(answers) == len(events)
        assert [] == [a for a in answers if a[0] != a[1] or a[0][5:] != a[2][1:]]
        assert [] == [e for e in events if e.user_id != f"u_{e.session_id}"]


class TestEvents:
    """
    What an invocation makes.
    """

    @pytest.mark.parametrize(
        ("shape", "path"),
        [
            ("REST API", "/users/{id}"),
            ("HTTP API", "/users/{id}"),
            ("HTTP API, format 1.0", "/users/{id}"),
            ("function URL", "/users/7"),
            ("load balancer", "/users/7"),
            ("load balancer, multi-value", "/users/7"),
        ],
    )
    def test_success(self, events: Events, shape: str, path: str) -> None:
        """An invocation by HTTP makes one response, with its route and user."""

        @handler
        def work(event: Any, context: Any) -> dict[str, Any]:
            pgtrack.identify("u_1")
            return {"statusCode": 201, "body": "made"}

        work(HTTP[shape](IDS), CONTEXT)

        (event,) = events
        assert ("api.response", "GET", path, 201) == (
            event.type,
            event.api_method,
            event.api_path,
            event.api_status_code,
        )
        assert ("sess_web", "req_web", "u_1") == (
            event.session_id,
            event.metadata["request_id"],
            event.user_id,
        )
        assert event.api_duration_ms is not None

    @pytest.mark.parametrize(
        ("event", "path"),
        [
            (http(route="ANY /users/{proxy+}"), "/users/{proxy+}"),
            (http(route="ANY /{proxy+}"), "/users/7"),
            (rest(resource="/{proxy+}"), "/users/7"),
            (http(route="$default", stage="prod"), "/users/7"),
            (http(route="$default", stage="prod", path=""), "/"),
            (http(route="$default", stage="use", path="/users/7"), "/users/7"),
            (http(route="$default", path="/$defaults"), "/$defaults"),
            ({**rest(resource="/{proxy+}"), "version": "1.0"}, "/users/7"),
            (rest(resource="/{proxy+}", path="/prod/users/7"), "/prod/users/7"),
            (rest(resource="", path=""), "/"),
        ],
    )
    def test_path(self, events: Events, event: Any, path: str) -> None:
        """A route says more than the path, but for one that takes all; no stage."""
        answering(event, CONTEXT)

        assert [path] == [event.api_path for event in events]

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ({"statusCode": 404}, 404),
            ({"statusCode": "503"}, 503),
            ({"body": "x"}, 200),
            ("text", 200),
            (None, 200),
        ],
    )
    def test_status(self, events: Events, answer: Any, expected: int) -> None:
        """The status is what the answer says, 200 where it says none."""
        answering({**http(), "answer": answer}, CONTEXT)

        assert [expected] == [e.api_status_code for e in events.of_type("api.response")]
        assert (expected >= 500) is bool(events.of_type("error"))

    def test_wrong_status(self, events: Events) -> None:
        """A status that is none is the gateway's 500, and counted."""
        answering({**http(), "answer": {"statusCode": "many"}}, CONTEXT)

        assert [500] == [e.api_status_code for e in events.of_type("api.response")]
        assert 1 == pgtrack.stats().adjusted["status_code"]

    @pytest.mark.parametrize("event", [http(IDS), rest(IDS)])
    def test_exception(self, events: Events, event: Any) -> None:
        """What escapes is an error and a 500, once, and the same object for Lambda."""
        error = ValueError("no")

        @handler
        def fail(event: Any, context: Any) -> None:
            raise error

        with pytest.raises(ValueError, match="no") as caught:
            fail(event, CONTEXT)

        assert error is caught.value
        name = f"{__name__}.TestEvents.test_exception.<locals>.fail"
        assert [
            ("error", "sess_web", "ValueError", name),
            ("api.response", "sess_web", None, None),
        ] == [(e.type, e.session_id, e.error_type, e.error_component) for e in events]
        assert 500 == events[1].api_status_code
        assert current_frame() is None

    def test_exception_without_http(self, events: Events) -> None:
        """What escapes from another invocation is an error, and no response."""

        @handler
        def fail(event: Any, context: Any) -> None:
            raise KeyError

        with pytest.raises(KeyError):
            fail(sqs({"X-Session-ID": "sess_a", "X-User-ID": "u_1"}), CONTEXT)

        assert [("error", "sess_a", "u_1", "KeyError")] == [
            (e.type, e.session_id, e.user_id, e.error_type) for e in events
        ]

    @pytest.mark.parametrize("event", [sqs({}), SCHEDULED, WEBSOCKET, "x"])
    def test_no_http(self, events: Events, event: Any) -> None:
        """What is no HTTP request makes no response, and its result is untouched."""
        result = {"statusCode": 200, "batchItemFailures": []}

        assert result is handler(lambda *_: result)(event, CONTEXT)
        assert [] == events

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_end_of_the_process(self, events: Events, error: Any) -> None:
        """What ends the process is no error, and ends the invocation all the same."""

        @handler
        def stop(event: Any, context: Any) -> None:
            raise error

        with pytest.raises(error):
            stop(http(), CONTEXT)

        assert [499] == [event.api_status_code for event in events]
        assert current_frame() is None

    def test_track_api(self, events: Events) -> None:
        """A handler's own `track_api` gives path and method; nested ones tell."""

        @pgtrack.track_api("/inner")
        def inner() -> None:
            pass

        @handler
        @pgtrack.track_api("/given", method="POST")
        def work(event: Any, context: Any) -> dict[str, Any]:
            inner()
            return {"statusCode": 503}

        work(http(), CONTEXT)

        assert [("/inner", 200), ("/given", 503)] == [
            (e.api_path, e.api_status_code) for e in events.of_type("api.response")
        ]

    def test_tracked_without_http(self, events: Events) -> None:
        """Without HTTP a function that is tracked makes its own event."""
        work = handler(pgtrack.track_api("/job")(lambda *_: None))

        work(SCHEDULED, CONTEXT)

        assert ["/job"] == [event.api_path for event in events]

    def test_handler_that_calls_another(self, events: Events) -> None:
        """A handler that another one calls is a part of that invocation."""
        outer = handler(answering)

        answer = outer(http(IDS), CONTEXT)

        assert 1 == len(events)
        assert "req_web" == answer["headers"]["X-Request-ID"]

    def test_untracked(self, events: Events) -> None:
        """With `track=False` there are no events, and correlation all the same."""

        @handler(track=False)
        def fail(event: Any, context: Any) -> None:
            assert ("sess_web", "req_web") == ids()
            raise KeyError

        with pytest.raises(KeyError):
            fail(http(IDS), CONTEXT)

        assert [] == events

    def test_client(self, events: Events) -> None:
        """A client of its own tells in place of the default one."""
        with capture() as others:
            client = pgtrack._api.default_client()
        work = handler(client=client)(lambda *_: None)

        work(http(), CONTEXT)

        assert (0, 1) == (len(events), len(others))

    @pytest.mark.parametrize("make", [rest, http])
    def test_preflight(self, events: Events, make: Any) -> None:
        """A preflight of CORS makes no event, and its answer is untouched."""
        asked = {"Origin": "https://a", "Access-Control-Request-Method": "PUT"}
        result = {"statusCode": 204}
        work = handler(lambda *_: result)

        assert result is work(make(asked, method="OPTIONS"), CONTEXT)
        assert [] == events
        assert result is not work(make(method="OPTIONS"), CONTEXT)
        assert 1 == len(events)

    @pytest.mark.parametrize("version", ["1.0", "2.0"])
    def test_authorizer(self, events: Events, version: str) -> None:
        """An authorizer is no answer to the request it is asked about."""
        event = (
            {**rest(IDS), "type": "REQUEST", "methodArn": "arn:aws:execute-api:x"}
            if version == "1.0"
            else {**http(IDS), "type": "REQUEST", "routeArn": "arn:aws:execute-api:x"}
        )
        result = {"isAuthorized": True, "statusCode": 200}
        work = handler(lambda *_: (ids(), result)[1])

        assert result is work(event, CONTEXT)
        assert [] == events

    def test_disabled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Switched off there is correlation, and neither event nor thread."""
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "false")

        assert ("sess_web", "req_web") == seen(http(IDS), CONTEXT)
        assert 0 == pgtrack.stats().emitted
        assert "pgtrack" not in {thread.name for thread in threading.enumerate()}


class TestEcho:
    """
    The request id in the answer.
    """

    @pytest.mark.parametrize("shape", HTTP)
    def test_added(self, shape: str) -> None:
        """The answer has it, and what the handler returned is not changed."""
        given = {"statusCode": 200, "headers": {"A": "b"}, "body": "ok"}
        before = copy.deepcopy(given)

        answer = answering({**HTTP[shape](IDS), "answer": given}, CONTEXT)

        key = "multiValueHeaders" if "multi" in shape else "headers"
        value: Any = ["req_web"] if "multi" in shape else "req_web"
        assert value == answer[key]["X-Request-ID"]
        assert before == given
        assert "b" == answer["headers"]["A"]
        assert {"statusCode": 200, "body": "ok"} == {
            k: v for k, v in answer.items() if not k.lower().endswith("headers")
        }

    @pytest.mark.parametrize("headers", [None, {}, "missing"])
    def test_without_headers(self, headers: Any) -> None:
        """An answer without headers gets them."""
        given = {"statusCode": 204, "headers": headers}
        if headers == "missing":
            del given["headers"]

        answer = answering({**http(IDS), "answer": given}, CONTEXT)

        assert {"statusCode": 204, "headers": {"X-Request-ID": "req_web"}} == answer

    @pytest.mark.parametrize(
        "given",
        [
            {"statusCode": 200, "headers": {"x-request-id": "own"}},
            {"statusCode": 200, "multiValueHeaders": {"X-REQUEST-ID": ["own"]}},
            {"statusCode": 200, "headers": [("a", "b")]},
            {"message": "the gateway makes a body of this"},
            "text",
            None,
            [1],
        ],
    )
    def test_left_alone(self, given: Any) -> None:
        """An id of the handler's own stays, and what is no answer stays as it is."""
        assert given is answering({**http(IDS), "answer": given}, CONTEXT)

    def test_event_is_not_changed(self) -> None:
        """Nor is the event."""
        event = rest(IDS)
        before = copy.deepcopy(event)

        answering(event, CONTEXT)

        assert before == event


def call(event: Any, context: Any = None) -> Any:
    """
    Return what came in.
    """
    return event, context


class Shop:
    """
    Handlers that are methods.
    """

    name = "shop"

    @handler
    def method(self, event: Any, context: Any) -> Any:
        return self.name, event, ids()

    @handler(track=False)
    def with_options(self, event: Any, context: Any) -> Any:
        return self.name, event, ids()

    @handler
    @classmethod
    def of_class(cls, event: Any, context: Any) -> Any:
        return cls.name, event, ids()

    @staticmethod
    @handler
    def static(event: Any, context: Any) -> Any:
        return "shop", event, ids()

    def __call__(self, event: Any, context: Any) -> Any:
        return self.name, event, ids()


class TestDecorator:
    """
    What can be decorated, and how.
    """

    @pytest.mark.parametrize(
        "function",
        [
            Shop().method,
            Shop().with_options,
            functools.partial(Shop.method, Shop()),
            Shop.of_class,
            Shop.static,
            handler(Shop()),
            handler(functools.partial(Shop.__call__, Shop())),
        ],
    )
    def test_kinds(self, function: Any) -> None:
        """Methods of all kinds, callables and partials."""
        event = http(IDS)

        assert ("shop", event, ("sess_web", "req_web")) == function(event, CONTEXT)

    def test_looks_the_same(self) -> None:
        """Name, signature and text stay."""
        decorated = handler(call)

        assert inspect.signature(call) == inspect.signature(decorated)
        assert (call.__name__, call.__qualname__, call.__doc__, call.__module__) == (
            decorated.__name__,
            decorated.__qualname__,
            decorated.__doc__,
            decorated.__module__,
        )

    def test_by_name(self) -> None:
        """Tests may name the arguments, and leave the context out."""
        event = http(IDS)
        function = handler(call)

        assert (event, CONTEXT) == function(event=event, context=CONTEXT)
        assert (event, CONTEXT) == function(event, context=CONTEXT)
        assert (event, None) == function(event)

    async def _wait(self, event: Any, context: Any) -> None:
        pass

    def _generate(self, event: Any, context: Any) -> Iterator[None]:
        yield

    async def _generate_async(self, event: Any, context: Any) -> Any:
        yield

    @pytest.mark.parametrize(
        "function",
        [
            _wait,
            _generate,
            _generate_async,
            functools.partial(_wait, None),
            staticmethod(_wait),
            type("Async", (), {"__call__": _wait})(),
        ],
    )
    def test_late(self, function: Any) -> None:
        """What Lambda would not wait for is refused at once, with what to do."""
        with pytest.raises(TypeError, match=r"must return its answer .*asyncio\.run"):
            handler(function)

    @pytest.mark.parametrize("thing", [Shop, 7, "name"])
    def test_no_function(self, thing: Any) -> None:
        """What is no function is refused at once."""
        with pytest.raises(TypeError, match="must be callable"):
            handler(thing)

    @pytest.mark.parametrize("value", [-1, "2", None, True, float("nan"), 901])
    def test_wrong_timeout(self, value: Any) -> None:
        """A timeout that is none is refused at once, with what to do."""
        with pytest.raises(pgtrack.ConfigError, match="`flush_timeout` must be"):
            handler(flush_timeout=value)


class TestDelivery:
    """
    Delivery before the freeze.
    """

    @pytest.mark.parametrize("fails", [False, True])
    def test_delivered_before_the_end(self, fails: bool) -> None:
        """When an invocation ends, by whatever, its events have arrived."""

        @handler(flush_timeout=10)
        def work(event: Any, context: Any) -> None:
            pgtrack.emit("custom", name="inside")
            if fails:
                raise KeyError

        with Server() as server:
            pgtrack.configure(project_id="p", endpoint=server.url)
            for i in range(3):
                if fails:
                    with pytest.raises(KeyError):
                        work(http({"X-Session-ID": f"sess_{i}"}), CONTEXT)
                else:
                    work(http({"X-Session-ID": f"sess_{i}"}), CONTEXT)
                arrived = [event["session.id"] for event in server.core.events]
                assert (3 if fails else 2) == arrived.count(f"sess_{i}")

    def test_own_client(self) -> None:
        """A client of its own delivers, too, and so does the default one."""
        with Server() as server, Server() as other:
            pgtrack.configure(project_id="p", endpoint=server.url)
            config = pgtrack.Config(project_id="q", endpoint=other.url)
            with pgtrack.Client(config) as client:
                work = handler(client=client, flush_timeout=10)(
                    lambda *_: pgtrack.emit("custom")
                )
                work(http(), CONTEXT)

                assert ["custom"] == [e["event.type"] for e in server.core.events]
                assert ["api.response"] == [e["event.type"] for e in other.core.events]

    @pytest.mark.parametrize(
        ("timeout", "left", "least", "most"),
        [(0.3, 30.0, 0.3, 2.5), (30.0, 0.6, 0.3, 2.5), (0.0, 30.0, 0.0, 0.9)],
    )
    @pytest.mark.parametrize("is_silent", [False, True])
    def test_bounded(
        self, is_silent: bool, timeout: float, left: float, least: float, most: float
    ) -> None:
        """An endpoint that fails costs no more than the timeout, or what is left."""
        done = threading.Event()
        with Server() as server:
            server.default = hang(done) if is_silent else status(503)
            pgtrack.configure(project_id="p", endpoint=server.url, exit_timeout=0.1)
            work = handler(flush_timeout=timeout)(lambda *_: {"statusCode": 200})
            start = time.monotonic()

            answer = work(http(), Context(left))

            took = time.monotonic() - start
            pgtrack.shutdown(0.0)
            done.set()
            assert 200 == answer["statusCode"]
            assert least <= took < most

    def test_nothing_to_deliver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without events nobody waits, nor is asked for the time that is left."""
        pgtrack.configure(project_id="p", endpoint="console:")
        monkeypatch.setattr(pgtrack._api, "flush", pytest.fail)

        handler(track=False)(lambda *_: None)(http(), CONTEXT)

    def test_no_time_left(
        self, monkeypatch: pytest.MonkeyPatch, events: Events
    ) -> None:
        """An invocation whose time is over does not wait."""
        monkeypatch.setattr(pgtrack._api, "flush", pytest.fail)

        answering(http(), Context(0.1))

        assert 1 == len(events)


class Hostile:
    """
    A context whose attributes raise.
    """

    @property
    def aws_request_id(self) -> str:
        raise RuntimeError

    def get_remaining_time_in_millis(self) -> int:
        raise RuntimeError


class TestShield:
    """
    Errors of our own, and of what Lambda passes.
    """

    @pytest.fixture(autouse=True)
    def _shielded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_diagnostics, "reraise", False)

    def test_hostile_context(self) -> None:
        """A context that raises costs the event, never the answer."""
        assert {"statusCode": 200, "body": "ok"} == answering(http(), Hostile())
        assert current_frame() is None

    def test_failing_end(self, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
        """An answer that we cannot read is returned as it is."""
        monkeypatch.setattr(aws_lambda, "_status", lambda _: 1 / 0)
        given = {"statusCode": 200}

        assert given is answering({**http(IDS), "answer": given}, CONTEXT)
        assert current_frame() is None
