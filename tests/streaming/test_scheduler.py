from collections.abc import Sequence
from typing import Any, cast

import pytest

from streaming import scheduler
from streaming.session import SessionConfig
from tests.fakes import FakeSession, tone


def pcm(levels: Sequence[float], rate_hz: int = 16_000) -> bytes:
    return (tone(levels, rate_hz) * 32_767).astype("<i2").tobytes()


def test_what_is_kept_of_arrivals_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: float(next(clock)))
    stream = scheduler.Stream(lambda: None)
    stream.session = cast(Any, FakeSession(None, SessionConfig()))
    stream.put(SessionConfig())
    for _ in range(1_000):
        stream.put(pcm([0.0]))
        stream.session.write(pcm([0.0]))
        stream.session.step()
        stream.timed(stream.session.take_events())
    assert len(stream._arrivals) < 3


def test_the_lag_of_a_file_sent_at_once_is_that_of_its_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = 100.0
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: clock_s)
    stream = scheduler.Stream(lambda: None)
    stream.put(SessionConfig())
    stream.session = cast(Any, FakeSession(None, SessionConfig()))
    for _ in range(50):  # 20 s
        stream.put(pcm([0.2]))
        stream.session.write(pcm([0.2]))
    assert stream.lag_s(clock_s) == 0.0
    assert stream.lag_s(clock_s + 4.2) == pytest.approx(4.0)
    for _ in range(11):
        cast(Any, stream.session).step()
    assert stream.lag_s(clock_s + 4.2) == 0.0
    clock_s += 60  # what waits now has been due for long
    assert stream.lag_s(clock_s) == pytest.approx(20 - 4.4)
    stream.timed([])
    assert stream.lag_s(clock_s) == pytest.approx(20 - 4.4)
    while stream.session.ready():
        cast(Any, stream.session).step()
    clock_s += 60  # in a pause nothing becomes due
    stream.put(pcm([0.2] * 10))
    stream.session.write(pcm([0.2] * 10))
    assert stream.lag_s(clock_s + 3.9) == 0.0
    assert stream.lag_s(clock_s + 4.1) == pytest.approx(4.0)
