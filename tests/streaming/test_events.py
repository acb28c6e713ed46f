import json
from dataclasses import replace

import pytest

from streaming.events import (
    ErrorEvent,
    Event,
    SessionClosed,
    SessionCreated,
    SessionUpdated,
    TranscriptDelta,
    TranslationDelta,
    Word,
    parse_event,
)

DELTA = TranscriptDelta(
    7,
    " where the",
    1280,
    1600,
    1840,
    0,
    False,
    (Word("where", 1280, 1440, 0.97), Word("the", 1520, 1600, 0.5)),
)
TRANSLATION = TranslationDelta(8, " dónde está", "es", (3, 5), False, 1280, 2080, 2320)


def test_the_json_of_a_translation_is_the_wire_format() -> None:
    assert TRANSLATION.to_json() == (
        '{"type": "session.output_transcript.delta", "seq": 8, "delta": " dónde está", "language": "es",'
        ' "source_start_ms": 1280, "source_end_ms": 2080, "emitted_ms": 2320, "source_words": [3, 5],'
        ' "endpoint": false}'
    )


def test_a_translation_of_words_without_audio_has_no_times() -> None:
    assert "_ms" not in TranslationDelta(0, "sí", "es", (0, 0)).to_json()


def test_the_json_of_a_delta_is_the_wire_format() -> None:
    assert DELTA.to_json() == (
        '{"type": "session.input_transcript.delta", "seq": 7, "delta": " where the", "start_ms": 1280,'
        ' "end_ms": 1600, "emitted_ms": 1840, "segment": 0, "endpoint": false, "words":'
        ' [{"word": "where", "start_ms": 1280, "end_ms": 1440, "confidence": 0.97},'
        ' {"word": "the", "start_ms": 1520, "end_ms": 1600, "confidence": 0.5}]}'
    )


@pytest.mark.parametrize(
    "event",
    [
        SessionCreated({"model": "tiny"}, 0),
        SessionUpdated({"max_lookahead_ms": 480}, 1),
        DELTA,
        replace(DELTA, backlog_ms=31),
        TRANSLATION,
        replace(TRANSLATION, backlog_ms=31, endpoint=True),
        TranslationDelta(0, "sí", "es", (0, 0)),
        SessionClosed(9, 61_000),
        ErrorEvent(3, "invalid_json", "déjà \N{EM DASH} \u2028 \n"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_json_is_one_line_and_comes_back_as_the_event(event: Event) -> None:
    text = event.to_json()
    assert "\n" not in text
    assert list(json.loads(text))[:2] == ["type", "seq"]
    assert parse_event(text) == event


def test_unknown_fields_of_a_newer_server_are_passed_over() -> None:
    event = SessionClosed(9, 61_000)
    assert parse_event(json.dumps({**event.to_dict(), "new": 1})) == event


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"type": "session.closed"}', '{"type": "other"}'])
def test_what_is_no_event_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_event(text)


def test_confidence_has_two_decimals() -> None:
    assert Word("a", 0, 1, 0.123456).to_dict()["confidence"] == 0.12
