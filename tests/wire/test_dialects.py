"""What holds for every dialect, whatever a client sends and however it cuts its audio."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.errors import DragomanError
from streaming.events import ErrorEvent, SessionUpdated
from streaming.messages import LookaheadChange
from streaming.session import SessionConfig
from tests.fakes import pcm
from tests.wire.fake_engine import Talk
from wire.deepgram import Deepgram
from wire.dialect import Dialect, Frame
from wire.simulstream import Simulstream
from wire.transcriptions import Transcriptions

QUERIES: dict[type[Dialect], dict[str, str]] = {
    Transcriptions: {"intent": "transcription"},
    Deepgram: {"encoding": "linear16", "sample_rate": "16000", "vad_events": "true", "utterance_end_ms": "1000"},
    Simulstream: {"latency": "low"},
}
FIRST: dict[type[Dialect], list[dict[str, Any]]] = {
    Transcriptions: [
        {"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}}}
    ],
    Deepgram: [],
    Simulstream: [{"sample_rate": 16_000, "target_lang": "de"}],
}
LAST: dict[type[Dialect], dict[str, Any]] = {
    Transcriptions: {"type": "input_audio_buffer.commit"},
    Deepgram: {"type": "CloseStream"},
    Simulstream: {"end_of_stream": True},
}
KINDS = (
    *("session.update", "transcription_session.update", "input_audio_buffer.append", "input_audio_buffer.commit"),
    *("input_audio_buffer.clear", "response.create", "Finalize", "KeepAlive", "CloseStream", "Configure"),
)
KEYS = (
    *("session", "audio", "input", "output", "format", "rate", "turn_detection", "transcription", "delay", "include"),
    *("silence_duration_ms", "eagerness", "input_audio_format", "event_id", "sample_rate", "source_lang"),
    *("target_lang", "metrics_metadata", "end_of_stream", "channel", "keyterms"),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from((*KINDS, "\ud800")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("type", *KEYS)), inner, max_size=4),
    max_leaves=8,
)
EVENTS = st.builds(
    lambda kind, fields: json.dumps({"type": kind, **fields}),
    st.sampled_from((*KINDS, "\ud800")),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
)
FRAMES: st.SearchStrategy[Frame] = EVENTS | VALUES.map(json.dumps) | st.text(max_size=20) | st.binary(max_size=9)


@pytest.mark.parametrize("kind", QUERIES)
@settings(max_examples=300, deadline=None)
@given(frames=st.lists(FRAMES, max_size=12))
def test_garbage_is_answered_and_never_raises_anything_else(kind: type[Dialect], frames: list[Frame]) -> None:
    dialect = kind.begin(QUERIES[kind])
    said = dialect.greeting("id-1", {"model": "fake"})
    for _ in dialect.opening():
        said += dialect.say(SessionUpdated({}, 0))
    for frame in frames:
        try:
            messages = dialect.take(frame)
        except DragomanError as error:
            said += dialect.say(ErrorEvent(0, error.code, str(error)))
            assert len(str(error)) < 400
        else:
            changes = [message for message in messages if isinstance(message, SessionConfig | LookaheadChange)]
            said += [answer for _ in changes for answer in dialect.say(SessionUpdated({}, 0))]
    for answer in said:
        assert isinstance(answer, str)
        assert isinstance(json.loads(answer.encode()), dict)


@pytest.mark.parametrize("kind", QUERIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cutting_of_the_audio_is_told_the_same(kind: type[Dialect], data: st.DataObject) -> None:
    audio = pcm([0.2, 0.3, 0, 0.4, 0.5])
    cuts = sorted(data.draw(st.lists(st.integers(1, len(audio) - 1), max_size=12, unique=True)))
    pieces = [audio[start:end] for start, end in zip([0, *cuts], [*cuts, len(audio)], strict=True)]
    told = []
    for given_pieces in ([audio], pieces):
        talk = Talk(kind.begin(QUERIES[kind]))
        answers = talk.send(*FIRST[kind], *(_audio(kind, piece) for piece in given_pieces), LAST[kind])
        told.append([{name: value for name, value in answer.items() if name != "created"} for answer in answers])
    assert told[0] == told[1]
    assert len(told[0]) > 4


def _audio(kind: type[Dialect], piece: bytes) -> Frame | dict[str, Any]:
    if kind is not Transcriptions:
        return piece
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(piece).decode()}
