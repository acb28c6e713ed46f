import json
from typing import Any

import pytest

from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import SessionClosed, SessionResumed
from streaming.messages import Resume
from streaming.session import SessionConfig
from wire.translations import Translations, parse_message, parse_resume


def update(**session: Any) -> str:
    return json.dumps({"type": "session.update", "session": session})


def test_settings_of_a_session() -> None:
    fmt = {"type": "audio/pcm", "rate": 8_000, "channels": 2, "encoding": "f32le"}
    text = update(
        audio={"input": {"format": fmt}, "output": {"languages": ["es", "de", "es"]}},
        max_lookahead_ms=480,
        decoder="ctc",
        endpoint_silence_ms=500,
        latency="low-medium",
        glossary={"graphics card": {"de": "Grafikkarte"}},
    )
    assert parse_message(text) == SessionConfig(
        AudioFormat("f32le", 8_000, 2),
        480,
        "ctc",
        500,
        languages=("es", "de"),
        latency="low-medium",
        glossary={"graphics card": {"de": "Grafikkarte"}},
    )
    for output in ({"language": "es"}, {"languages": ["es"]}, {"language": "es", "languages": None}):
        message = parse_message(update(audio={"output": output}))
        assert isinstance(message, SessionConfig)
        assert message.languages == ("es",)
    defaults = SessionConfig(AudioFormat(sample_rate_hz=24_000))
    nothing = {"audio": {"output": {"languages": []}}, "latency": None, "glossary": None}
    for empty in (
        '{"type": "session.update"}',
        update(),
        update(audio=None),
        update(audio={"input": {}}),
        update(audio={"input": {"transcription": {"model": "whisper-1"}, "noise_reduction": {"type": "near_field"}}}),
        update(**nothing),
    ):
        assert parse_message(empty) == defaults


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("", "invalid_json", "JSON"),
        (update(glossary={"\ud800": {"es": "x"}}), "invalid_json", "surrogates not allowed"),
        ("null", "unknown_event", "None"),
        ('{"type": ["session.close"]}', "unknown_event", "session.close"),
        ('{"type": "session.close", "now": 1}', "unknown_field", "'now'"),
        ('{"type": "session.input_audio_buffer.append", "audio": 5}', "invalid_value", "audio"),
        ('{"type": "session.input_audio_buffer.append", "audio": "é"}', "invalid_value", "base64"),
        (update(colour="red"), "unknown_field", "session has no field 'colour'"),
        (update(audio={"input": {"rate": 1}}), "unknown_field", "session.audio.input has no field 'rate'"),
        (update(audio=[1]), "invalid_value", "session.audio is"),
        (update(audio={"input": {"format": {"rate": "16000"}}}), "invalid_value", "format.rate"),
        (update(audio={"input": {"format": {"rate": True}}}), "invalid_value", "format.rate"),
        (update(audio={"input": {"format": {"rate": 4_000}}}), "unsupported_rate", "4000"),
        (update(audio={"input": {"format": {"channels": 9}}}), "unsupported_channels", "9"),
        (update(audio={"input": {"format": {"encoding": "x"}}}), "unsupported_encoding", "x"),
        (update(audio={"input": {"format": {"type": "audio/pcmu"}}}), "unsupported_encoding", "audio/pcmu"),
        (update(audio={"output": {"languages": "es"}}), "invalid_value", "session.audio.output.languages is 'es'"),
        (update(audio={"output": {"languages": [["es"]]}}), "invalid_value", "it must be a list of languages"),
        (update(audio={"output": {"language": ["es"]}}), "invalid_value", "session.audio.output.language is"),
        (update(audio={"output": {"language": "es", "languages": ["de"]}}), "invalid_value", "send one of them"),
        (update(audio={"output": {"voice": "x"}}), "unknown_field", "session.audio.output has no field 'voice'"),
        (update(latency=2), "invalid_value", "session.latency is 2"),
        (update(latency="slow"), "unsupported_latency", "choose one of low, low-medium, medium, medium-high, high"),
        (update(glossary=["firmware"]), "bad_glossary", "it is an object of terms"),
        (update(glossary={"firmware": "es"}), "bad_glossary", "'firmware' has to be an object of languages"),
        (update(glossary={"firmware": {"es": 1}}), "bad_glossary", "needs terms of 1 to 8 words, not 1"),
        (update(max_lookahead_ms=1.5), "invalid_value", "session.max_lookahead_ms"),
        (update(**{"x" * 1000: 1}), "unknown_field", "xxx..."),
    ],
)
def test_what_a_client_can_get_wrong(text: str, code: str, named: str) -> None:
    with pytest.raises(DragomanError) as caught:
        parse_message(text)
    assert caught.value.code == code
    assert named in str(caught.value)
    assert len(str(caught.value)) < 300


def test_how_a_session_is_asked_for_again() -> None:
    text = json.dumps({"type": "session.resume", "event_id": "e1", "token": "abc", "seq": 7})
    assert parse_resume(text) == Resume("abc", 7)
    assert parse_resume('{"type": "session.resume", "token": "abc"}') == Resume("abc", -1)
    assert Translations.begin({"resume": "an id", "model": "x"}).take(text) == [Resume("abc", 7)]
    assert Translations.begin({"model": "x"}).resumes is None


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\0\0", "resume_expected"),
        ("[]", "invalid_json"),
        ("{}", "resume_expected"),
        ('{"type": "session.resume", "id": 1}', "unknown_field"),
        ('{"type": "session.resume", "token": 1}', "invalid_value"),
        ('{"type": "session.resume", "seq": "1"}', "invalid_value"),
        ('{"type": "session.resume", "seq": true}', "invalid_value"),
    ],
)
def test_how_it_can_be_asked_for_wrongly(frame: str | bytes, code: str) -> None:
    with pytest.raises(DragomanError) as caught:
        Translations.begin({"resume": "an id"}).take(frame)
    assert caught.value.code == code


def test_events_are_numbered_but_for_the_one_that_says_where_it_goes_on() -> None:
    dialect = Translations()
    (created,) = dialect.greeting("an id", {"model": "x"})
    assert json.loads(created) == {"type": "session.created", "seq": 0, "session": {"id": "an id", "model": "x"}}
    (resumed,) = dialect.say(SessionResumed(0, 3, 640))
    assert json.loads(resumed) == {"type": "session.resumed", "seq": 0, "messages": 3, "audio_bytes": 640}
    (closed,) = dialect.say(SessionClosed(99, 20))
    assert json.loads(closed)["seq"] == 1
