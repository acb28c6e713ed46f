import json
from typing import Any

import pytest

from streaming.errors import DragomanError
from streaming.session import SessionConfig
from tests.fakes import pcm
from tests.wire.fake_engine import Talk
from wire.simulstream import Simulstream

END = {"end_of_stream": True}


def talk(**query: str) -> Talk:
    return Talk(Simulstream.begin(query))


def text(messages: list[dict[str, Any]]) -> str:
    assert all(message["deleted"] == "" for message in messages if "new" in message)
    return "".join(message.get("new", "") for message in messages)


def test_a_translation_from_the_settings_to_the_end() -> None:
    started = talk(latency="low")
    settings = {
        "sample_rate": 16_000,
        "source_lang": "en",
        "target_lang": "de",
        "metrics_metadata": {"wav_name": "talk.wav"},
    }
    assert started.greeting == started.send(settings) == []
    assert started.send(pcm([0.2])) == [{"new": " de20", "deleted": ""}]
    assert started.configs == [SessionConfig(languages=("de",), latency="low")]
    *last, end = started.send(pcm([0, 0.3]), END)
    assert text(last) == " de30"
    assert end == {"end_of_processing": True}


@pytest.mark.parametrize("settings", [[], [{"source_lang": "en"}], [{"target_lang": "en"}, {"source_lang": "en"}]])
def test_without_another_language_it_is_the_transcript(settings: list[dict[str, Any]]) -> None:
    assert text(talk().send(*settings, pcm([0.2, 0.3]), END)) == " w20 w30"


def test_settings_may_come_one_by_one_until_the_audio_begins() -> None:
    started = talk()
    started.send({"target_lang": "es"}, {"sample_rate": 8_000})
    heard = text(started.send(pcm([0.2], 8_000), {"target_lang": "es"}))
    (told,) = started.send({"target_lang": "de"})
    assert told["error"]["code"] == "session_already_declared"
    assert heard + text(started.send(pcm([0.3], 8_000), END)) == " es20 es30"


def test_nothing_has_an_end_too() -> None:
    assert talk().send(END) == [{"end_of_processing": True}]


@pytest.mark.parametrize(
    ("frame", "code", "named"),
    [
        ("[]", "invalid_json", "a JSON object"),
        ('{"sample_rate": "16k"}', "invalid_value", "sample_rate is '16k'"),
        ('{"sample_rate": 4000}', "unsupported_rate", "4000"),
        ('{"target_lang": ["de"]}', "invalid_value", "target_lang"),
        ('{"colour": "red"}', "unknown_field", "the message has no field 'colour'"),
    ],
)
def test_what_a_client_can_get_wrong(frame: str, code: str, named: str) -> None:
    with pytest.raises(DragomanError) as caught:
        talk().dialect.take(frame)
    assert caught.value.code == code
    assert named in str(caught.value)
    (message,) = talk().send(frame)
    assert json.loads(json.dumps(message)) == {"error": {"code": code, "message": str(caught.value)}}


@pytest.mark.parametrize(
    ("query", "code"), [({"latency": "soon"}, "unsupported_latency"), ({"model": "x"}, "unknown_field")]
)
def test_an_address_that_cannot_be_used(query: dict[str, str], code: str) -> None:
    with pytest.raises(DragomanError) as caught:
        Simulstream.begin(query)
    assert caught.value.code == code
