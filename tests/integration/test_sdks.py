"""Clients that are not ours, as their makers publish them, against a service process."""

import asyncio
import base64
import json
import subprocess
import sys
import wave
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
import soxr
from websockets.exceptions import InvalidStatus

from models.checkpoint import load_recognizer
from streaming import scheduler
from streaming.audio import AudioFormat
from streaming.events import TranscriptDelta
from streaming.session import Session, SessionConfig
from tests.fakes import FakeSession, fake_tick, pcm, running_service
from tests.integration.service import EMBEDDED, FAKE, ROOT, running

# These packages were written for an earlier websockets.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

COMPLETED = "conversation.item.input_audio_transcription.completed"
DELTA = "conversation.item.input_audio_transcription.delta"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A service without models."""
    with running(FAKE) as host:
        yield host


@pytest.fixture(scope="module")
def embedded() -> Iterator[str]:
    """A service with the models of the repository."""
    with running(EMBEDDED) as host:
        yield host


def speech(rate_hz: int) -> bytes:
    samples, own_rate_hz = soundfile.read(ROOT / "samples" / "jfk.flac", dtype="float32")
    return (soxr.resample(samples, own_rate_hz, rate_hz) * 32_767).astype("<i2").tobytes()


def transcript(audio: bytes, rate_hz: int) -> str:
    """What the embedded model hears, without a service."""
    session = Session(load_recognizer(), SessionConfig(AudioFormat(sample_rate_hz=rate_hz)))
    events = [*session.push(audio), *session.finish()]
    return "".join(event.delta for event in events if isinstance(event, TranscriptDelta)).strip()


def pieces(audio: bytes, size_bytes: int = 9_600) -> Iterable[bytes]:
    return (audio[start : start + size_bytes] for start in range(0, len(audio), size_bytes))


# -------------------------------------------------------------------------------------------------------- openai


def openai_client(address: str, **options: Any) -> Any:
    openai = pytest.importorskip("openai")
    kind = openai.AsyncOpenAI if options.pop("is_async", False) else openai.OpenAI
    return kind(**{"api_key": "none", "base_url": f"http://{address}/v1", **options})


def is_whole(event: Any) -> bool:
    """Whether an event has all that OpenAI's types ask of one."""
    from openai.types.realtime import RealtimeServerEvent
    from pydantic import TypeAdapter

    given = event.to_dict()
    checked: Any = TypeAdapter(RealtimeServerEvent).validate_python(given)
    return bool(checked.type == given["type"])


def append_all(connection: Any, audio: bytes) -> None:
    for piece in pieces(audio):
        connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())


def until(connection: Any, kind: str) -> list[Any]:
    """The events up to the first of a type."""
    events = []
    for event in connection:
        events.append(event)
        if event.type == kind:
            return events
    pytest.fail(f"the connection closed before {kind}: {events}")


def text_of(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == DELTA)


def test_openai_transcribes_as_the_speaker_pauses(address: str) -> None:
    client = openai_client(address)
    with client.realtime.connect(model="gpt-4o-transcribe", extra_query={"intent": "transcription"}) as connection:
        assert connection.recv().type == "session.created"
        detection = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 300}
        transcription = {"model": "gpt-4o-transcribe", "language": "en", "prompt": "names"}
        audio_input = {
            "format": {"type": "audio/pcm", "rate": 24_000},
            "transcription": transcription,
            "turn_detection": detection,
            "noise_reduction": {"type": "near_field"},
        }
        connection.session.update(session={"type": "transcription", "audio": {"input": audio_input}})
        updated = connection.recv()
        assert updated.session.audio.input.turn_detection.silence_duration_ms == 300
        append_all(connection, pcm([0.2, 0.3, 0, 0, 0.4, 0, 0], 24_000))
        first, second = until(connection, COMPLETED), until(connection, COMPLETED)
    assert [event.type for event in first] == [
        "input_audio_buffer.speech_started",
        DELTA,
        DELTA,
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        COMPLETED,
    ]
    assert [events[-1].transcript for events in (first, second)] == ["w20 w30", "w40"]
    assert all(is_whole(event) for event in (updated, *first, *second))
    assert second[-2].previous_item_id == first[-1].item_id


def test_openai_commits_itself(address: str) -> None:
    client = openai_client(address)
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        until(connection, "session.created")
        audio_input = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
        connection.session.update(session={"type": "transcription", "audio": {"input": audio_input}})
        until(connection, "session.updated")
        append_all(connection, pcm([0.2, 0.3, 0], 16_000))
        connection.input_audio_buffer.commit()
        append_all(connection, pcm([0.4, 0], 16_000))
        connection.input_audio_buffer.commit()
        events = until(connection, COMPLETED) + until(connection, COMPLETED)
        connection.input_audio_buffer.append(audio=base64.b64encode(pcm([0.5, 0], 16_000)).decode())
        connection.input_audio_buffer.clear()
        assert until(connection, "input_audio_buffer.cleared")
        connection.input_audio_buffer.commit(event_id="empty")
        (error,) = until(connection, "error")
    assert [event.transcript for event in events if event.type == COMPLETED] == ["w20 w30", "w40"]
    assert (error.error.code, error.error.event_id) == ("input_audio_buffer_commit_empty", "empty")
    assert all(is_whole(event) for event in (*events, error))


@pytest.mark.parametrize(
    "audio_input",
    [
        {"format": {"type": "audio/pcmu"}, "turn_detection": None},
        {"format": {"type": "audio/pcma"}, "turn_detection": {"type": "semantic_vad", "eagerness": "high"}},
        {"transcription": {"model": "gpt-realtime-whisper", "delay": "minimal"}},
    ],
)
def test_openai_is_told_its_settings(address: str, audio_input: dict[str, Any]) -> None:
    with openai_client(address).realtime.connect(extra_query={"intent": "transcription"}) as connection:
        session = {"type": "transcription", "audio": {"input": audio_input}}
        session["include"] = ["item.input_audio_transcription.logprobs"]
        connection.session.update(session=session)
        events = until(connection, "session.updated")
    assert all(is_whole(event) for event in events)
    told = events[-1].session.to_dict()
    assert told["include"] == session["include"]
    for name, value in audio_input.items():
        shown = told["audio"]["input"][name]
        assert shown == value or (name == "transcription" and shown == {"model": "fake", "delay": "minimal"})


async def test_openai_with_asyncio_and_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "Session", FakeSession)
    monkeypatch.setattr(scheduler, "tick", fake_tick)
    async with running_service(tokens=("sesame",)) as url:
        address = url.split("/")[2]
        client = openai_client(address, api_key="sesame", is_async=True)
        async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            audio = base64.b64encode(pcm([0.2, 0.3, 0], 24_000)).decode()
            await connection.input_audio_buffer.append(audio=audio)
            await connection.input_audio_buffer.commit()
            async for event in connection:
                if event.type == COMPLETED:
                    assert event.transcript == "w20 w30"
                    break
        with pytest.raises(Exception, match="401"):
            async with openai_client(address, api_key="wrong", is_async=True).realtime.connect():
                pytest.fail("a stranger was let in")


def test_openai_s_beta_client(address: str) -> None:
    client = openai_client(address, websocket_base_url=f"ws://{address}/v1")
    with client.beta.realtime.connect(model="whisper-1", extra_query={"intent": "transcription"}) as connection:
        until(connection, "session.created")
        session = {
            "input_audio_format": "g711_ulaw",
            "input_audio_transcription": {"model": "whisper-1", "language": "en"},
            "turn_detection": None,
        }
        connection.transcription_session.update(session=session)
        updated = until(connection, "transcription_session.updated")[-1]
        assert updated.session.input_audio_format == "g711_ulaw"
        append_all(connection, (8 * b"\x80" + 8 * b"\x00") * 400)
        connection.input_audio_buffer.commit()
        completed = until(connection, COMPLETED)[-1]
    assert len(completed.transcript.split()) == 2


def test_openai_translates(address: str) -> None:
    client = openai_client(address)
    with client.realtime.translations.connect(model="gpt-realtime-translate") as connection:
        until(connection, "session.created")
        connection.session.update(session={"audio": {"output": {"language": "es"}}})
        for piece in pieces(pcm([0.2, 0.3, 0], 24_000)):
            connection.session.input_audio_buffer.append(audio=base64.b64encode(piece).decode())
        connection.session.close()
        events = until(connection, "session.closed")
    told = {
        kind: "".join(event.delta for event in events if event.type == f"session.{kind}_transcript.delta")
        for kind in ("input", "output")
    }
    assert told == {"input": " w20 w30", "output": " es20 es30"}


@pytest.mark.model
def test_openai_with_real_speech(embedded: str) -> None:
    client, audio = openai_client(embedded), speech(24_000)
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        connection.session.update(session={"type": "transcription", "audio": {"input": {"turn_detection": None}}})
        append_all(connection, audio)
        connection.input_audio_buffer.commit()
        events = until(connection, COMPLETED)
    assert events[-1].transcript == text_of(events) == transcript(audio, 24_000)
    assert events[-1].usage.seconds == pytest.approx(11, abs=0.1)


# ------------------------------------------------------------------------------------------------------ deepgram


def deepgram_client(address: str, *, is_async: bool = False, **secret: str) -> Any:
    deepgram = pytest.importorskip("deepgram")
    from deepgram.environment import DeepgramClientEnvironment

    http, ws = f"http://{address}", f"ws://{address}"
    environment = DeepgramClientEnvironment(base=http, production=ws, agent=ws, agent_rest=http)
    kind = deepgram.AsyncDeepgramClient if is_async else deepgram.DeepgramClient
    return kind(**(secret or {"api_key": "none"}), environment=environment)


def checked(message: Any) -> Any:
    """The message, read once more by its type, which refuses one that is not whole."""
    return type(message).model_validate(json.loads(message.model_dump_json()))


def results_text(messages: list[Any]) -> str:
    """What a client writes down: the transcripts that are final, with spaces between."""
    results = [message for message in messages if message.type == "Results" and message.is_final]
    said = (result.channel.alternatives[0].transcript for result in results)
    return " ".join(text for text in said if text)


def test_deepgram_listens(address: str) -> None:
    client = deepgram_client(address)
    asked: dict[str, Any] = {"encoding": "linear16", "sample_rate": 16_000, "channels": 1, "language": "en-US"}
    asked |= {"interim_results": True, "smart_format": True, "vad_events": True, "endpointing": 300}
    with client.listen.v1.connect(model="nova-3", **asked) as connection:
        connection.send_keep_alive()
        for piece in pieces(pcm([0.2, 0.3, 0, 0.4], 16_000)[:-2_000]):
            connection.send_media(piece)
        connection.send_finalize()
        messages = []
        while not (messages and messages[-1].type == "Results" and messages[-1].from_finalize):
            messages.append(connection.recv())
        connection.send_media(pcm([0.5], 16_000))
        connection.send_close_stream()
        messages += list(connection)
    assert results_text(messages) == "w20 w30 w40 w50"
    assert [m.type for m in messages if m.type != "Results"] == ["SpeechStarted", "SpeechStarted", "Metadata"]
    assert [m.speech_final for m in messages if m.type == "Results"] == [False, False, True, False, False]
    assert all(checked(message) == message for message in messages)
    words = [word for m in messages if m.type == "Results" for word in m.channel.alternatives[0].words]
    assert [(word.start, word.end) for word in words][:2] == [(0.0, 0.4), (0.4, 0.8)]
    assert (messages[-1].duration, messages[-1].channels) == (pytest.approx(1.94, abs=0.01), 1)


async def test_deepgram_with_asyncio_and_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepgram.core.api_error import ApiError
    from deepgram.core.events import EventType

    monkeypatch.setattr(scheduler, "Session", FakeSession)
    monkeypatch.setattr(scheduler, "tick", fake_tick)
    async with running_service(tokens=("sesame",)) as url:
        address = url.split("/")[2]
        raw: dict[str, Any] = {"model": "nova-3", "encoding": "linear16", "sample_rate": 16_000}
        for secret in ({"api_key": "sesame"}, {"access_token": "sesame"}):
            messages: list[Any] = []
            client = deepgram_client(address, is_async=True, **secret)
            async with client.listen.v1.connect(**raw) as connection:
                connection.on(EventType.MESSAGE, messages.append)
                listening = asyncio.create_task(connection.start_listening())
                await connection.send_media(pcm([0.2, 0.3], 16_000))
                await connection.send_close_stream()
                await asyncio.wait_for(listening, 60)
            assert results_text(messages) == "w20 w30"
            assert messages[-1].type == "Metadata"
        with pytest.raises(ApiError, match="invalid credentials"):
            async with deepgram_client(address, is_async=True, api_key="wrong").listen.v1.connect(**raw):
                pytest.fail("a stranger was let in")


def test_deepgram_is_refused_what_is_not_there(address: str) -> None:
    client = deepgram_client(address)
    with pytest.raises(InvalidStatus) as caught:  # which the client hands on
        with client.listen.v1.connect(model="nova-3", encoding="linear16", sample_rate=16_000, diarize=True):
            pytest.fail("there is no diarization")
    assert caught.value.response.status_code == 400
    assert caught.value.response.body == b"diarize is not there: leave it out\n"


@pytest.mark.model
def test_deepgram_with_real_speech(embedded: str) -> None:
    client, audio = deepgram_client(embedded), speech(16_000)
    with client.listen.v1.connect(
        model="nova-3", encoding="linear16", sample_rate=16_000, endpointing="false"
    ) as connection:
        for piece in pieces(audio):
            connection.send_media(piece)
        connection.send_finalize()
        connection.send_close_stream()
        messages = list(connection)
    assert results_text(messages) == transcript(audio, 16_000)
    assert [message.from_finalize for message in messages[:-1]].count(True) == 1
    assert messages[-1].duration == pytest.approx(11, abs=0.1)


async def test_clients_side_by_side_get_what_is_theirs(address: str) -> None:
    async def openai_items(levels: Sequence[float]) -> list[str]:
        client = openai_client(address, is_async=True)
        items: list[str] = []
        async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            audio_input = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
            await connection.session.update(session={"type": "transcription", "audio": {"input": audio_input}})
            for level in levels:
                for piece in pieces(pcm([level, level], 16_000)):
                    await connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())
                await connection.input_audio_buffer.commit()
            async for event in connection:
                items += [event.transcript] if event.type == COMPLETED else []
                if len(items) == len(levels):
                    return items
        return items

    async def deepgram_finals(levels: Sequence[float]) -> list[str]:
        client = deepgram_client(address, is_async=True)
        finals: list[str] = []
        async with client.listen.v1.connect(model="any", encoding="linear16", sample_rate=16_000) as connection:
            for level in levels:
                await connection.send_media(pcm([level, level], 16_000)[:-2_000])
                await connection.send_finalize()
            await connection.send_close_stream()
            async for message in connection:
                if message.type == "Results":
                    assert message.from_finalize == (len(finals) % 2 == 1)
                    finals.append(message.channel.alternatives[0].transcript)
        return finals

    talks = [[(first + step) / 100 for step in range(6)] for first in (10, 20, 30)]
    async with asyncio.timeout(120):
        told = await asyncio.gather(*map(openai_items, talks), *map(deepgram_finals, talks))
    words = [[f"w{round(100 * level)}" for level in levels] for levels in talks]
    assert told[:3] == [[f"{word} {word}" for word in some] for some in words]
    assert told[3:] == [[word for word in some for _ in range(2)] for some in words]


# --------------------------------------------------------------------------------------------------- simulstream


def simulstream(address: str, recording: Path, *options: str, query: str = "") -> str:
    """Run simulstream's client for recordings; the text that it was told, as its log has it."""
    pytest.importorskip("simulstream")
    listed = recording.with_suffix(".txt")
    listed.write_text(f"{recording}\n")
    verbose = "import logging; logging.getLogger('simulstream.wav_reader_client').setLevel('DEBUG')"
    program = f"{verbose}; from simulstream.client.wav_reader_client import cli_main; cli_main()"
    uri = f"ws://{address}/v1/simulstream{query}"
    command = [sys.executable, "-c", program, "--uri", uri, "--wav-list-file", str(listed), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    told = [json.loads(line.split(" | ")[-1]) for line in result.stderr.splitlines() if "| DEBUG |" in line]
    assert told[-1] == {"end_of_processing": True}
    assert all(message["deleted"] == "" for message in told[:-1])
    return "".join(message["new"] for message in told[:-1])


def write_wav(path: Path, audio: bytes, rate_hz: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate_hz, 0, "NONE", ""))
        file.writeframes(audio)
    return path


def test_simulstream_translates_and_transcribes(address: str, tmp_path: Path) -> None:
    # Its client sends the last 100 ms once more, which here are silent.
    recording = write_wav(tmp_path / "talk.wav", pcm([0.2, 0.3, 0], 16_000), 16_000)
    translated = simulstream(address, recording, "--src-lang", "en", "--tgt-lang", "de", query="?latency=low")
    assert translated == " de20 de30"
    assert simulstream(address, recording) == " w20 w30"


@pytest.mark.model
def test_simulstream_with_real_speech(embedded: str, tmp_path: Path) -> None:
    audio = speech(16_000)
    heard = simulstream(embedded, write_wav(tmp_path / "jfk.wav", audio, 16_000))
    again = 2 * (len(audio) // 2 % 1_600 or 1_600)  # its client sends the last 100 ms once more
    assert heard.strip() == transcript(audio + audio[-again:], 16_000)
    translated = simulstream(embedded, tmp_path / "jfk.wav", "--src-lang", "en", "--tgt-lang", "es")
    assert len(translated.split()) > 5
