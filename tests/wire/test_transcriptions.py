import base64
import json
import math
from typing import Any

import pytest

from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, SessionClosed, SessionUpdated, TranscriptDelta, Word
from streaming.messages import Command, LookaheadChange
from streaming.session import SessionConfig
from tests.fakes import pcm
from tests.wire.fake_engine import Talk, told
from wire.transcriptions import Transcriptions

COMMIT = {"type": "input_audio_buffer.commit"}
CLEAR = {"type": "input_audio_buffer.clear"}
DELTA, COMPLETED = (f"conversation.item.input_audio_transcription.{end}" for end in ("delta", "completed"))
LOGPROBS = "item.input_audio_transcription.logprobs"


def undeclared() -> Talk:
    return Talk(Transcriptions.begin({"intent": "transcription", "model": "gpt-4o-transcribe"}))


def talk() -> Talk:
    """A session at the rate of the engine, where a word is told as soon as its samples are there."""
    started = undeclared()
    (updated,) = started.send(update(format={"type": "audio/pcm", "rate": 16_000}))
    assert updated["event_id"] == "event_2"
    return started


def update(include: object = None, **audio_input: Any) -> dict[str, Any]:
    session = {"type": "transcription", "audio": {"input": audio_input}}
    return {"type": "session.update", "session": session if include is None else {**session, "include": include}}


def append(levels: list[float], rate_hz: int = 16_000) -> dict[str, Any]:
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm(levels, rate_hz)).decode()}


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def completed(events: list[dict[str, Any]]) -> list[str]:
    return [event["transcript"] for event in events if event["type"] == COMPLETED]


def deltas(events: list[dict[str, Any]]) -> dict[str, str]:
    """The text of each item as its deltas tell it."""
    items: dict[str, str] = {}
    for event in events:
        if event["type"] == DELTA:
            items[event["item_id"]] = items.get(event["item_id"], "") + event["delta"]
    return items


def test_the_first_event_tells_the_defaults() -> None:
    (created,) = undeclared().greeting
    assert created == {
        "type": "session.created",
        "event_id": "event_1",
        "session": {
            "type": "transcription",
            "object": "realtime.transcription_session",
            "id": "id-1",
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": 24_000},
                    "noise_reduction": None,
                    "transcription": {"model": "fake", "delay": None},
                    "turn_detection": {"type": "server_vad", "silence_duration_ms": 500},
                }
            },
            "include": [],
        },
    }


def test_an_item_from_its_first_word_to_its_transcript() -> None:
    started = talk()
    events = started.send(append([0, 0.2, 0.3, 0, 0]))
    assert started.configs == [SessionConfig(endpoint_silence_ms=500)]
    assert kinds(events) == [
        "input_audio_buffer.speech_started",
        DELTA,
        DELTA,
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        COMPLETED,
    ]
    assert (events[0]["audio_start_ms"], events[3]["audio_end_ms"]) == (400, 1_600)
    assert [event["delta"] for event in events[1:3]] == ["w20", " w30"]
    assert {event["item_id"] for event in events if "item_id" in event} == {"item_1"}
    assert events[4]["previous_item_id"] is None
    assert events[5]["item"] == {
        "id": "item_1",
        "object": "realtime.item",
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": [{"type": "input_audio", "transcript": "w20 w30"}],
    }
    assert events[6] == {
        "type": COMPLETED,
        "event_id": "event_9",
        "item_id": "item_1",
        "content_index": 0,
        "transcript": "w20 w30",
        "usage": {"type": "duration", "seconds": 1.6},
        "logprobs": None,
    }


def test_items_follow_each_other_and_events_are_numbered() -> None:
    started = talk()
    events = started.send(append([0.2, 0, 0.3, 0]))
    assert [event["event_id"] for event in events] == [f"event_{number}" for number in range(3, len(events) + 3)]
    committed = [event for event in events if event["type"] == "input_audio_buffer.committed"]
    assert [(event["item_id"], event["previous_item_id"]) for event in committed] == [
        ("item_1", None),
        ("item_2", "item_1"),
    ]
    assert completed(events) == list(deltas(events).values()) == ["w20", "w30"]


def test_without_turn_detection_the_client_commits() -> None:
    started = talk()
    (updated,) = started.send(update(turn_detection=None))
    assert updated["session"]["audio"]["input"]["turn_detection"] is None
    told_of = started.send(append([0.2, 0, 0.3, 0]))
    assert kinds(told_of) == [DELTA, DELTA]
    events = started.send(COMMIT)
    assert kinds(events) == ["input_audio_buffer.committed", "conversation.item.added", COMPLETED]
    assert completed(events) == ["w20 w30"]
    assert events[2]["usage"]["seconds"] == 1.6


def test_a_commit_tells_the_word_that_has_not_ended() -> None:
    started = talk()
    audio = base64.b64encode(pcm([0.2, 0.3])[:-1_000]).decode()
    assert list(deltas(started.send({"type": "input_audio_buffer.append", "audio": audio})).values()) == ["w20"]
    assert completed(started.send(COMMIT)) == ["w20 w30"]


def test_a_commit_of_silence_has_an_empty_transcript_and_one_of_nothing_is_an_error() -> None:
    started = talk()
    assert completed(started.send(append([0, 0]), COMMIT)) == [""]
    (error,) = started.send(COMMIT)
    assert error["error"]["code"] == "input_audio_buffer_commit_empty"


def test_what_waits_for_a_commit_is_one_item() -> None:
    events = talk().together(append([0.2, 0, 0.3]), COMMIT, append([0.4]), COMMIT)
    assert completed(events) == ["w20 w30", "w40"]
    assert "input_audio_buffer.speech_stopped" not in kinds(events)


def test_what_is_cleared_is_not_committed() -> None:
    started = talk()
    started.send(update(turn_detection=None), append([0.2]))
    cleared = started.together(append([0.3, 0.4]), CLEAR, append([0.5]))
    assert kinds(cleared) == ["input_audio_buffer.cleared", DELTA]
    committed = started.send(COMMIT)
    assert completed(committed) == ["w50"]
    assert committed[0]["previous_item_id"] is None
    assert committed[0]["item_id"] == cleared[1]["item_id"] == "item_2"
    assert [committed[2]["usage"]["seconds"], *completed(started.send(append([0.6]), CLEAR))] == [0.4]


def test_a_binary_frame_is_audio_too() -> None:
    assert list(deltas(talk().send(pcm([0.2]))).values()) == ["w20"]


def test_a_client_that_declares_nothing_sends_24_khz() -> None:
    started = undeclared()
    events = started.send(append([0.2, 0.3], 24_000), COMMIT)
    assert started.configs == [SessionConfig(AudioFormat(sample_rate_hz=24_000), endpoint_silence_ms=500)]
    assert "session.updated" not in kinds(events)
    assert (completed(events), events[-1]["usage"]["seconds"]) == (["w20 w30"], 0.8)


def test_settings_may_change_until_the_audio_begins() -> None:
    started = undeclared()
    changed = started.send(
        update(format={"type": "audio/pcm", "rate": 16_000}),
        update(turn_detection={"type": "server_vad", "silence_duration_ms": 700, "threshold": 0.4}),
        update(transcription={"model": "whisper-1", "language": "en", "delay": "medium"}),
    )
    assert changed[-1]["session"]["audio"]["input"] == {
        "format": {"type": "audio/pcm", "rate": 16_000},
        "noise_reduction": None,
        "transcription": {"model": "fake", "delay": "medium"},
        "turn_detection": {"type": "server_vad", "silence_duration_ms": 700},
    }
    assert started.configs[-1] == SessionConfig(AudioFormat(), 480, endpoint_silence_ms=700)
    events = started.send(append([0.2], 16_000), update(format={"rate": 24_000}), update(include=[LOGPROBS]))
    assert kinds(events)[1:] == [DELTA, "error", "session.updated"]
    assert events[2]["error"]["code"] == "session_already_declared"
    assert events[3]["session"]["audio"] == changed[-1]["session"]["audio"]
    assert len(started.configs) == 3


def test_turn_detection_may_end_in_mid_stream() -> None:
    started = talk()
    started.send(append([0.2]))
    assert kinds(started.send(update(turn_detection=None), append([0, 0.3]))) == ["session.updated", DELTA]
    assert completed(started.send(COMMIT)) == ["w20 w30"]


@pytest.mark.parametrize(("delay", "lookahead_ms"), [("minimal", 0), ("high", 1_040), ("xhigh", None)])
def test_a_delay_is_a_look_ahead(delay: str, lookahead_ms: int | None) -> None:
    started = undeclared()
    started.send(update(transcription={"model": "gpt-realtime-whisper", "delay": delay}))
    assert started.configs[0].max_lookahead_ms == lookahead_ms
    assert started.dialect.take(json.dumps(append([0.2])))
    assert started.dialect.take(json.dumps(COMMIT)) == [Command.FLUSH, LookaheadChange(lookahead_ms)]


@pytest.mark.parametrize(
    ("detection", "silence_ms"),
    [
        ({"type": "server_vad", "silence_duration_ms": 100}, 240),
        ({"type": "server_vad", "silence_duration_ms": 20_000}, 10_000),
        ({"type": "semantic_vad"}, 800),
        ({"type": "semantic_vad", "eagerness": "low"}, 1_600),
    ],
)
def test_the_silence_that_commits(detection: dict[str, Any], silence_ms: int) -> None:
    started = undeclared()
    (updated,) = started.send(update(turn_detection=detection))
    assert started.configs[0].endpoint_silence_ms == silence_ms
    assert updated["session"]["audio"]["input"]["turn_detection"]["type"] == detection["type"]


@pytest.mark.parametrize(("kind", "name"), [("audio/pcmu", "g711_ulaw"), ("audio/pcma", "g711_alaw")])
def test_the_audio_of_a_telephone(kind: str, name: str) -> None:
    up, down = {"audio/pcmu": (b"\x80", b"\x00"), "audio/pcma": (b"\xaa", b"\x2a")}[kind]  # full scale, up and down
    for declared in (
        update(format={"type": kind}),
        {"type": "transcription_session.update", "session": {"input_audio_format": name}},
    ):
        started = undeclared()
        started.send(declared)
        assert started.configs[0].audio == AudioFormat(sample_rate_hz=8_000)
        audio = base64.b64encode((8 * up + 8 * down) * 200).decode()
        events = started.send({"type": "input_audio_buffer.append", "audio": audio}, COMMIT)
        (transcript,) = completed(events)
        assert int(transcript[1:]) > 90
        assert events[-1]["usage"]["seconds"] == 0.4


def test_words_may_come_with_their_probability() -> None:
    started = talk()
    (updated, _, delta, *_, last) = started.send(update(include=[LOGPROBS]), append([0.2, 0]))
    assert updated["session"]["include"] == [LOGPROBS]
    expected = [{"token": "w20", "bytes": list(b"w20"), "logprob": round(math.log(0.5), 4)}]
    assert delta["logprobs"] == last["logprobs"] == expected


def test_the_earlier_form_of_the_settings() -> None:
    started = undeclared()
    session = {
        "input_audio_format": "pcm16",
        "input_audio_transcription": {"model": "gpt-4o-transcribe", "language": "en", "prompt": ""},
        "input_audio_noise_reduction": {"type": "near_field"},
        "turn_detection": None,
        "include": [LOGPROBS],
    }
    (updated,) = started.send({"type": "transcription_session.update", "session": session})
    assert updated == {
        "type": "transcription_session.updated",
        "event_id": "event_2",
        "session": {
            "object": "realtime.transcription_session",
            "id": "id-1",
            "input_audio_format": "pcm16",
            "input_audio_transcription": {"model": "fake"},
            "turn_detection": None,
            "include": [LOGPROBS],
        },
    }
    assert completed(started.send(append([0.2, 0.2], 24_000), COMMIT)) == ["w20 w20"]


def test_the_end_of_the_session_ends_the_item() -> None:
    dialect = Transcriptions.begin({})
    dialect.greeting("id-1", {"model": "fake"})
    assert dialect.say(SessionUpdated({}, 0)) == dialect.say(SessionClosed(0, 0)) == []
    dialect.say(TranscriptDelta(0, " hello", 0, 300, 400, 0, False, (Word("hello", 0, 300, 0.9),)))
    assert completed(told(dialect.say(SessionClosed(0, 400)))) == ["hello"]


def test_an_error_names_the_event_that_caused_it() -> None:
    started = talk()
    refusals = [_refused(started, json.dumps({"type": "x", **event})) for event in ({}, {"event_id": "mine"})]
    named = told([frame for refusal in refusals for frame in started.dialect.say(refusal)])
    assert [error["error"]["event_id"] for error in named] == [None, "mine"]
    _, error = started.send({"type": "response.create"}, {"type": "response.create", "event_id": "mine"})
    assert error["error"] == {
        "type": "invalid_request_error",
        "code": "unknown_event",
        "message": error["error"]["message"],
        "param": None,
        "event_id": "mine",
    }
    assert started.send("{")[0]["error"]["event_id"] is None
    (answer,) = started.dialect.say(_refused(started, '{"type": "x", "event_id": "\\ud800"}'))
    assert json.loads(answer.encode())["error"]["event_id"] == "?"  # half a character is none
    (failed,) = told(started.dialect.say(ErrorEvent(0, "server_shutdown", "connect again in a while")))
    assert failed["error"]["type"] == "server_error"


def _refused(started: Talk, frame: str) -> ErrorEvent:
    with pytest.raises(DragomanError) as caught:
        started.dialect.take(frame)
    return ErrorEvent(0, caught.value.code, str(caught.value))


@pytest.mark.parametrize(
    ("event", "code", "named"),
    [
        ({"type": "conversation.item.create", "item": {}}, "unknown_event", "'conversation.item.create'"),
        ({"type": ["x"]}, "unknown_event", "['x']"),
        ({**COMMIT, "now": True}, "unknown_field", "'now'"),
        ({"type": "input_audio_buffer.append", "audio": "%"}, "invalid_value", "base64"),
        ({"type": "input_audio_buffer.append", "audio": 5}, "invalid_value", "audio is 5"),
        ({"type": "session.update", "session": {"type": "realtime"}}, "unsupported_session", "'realtime'"),
        ({"type": "session.update", "session": {"colour": 1}}, "unknown_field", "session has no field 'colour'"),
        (update(include=["x"]), "invalid_value", "session.include"),
        (update(include="x"), "invalid_value", "session.include"),
        (update(format={"type": "audio/opus"}), "unsupported_encoding", "send one of audio/pcm, audio/pcmu"),
        (update(format={"type": "audio/pcmu", "rate": 16_000}), "unsupported_rate", "audio/pcmu has 8000 Hz"),
        (update(format={"rate": 4_000}), "unsupported_rate", "4000"),
        (update(format={"rate": "24000"}), "invalid_value", "session.audio.input.format.rate"),
        (update(turn_detection={"type": "x"}), "invalid_value", "choose one of server_vad, semantic_vad"),
        (update(turn_detection={"type": "semantic_vad", "eagerness": "x"}), "invalid_value", "eagerness"),
        (update(turn_detection=5), "invalid_value", "session.audio.input.turn_detection is 5"),
        (update(transcription={"delay": "none"}), "invalid_value", "transcription.delay is 'none'"),
        (
            {"type": "transcription_session.update", "session": {"input_audio_format": "mp3"}},
            "unsupported_encoding",
            "session.input_audio_format is 'mp3'",
        ),
        (
            {"type": "transcription_session.update", "session": {"turn_detection": {"colour": 1}}},
            "unknown_field",
            "session.turn_detection has no field 'colour'",
        ),
    ],
)
def test_what_a_client_can_get_wrong(event: dict[str, Any], code: str, named: str) -> None:
    with pytest.raises(DragomanError) as caught:
        talk().dialect.take(json.dumps(event))
    assert caught.value.code == code
    assert named in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_conversation_is_refused_at_the_address() -> None:
    with pytest.raises(DragomanError) as caught:
        Transcriptions.begin({"intent": "conversation"})
    assert caught.value.code == "unsupported_session"
