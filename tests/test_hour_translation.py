"""An hour of talk to a session that translates: nothing grows, nothing sticks."""

import pickle
from collections.abc import Iterator

import pytest

from benchmarks.translation import Segment, interpret, segments, sentences
from streaming.text_session import TextSession
from tests import tiny


@pytest.mark.slow
def test_an_hour_of_talk_costs_no_more_memory_or_time_than_its_first_minutes() -> None:
    """9,000 words into three languages, in a context so small that chunks leave it all the time."""
    languages = ["es", "de", "fr"]
    session = TextSession(tiny.translator(0, max_context_tokens=96), languages)
    sizes: list[int] = []

    def talk() -> Iterator[Segment]:
        for segment in segments(sentences(), 0):
            sizes.append(remembered_bytes(session))
            yield segment

    told = interpret(session, languages, talk(), 60)
    early, late, fifth = told.minutes[4], told.minutes[-1], len(sizes) // 5
    assert len(told.minutes) == 60
    assert late.resident_mb < 1.02 * early.resident_mb
    assert late.step_ms_p50 < 2 * early.step_ms_p50  # growth with time would be tenfold; a busy machine is not
    assert max(sizes[-fifth:]) < 1.1 * max(sizes[fifth : 2 * fifth]), "what the session remembers grows"
    assert told.longest_silence() < 10, "a translation has stopped"
    assert 0.8 < told.written(2 / 3, 1) / told.written(0, 1 / 3) < 1.25
    assert told.repetition() < 0.3


def remembered_bytes(session: TextSession) -> int:
    """Size of all that a session remembers between segments, its cache's memory left out, which has its own bound."""
    interpretation = session._interpretation
    assert interpretation is not None and not session._untold and not session._events
    assert interpretation.state.cache.capacity <= 512
    return len(pickle.dumps((interpretation.state.rows, interpretation.words)))
