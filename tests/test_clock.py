"""Time, waiting and ids: what freezegun may stop, and what it must not."""

from __future__ import annotations

import math
import threading
import time
import uuid
from datetime import datetime, timezone
from decimal import Decimal

import freezegun
import pytest

from harness import in_fork, start_together
from pgtrack import Client, Config
from pgtrack._clock import (
    SYSTEM_CLOCK,
    Signal,
    format_time,
    new_id,
    new_ids,
    seconds,
)
from pgtrack.testing import RecordingTransport


class TestSignal:
    """A wake-up that may be given from anywhere."""

    def test_a_signal_given_before_is_not_lost(self) -> None:
        """Whoever waits after a signal was given does not wait."""
        signal = Signal()
        signal.give()

        assert signal.wait(0.0)

    def test_many_signals_are_one(self) -> None:
        """Signals that nobody waited for are one, and giving them never fails."""
        signal = Signal()
        for _ in range(3):
            signal.give()

        assert (True, False) == (signal.wait(0.0), signal.wait(0.0))

    @pytest.mark.parametrize("timeout", [0.0, -1.0, 0.01])
    def test_a_wait_ends_without_a_signal(self, timeout) -> None:
        """A wait of any length ends, and says that nothing was given."""
        assert not Signal().wait(timeout)

    def test_a_wait_may_be_longer_than_the_platform_can_wait(self) -> None:
        """A timeout beyond the platform's longest one is cut, not refused."""
        signal = Signal()
        signal.give()

        assert signal.wait(threading.TIMEOUT_MAX * 2)

    def test_a_signal_wakes_a_waiter_in_another_thread(self) -> None:
        """A wait without a timeout lasts until another thread gives the signal."""
        signal = Signal()

        def act(i: int) -> bool:
            if i == 0:
                return signal.wait()
            signal.give()
            return True

        assert [True, True] == start_together(2, act)

    def test_giving_from_many_threads_wakes_once(self) -> None:
        """Threads that give at the same moment neither fail nor add up."""
        signal = Signal()
        start_together(16, lambda _: [signal.give() for _ in range(1000)])

        assert (True, False) == (signal.wait(0.0), signal.wait(0.0))


class TestSeconds:
    """What can be waited for."""

    @pytest.mark.parametrize(
        ("timeout", "expected"),
        [
            (5, 5.0),
            (0.25, 0.25),
            (Decimal("1.5"), 1.5),
            (-3, 0.0),
            (math.inf, threading.TIMEOUT_MAX),
        ],
    )
    def test_numbers(self, timeout, expected) -> None:
        """A number is seconds, none of them negative or beyond the platform's most."""
        assert expected == seconds(timeout)

    @pytest.mark.parametrize("timeout", [None, "5", "5s", [], math.nan])
    def test_what_is_no_number(self, timeout) -> None:
        """Whatever else is given is an error that says what would do."""
        with pytest.raises(TypeError) as caught:
            seconds(timeout)

        kind = type(timeout).__name__
        assert f"timeout must be a number of seconds (got {kind})." in str(caught.value)


class TestIds:
    """Random UUIDs, made by the hundred."""

    def test_an_id_is_a_random_uuid(self) -> None:
        """An id is a UUID of version 4 in its usual form."""
        made = new_id()

        parsed = uuid.UUID(made)
        assert (4, uuid.RFC_4122, str(parsed)) == (
            parsed.version,
            parsed.variant,
            made,
        )

    def test_all_ids_of_a_call_are_uuids_and_differ(self) -> None:
        """However many are made at once, each is a UUID, and none is made twice."""
        made = new_ids(1000)

        assert {4} == {uuid.UUID(each).version for each in made}
        assert 1000 == len(set(made))

    def test_none_are_none(self) -> None:
        """Asking for no ids gives none."""
        assert [] == new_ids(0)

    def test_a_child_does_not_repeat_its_parent(self) -> None:
        """A forked child makes other ids than its parent."""
        new_id()

        assert in_fork(new_id) != new_id()


class TestFormatTime:
    """Stamps as the wire has them."""

    @pytest.mark.parametrize(
        ("time_ns", "text"),
        [
            (0, "1970-01-01T00:00:00.000000Z"),
            (1_772_439_300_612_345_999, "2026-03-02T08:15:00.612345Z"),
            (951_782_400_000_000_000, "2000-02-29T00:00:00.000000Z"),
            (-1_000, "1969-12-31T23:59:59.999999Z"),
            (-(10**20), "0001-01-01T00:00:00.000000Z"),
            (10**24, "9999-12-31T23:59:59.999999Z"),
        ],
    )
    def test_a_time_is_utc_with_six_digits(self, time_ns, text) -> None:
        """A stamp has six digits and Z; what the format cannot write goes to an end."""
        assert text == format_time(time_ns)

    def test_the_text_is_the_time(self) -> None:
        """Reading the stamp gives the microsecond that was written."""
        now = time.time_ns()

        moment = datetime.fromisoformat(format_time(now).replace("Z", "+00:00"))
        assert now // 1000 == round(moment.timestamp() * 1_000_000)
        assert timezone.utc == moment.tzinfo


class TestFrozenTime:
    """freezegun stops stamps, and only them."""

    def test_the_wall_clock_can_be_frozen(self) -> None:
        """The wall time is freezegun's, where that stops it."""
        with freezegun.freeze_time("2026-03-02T08:15:00Z"):
            stamp = format_time(SYSTEM_CLOCK.time_ns())

        assert "2026-03-02T08:15:00.000000Z" == stamp

    def test_the_monotonic_clock_cannot(self) -> None:
        """The time that deadlines are measured by goes on meanwhile."""
        with freezegun.freeze_time("2026-03-02T08:15:00Z"):
            before = SYSTEM_CLOCK.monotonic()
            SYSTEM_CLOCK.wait(Signal(), 0.01)
            after = SYSTEM_CLOCK.monotonic()

        assert after - before >= 0.009

    def test_events_are_delivered_in_frozen_time(self) -> None:
        """The worker delivers what is stamped with a stopped clock, and flush ends."""
        transport = RecordingTransport()
        config = Config(project_id="p", endpoint="console:", batch_interval=0.01)
        with (
            freezegun.freeze_time("2026-03-02T08:15:00Z"),
            Client(config, transport=lambda: transport) as client,
        ):
            client.emit("custom")
            client.emit("custom")
            is_flushed = client.flush(5)

        assert is_flushed
        stamp = datetime(2026, 3, 2, 8, 15, tzinfo=timezone.utc)
        assert [stamp, stamp] == [event.timestamp for event in transport.taken]
