"""What pgtrack says about itself, and how seldom."""

from __future__ import annotations

import logging

import pytest

from harness import run_script, start_together
from pgtrack import _diagnostics
from pgtrack._clock import SystemClock


@pytest.fixture(name="now")
def _now(monkeypatch) -> list[float]:
    """Replace the monotonic time, to be changed by the test."""
    now = [1000.0]

    class Clock(SystemClock):
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr(_diagnostics, "SYSTEM_CLOCK", Clock())
    return now


def lines(caplog) -> list[tuple[int, str]]:
    """Return the lines of the logger `pgtrack`."""
    return [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "pgtrack"]


def test_noting_writes_nothing(caplog) -> None:
    """A note is silent until somebody tells, who may wait for a stream."""
    _diagnostics.note("cause", "A line.")

    assert [] == lines(caplog)


def test_telling_writes_each_note_once(caplog) -> None:
    """Notes become lines of the logger `pgtrack`, with their levels, once."""
    _diagnostics.note("one", "A warning.")
    _diagnostics.note("two", "An error.", logging.ERROR)
    _diagnostics.tell()
    _diagnostics.tell()

    expected = [(logging.WARNING, "A warning."), (logging.ERROR, "An error.")]
    assert expected == lines(caplog)


def test_a_cause_has_one_line_a_minute(caplog, now) -> None:
    """A cause that comes again within the minute is not told again; later it is."""
    for moment in (0.0, 1.0, 59.9, 60.0, 61.0):
        now[0] = 1000.0 + moment
        _diagnostics.note("cause", f"At {moment}.")
        _diagnostics.tell()

    assert ["At 0.0.", "At 60.0."] == [text for _, text in lines(caplog)]


def test_causes_do_not_silence_each_other(caplog) -> None:
    """Each cause has its own minute."""
    _diagnostics.note("one", "One.")
    _diagnostics.note("two", "Two.")
    _diagnostics.tell()

    assert 2 == len(lines(caplog))


def test_threads_that_note_the_same_leave_one_line(caplog) -> None:
    """A cause that many threads run into at once has one line."""
    start_together(16, lambda i: _diagnostics.note("cause", f"From {i}."))
    _diagnostics.tell()

    assert 1 == len(lines(caplog))


def test_threads_that_tell_at_once_write_each_line_once(caplog) -> None:
    """However many tell at the same moment, a line is written by one of them."""
    for i in range(50):
        _diagnostics.note(f"cause {i}", f"Line {i}.")
    start_together(8, lambda _: _diagnostics.tell())

    assert {f"Line {i}." for i in range(50)} == {text for _, text in lines(caplog)}
    assert 50 == len(lines(caplog))


def test_a_handler_may_note_while_it_is_told(caplog) -> None:
    """A handler that makes pgtrack note something neither loops nor loses it."""

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _diagnostics.note("inner", "From the handler.")

    handler = Noting()
    _diagnostics.logger.addHandler(handler)
    try:
        _diagnostics.note("outer", "A line.")
        _diagnostics.tell()
        _diagnostics.tell()
    finally:
        _diagnostics.logger.removeHandler(handler)

    assert ["A line.", "From the handler."] == [text for _, text in lines(caplog)]


def test_logging_that_fails_harms_nobody(caplog) -> None:
    """A filter of the host's that raises costs its line, and nothing else."""

    def fail(record: logging.LogRecord) -> bool:
        if "first" in record.getMessage():
            raise RuntimeError
        return True

    _diagnostics.logger.addFilter(fail)
    try:
        _diagnostics.note("one", "The first line.")
        _diagnostics.note("two", "The second line.")
        _diagnostics.tell()
    finally:
        _diagnostics.logger.removeFilter(fail)

    assert ["The second line."] == [text for _, text in lines(caplog)]


def test_an_internal_error_is_told_by_type_and_place(caplog, monkeypatch) -> None:
    """The line of an internal error has its type and our line, but not its message."""
    monkeypatch.setattr(_diagnostics, "reraise", False)
    try:
        raise TypeError("secret")
    except TypeError as error:
        _diagnostics.internal_error(error)
    _diagnostics.tell()

    assert [logging.ERROR] == [level for level, _ in lines(caplog)]
    assert "TypeError at ?" in lines(caplog)[0][1]
    assert "secret" not in caplog.text


def test_the_place_of_an_internal_error_is_in_our_code(caplog, monkeypatch) -> None:
    """The place is the innermost line of pgtrack's that the error passed."""
    monkeypatch.setattr(_diagnostics, "reraise", False)
    try:
        _diagnostics.note([], "A cause that cannot be one.")  # type: ignore[arg-type]
    except TypeError as error:
        _diagnostics.internal_error(error)
    _diagnostics.tell()

    assert "TypeError at _diagnostics.py:" in lines(caplog)[0][1]


def test_under_test_an_internal_error_is_raised() -> None:
    """The project's own tests see what a host would not."""
    with pytest.raises(ZeroDivisionError):
        _diagnostics.internal_error(ZeroDivisionError())


class TestDetails:
    """
    The setting `debug`.
    """

    def test_shown(self) -> None:
        """With `debug` each attempt has its line on standard error, without payload."""
        script = """
        import pgtrack
        with pgtrack.Client(
            pgtrack.Config(project_id="p", endpoint="console:", debug=True)
        ) as client:
            client.emit("custom", name="hello")
        """
        ended = run_script(script)

        assert "hello" in ended.stdout
        assert ended.stderr.startswith("pgtrack sent 1 events (")
        assert "hello" not in ended.stderr

    def test_shown_where_the_host_logs(self) -> None:
        """Where the host has set up logging, the lines go there and nowhere else."""
        script = """
        import logging, sys
        import pgtrack
        logging.basicConfig(stream=sys.stdout, format="host %(levelname)s %(message)s")
        with pgtrack.Client(
            pgtrack.Config(project_id="p", endpoint="console:stderr", debug=True)
        ) as client:
            client.emit("custom")
        """
        ended = run_script(script)

        assert ended.stdout.startswith("host DEBUG pgtrack sent 1 events (")

    def test_silent(self) -> None:
        """Without it, nothing is said of what goes well."""
        script = """
        import pgtrack
        with pgtrack.Client(
            pgtrack.Config(project_id="p", endpoint="console:")
        ) as client:
            client.emit("custom")
        """
        ended = run_script(script)

        assert "" == ended.stderr
