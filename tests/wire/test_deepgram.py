import hashlib
from typing import Any

import numpy as np
import pytest

from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, SessionClosed, SessionUpdated, TranscriptDelta, Word
from streaming.messages import Command, LookaheadChange
from streaming.session import SessionConfig
from tests.fakes import pcm
from tests.wire.fake_engine import Talk, told
from wire.deepgram import Deepgram

RAW = {"encoding": "linear16", "sample_rate": "16000"}


def talk(**query: str) -> Talk:
    return Talk(Deepgram.begin({**RAW, **query}))


def results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["type"] == "Results"]


def transcripts(messages: list[dict[str, Any]]) -> list[str]:
    return [message["channel"]["alternatives"][0]["transcript"] for message in results(messages)]


def test_the_address_declares_the_session() -> None:
    started = talk(model="nova-3", channels="2", language="en-US", interim_results="true", endpointing="300")
    assert started.configs == [SessionConfig(AudioFormat("s16le", 16_000, 2), endpoint_silence_ms=300)]
    assert started.greeting == started.opening == []


@pytest.mark.parametrize(
    ("query", "silence_ms"),
    [
        ({}, 240),
        ({"endpointing": "10"}, 240),
        ({"endpointing": "true"}, 240),
        ({"endpointing": "500"}, 500),
        ({"endpointing": "20000"}, 10_000),
        ({"endpointing": "false"}, 10_000),
        ({"endpointing": "300", "utterance_end_ms": "1000"}, 1_000),
    ],
)
def test_the_silence_that_ends_a_segment(query: dict[str, str], silence_ms: int) -> None:
    assert talk(**query).configs[0].endpoint_silence_ms == silence_ms


def test_a_result_has_words_with_their_times() -> None:
    (result,) = results(talk().send(pcm([0.2])))
    assert result == {
        "type": "Results",
        "channel_index": [0, 1],
        "start": 0.0,
        "duration": 0.4,
        "is_final": True,
        "speech_final": False,
        "from_finalize": False,
        "channel": {
            "alternatives": [
                {
                    "transcript": "w20",
                    "confidence": 0.5,
                    "words": [{"word": "w20", "start": 0.0, "end": 0.4, "confidence": 0.5}],
                }
            ]
        },
        "metadata": {
            "request_id": "id-1",
            "model_info": {"name": "fake", "version": "", "arch": "fastconformer"},
            "model_uuid": result["metadata"]["model_uuid"],
        },
    }


def test_results_are_about_parts_of_the_audio_without_a_gap() -> None:
    started = talk()
    told_of = results(started.send(pcm([0.2, 0.3, 0, 0, 0.4]), {"type": "Finalize"}, pcm([0.5]), {"type": "Finalize"}))
    ends = [round(result["start"] + result["duration"], 3) for result in told_of]
    assert [result["start"] for result in told_of] == [0.0, *ends[:-1]]
    assert ends[-1] == 2.4


def test_a_pause_makes_the_speech_final_unless_nobody_waits_for_it() -> None:
    assert [r["speech_final"] for r in results(talk().send(pcm([0.2, 0, 0.3])))] == [False, True, False]
    assert not any(r["speech_final"] for r in results(talk(endpointing="false").send(pcm([0.2, 0, 0.3]))))


def test_finalize_is_answered_when_all_before_it_is_told() -> None:
    started = talk()
    audio = pcm([0.2, 0.3, 0.4])
    assert transcripts(started.send(audio[:-3_200])) == ["w20", "w30"]
    finalized = started.send({"type": "Finalize"})
    assert transcripts(finalized) == ["w40"]
    assert [result["from_finalize"] for result in finalized] == [True]
    again = started.send({"type": "Finalize", "channel": 0})
    assert transcripts(again) == [""]
    assert [(r["from_finalize"], r["duration"]) for r in again] == [(True, 0.0)]


def test_only_the_last_result_before_the_answer_is_from_finalize() -> None:
    told_together = talk().together(pcm([0.2, 0.3]), {"type": "Finalize"}, pcm([0.4]), {"type": "Finalize"})
    assert transcripts(told_together) == ["w20", "w30", "w40"]
    assert [result["from_finalize"] for result in told_together] == [False, True, True]


def test_nothing_is_lost_when_an_error_comes_before_the_answer() -> None:
    dialect = Deepgram.begin(RAW)
    dialect.greeting("id-1", {"model": "fake"})
    dialect.say(SessionUpdated({}, 0))
    assert dialect.take('{"type": "Finalize"}') == [Command.FLUSH, LookaheadChange(None)]
    delta = TranscriptDelta(0, " hello", 0, 300, 400, 0, False, (Word("hello", 0, 300, 0.9),))
    assert dialect.say(delta) == []
    result, error = told(dialect.say(ErrorEvent(0, "internal_error", "the server failed: connect again")))
    assert (transcripts([result]), result["from_finalize"]) == (["hello"], False)
    assert error == {
        "type": "Error",
        "variant": "internal_error",
        "code": "internal_error",
        "description": "the server failed: connect again",
    }


def test_starts_and_ends_of_speech() -> None:
    kinds = [m["type"] for m in talk(vad_events="true", utterance_end_ms="1000").send(pcm([0.2, 0.3, 0, 0, 0.4]))]
    assert kinds == ["SpeechStarted", "Results", "Results", "Results", "Results", "SpeechStarted", "Results"]
    dialect = Deepgram.begin({**RAW, "utterance_end_ms": "1000", "vad_events": "true"})
    dialect.greeting("id-1", {"model": "fake"})
    delta = TranscriptDelta(0, " hello", 120, 300, 1_400, 0, True, (Word("hello", 120, 300, 0.9),))
    started, _, ended = told(dialect.say(delta))
    assert started == {"type": "SpeechStarted", "channel": [0], "timestamp": 0.12}
    assert ended == {"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": 0.3}


def test_words_have_a_second_form_where_punctuation_is_asked_for() -> None:
    for query in ({"punctuate": "true"}, {"smart_format": "true"}):
        (result,) = talk(**query).send(pcm([0.2]))
        assert result["channel"]["alternatives"][0]["words"][0]["punctuated_word"] == "w20"


@pytest.mark.parametrize("last", [{"type": "CloseStream"}, b""])
def test_the_end_tells_the_last_words_and_what_there_was(last: dict[str, Any] | bytes) -> None:
    audio = pcm([0.2, 0.3])
    *before, metadata = talk().send({"type": "KeepAlive"}, audio[:-2_000], audio[-2_000:], last)
    assert transcripts(before) == ["w20", "w30"]
    assert metadata["created"].endswith("Z")
    assert metadata == {
        "type": "Metadata",
        "transaction_key": "deprecated",
        "request_id": "id-1",
        "sha256": hashlib.sha256(audio).hexdigest(),
        "created": metadata["created"],
        "duration": 0.8,
        "channels": 1,
    }


def test_the_audio_of_a_telephone() -> None:
    samples = np.frombuffer(pcm([0.2, 0.4], 8_000), "<i2").astype(np.float64) / 32_768
    companded = np.sign(samples) * np.log1p(255 * np.abs(samples)) / np.log1p(255)
    codes = np.where(companded < 0, 0x80, 0) | np.minimum(np.abs(companded) * 128, 127).astype(int)
    started = talk(encoding="mulaw", sample_rate="8000")
    assert started.configs[0].audio == AudioFormat("s16le", 8_000)
    heard = transcripts(started.send((codes ^ 0xFF).astype(np.uint8).tobytes(), {"type": "CloseStream"}))
    assert [abs(int(word[1:]) - level) <= 2 for word, level in zip(heard, (20, 40), strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("query", "code", "named"),
    [
        ({"encoding": "opus"}, "unsupported_encoding", "'opus': send raw audio, as one of linear16, linear32, mulaw"),
        ({"sample_rate": "4000"}, "unsupported_rate", "4000"),
        ({"sample_rate": "16k"}, "invalid_value", "sample_rate is '16k'"),
        ({"sample_rate": "1" * 10}, "invalid_value", "sample_rate"),
        ({"sample_rate": "²"}, "invalid_value", "sample_rate"),
        ({"channels": "9"}, "unsupported_channels", "9"),
        ({"endpointing": "soon"}, "invalid_value", "endpointing is 'soon'"),
        ({"vad_events": "1"}, "invalid_value", "vad_events is '1'"),
        ({"diarize": "true"}, "unsupported_feature", "diarize is not there"),
        ({"multichannel": "true"}, "unsupported_feature", "multichannel"),
        ({"colour": "red"}, "unknown_field", "'colour'"),
    ],
)
def test_an_address_that_cannot_be_used(query: dict[str, str], code: str, named: str) -> None:
    with pytest.raises(DragomanError) as caught:
        talk(**query)
    assert caught.value.code == code
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "code"), [("encoding", "unsupported_encoding"), ("sample_rate", "unsupported_rate")]
)
def test_what_an_address_must_have(missing: str, code: str) -> None:
    with pytest.raises(DragomanError) as caught:
        Deepgram.begin({name: value for name, value in RAW.items() if name != missing})
    assert caught.value.code == code


def test_what_is_not_there_may_be_asked_not_to_be_done() -> None:
    assert transcripts(talk(diarize="false", numerals="false").send(pcm([0.2]))) == ["w20"]


@pytest.mark.parametrize(
    ("frame", "variant", "named"),
    [
        ("Finalize", "SchemaError", "not JSON"),
        ("[]", "SchemaError", "a JSON object"),
        ('{"type": "Flush"}', "SchemaError", "'Flush': send KeepAlive, Finalize or CloseStream"),
    ],
)
def test_a_message_that_cannot_be_used(frame: str, variant: str, named: str) -> None:
    started = talk()
    (error,) = started.send(frame)
    assert (error["type"], error["variant"]) == ("Error", variant)
    assert named in error["description"]
    assert transcripts(started.send(pcm([0.2]))) == ["w20"]


def test_configure_is_refused_as_deepgram_refuses_it() -> None:
    (failure,) = talk().send({"type": "Configure", "keyterms": ["Dragoman"]})
    assert (failure["type"], failure["request_id"]) == ("ConfigureFailure", "id-1")
    assert failure["code"] == "CONFIGURE_KEYTERMS_NOT_SUPPORTED"
    assert "connect again" in failure["description"]


def test_the_end_of_nothing() -> None:
    dialect = Deepgram.begin(RAW)
    dialect.greeting("id-1", {"model": "fake"})
    (metadata,) = told(dialect.say(SessionClosed(0, 0)))
    assert metadata["sha256"] == hashlib.sha256(b"").hexdigest()
