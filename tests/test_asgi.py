"""The service over ASGI, on the sockets of a real uvicorn: what `server` does, and recordings."""

import asyncio
import io
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin, Subprotocol

import server
from models.recognizer import Recognizer
from models.translator import AnyTranslator
from streaming import scheduler
from tests.completions import completions, plain_folder
from tests.fakes import FakeRecognizer, FakeSession, FakeTranslator, fake_tick, tone
from tests.integration.service import running as running_process
from tests.streaming.test_remote import planned
from tests.test_server import RATE_16K, errors, events_until_closed, pcm, send_event, talk, words

asgi, openai = (pytest.importorskip(name) for name in ("asgi", "openai"))
LEVELS = [0.1, 0.2, 0.3, 0.0, 0.4, 0.5]


pytestmark = pytest.mark.usefixtures("fake_sessions")


@asynccontextmanager
async def running(translator: object = None, **settings: Any) -> AsyncIterator[str]:
    """A service on a free port; gives its URL."""
    service = asgi.AsgiService(
        cast(Recognizer, FakeRecognizer()), server.Settings(port=0, **settings), cast(AnyTranslator, translator)
    )
    try:
        yield await service.start()
    finally:
        await service.stop()


def http(url: str) -> str:
    return url.removesuffix(server.PATH).replace("ws", "http", 1)


async def get(url: str, **headers: str) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


async def empty(url: str) -> None:
    """Wait until the service has no session."""
    async with asyncio.timeout(30):
        while json.loads((await get(f"{http(url)}/healthz"))[1])["sessions"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def wav(levels: list[float], rate_hz: int = 22_050, form: str = "WAV") -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, tone(levels, rate_hz), rate_hz, format=form)
    file.seek(0)
    file.name = f"talk.{form.lower()}"
    return file


def client(url: str, token: str = "none") -> Any:
    return openai.AsyncOpenAI(base_url=f"{http(url)}/v1", api_key=token, max_retries=0, timeout=60)


# --------------------------------------------------------------------------------------- what server does, too


async def test_a_session() -> None:
    audio = pcm(LEVELS)
    async with running() as url:
        events = await talk(url, audio)
    assert words(events) == " w10 w20 w30 w40 w50" and events[-1]["type"] == "session.closed"


async def test_a_session_of_another_dialect() -> None:
    async with running() as url:
        query = "/v1/listen?encoding=linear16&sample_rate=16000"
        async with connect(url.removesuffix(server.PATH) + query) as connection:
            await connection.send(pcm([0.1, 0.2]))
            await connection.send('{"type": "CloseStream"}')
            frames = [json.loads(frame) async for frame in connection]
        texts = [frame["channel"]["alternatives"][0]["transcript"] for frame in frames if frame["type"] == "Results"]
        assert "w10" in " ".join(texts) and "w20" in " ".join(texts)
        with pytest.raises(InvalidStatus) as refused:
            await connect(url.removesuffix(server.PATH) + "/v1/listen?encoding=opus").__aenter__()
        assert refused.value.response.status_code == 400


async def test_health_page_and_metrics() -> None:
    async with running(metrics=True, max_sessions=3) as url:
        for path in ("/healthz", "/readyz"):
            status, text = await get(http(url) + path)
            assert (status, json.loads(text)) == (200, {"status": "ok", "sessions": 0, "max_sessions": 3})
        assert "dragoman_max_sessions 3" in (await get(f"{http(url)}/metrics"))[1]
        assert "<html" in (await get(f"{http(url)}/"))[1]
        assert (await get(http(url) + server.PATH))[0] == 426
        status, text = await get(f"{http(url)}/v1/other")
        assert status == 404 and "connect to" in text


async def test_who_may_come_in() -> None:
    async with running(tokens=("sesame",), max_sessions=1) as url:
        for headers, origin, status in (
            ({}, None, 401),
            ({"Authorization": "Bearer sesam"}, None, 401),
            ({"Authorization": "Bearer sesame"}, "https://example.org", 403),
        ):
            with pytest.raises(InvalidStatus) as refused:
                await connect(
                    url, additional_headers=headers, origin=None if origin is None else Origin(origin)
                ).__aenter__()
            assert refused.value.response.status_code == status
        offered = [Subprotocol("dragoman.v1"), Subprotocol("dragoman.token.c2VzYW1l")]
        async with connect(url, subprotocols=offered) as connection:
            assert connection.subprotocol == "dragoman.v1"
            assert json.loads(await connection.recv())["type"] == "session.created"
            with pytest.raises(InvalidStatus) as refused:
                await connect(url, additional_headers={"Authorization": "Bearer sesame"}).__aenter__()
            assert refused.value.response.status_code == 503
            assert (await get(f"{http(url)}/readyz"))[0] == 503


async def test_a_message_that_is_too_large_ends_its_session() -> None:
    async with running() as url, connect(url) as connection:
        await connection.send(bytes(2 << 20))
        with pytest.raises(ConnectionClosed):
            while True:
                await connection.recv()
        assert connection.close_code == 1009


async def test_the_goodbye() -> None:
    async with running() as url:
        connection = await connect(url).__aenter__()
        await send_event(connection, "session.update", session=RATE_16K)
        await connection.send(pcm([0.1]))
        while json.loads(await connection.recv())["type"] != "session.input_transcript.delta":
            pass
    events = []
    with pytest.raises(ConnectionClosed):
        while True:
            events.append(json.loads(await connection.recv()))
    assert errors(events) == ["server_shutdown"] and connection.close_code == 1001


async def test_a_client_that_vanishes_leaves_its_place() -> None:
    async with running(max_sessions=1, resume_s=0.0) as url:
        connection = await connect(url).__aenter__()
        connection.transport.abort()
        await empty(url)
        assert words(await talk(url, pcm([0.1]))) == " w10"


async def test_a_session_goes_on_on_another_connection() -> None:
    async with running(max_sessions=1) as url:
        first = await connect(url).__aenter__()
        session = json.loads(await first.recv())["session"]
        await send_event(first, "session.update", session=RATE_16K)
        await first.send(pcm([0.1, 0.2]))
        events = [json.loads(await first.recv()) for _ in range(2)]
        assert words(events) == " w10"
        first.transport.abort()
        async with connect(f"{url}?resume={session['id']}") as second:
            await send_event(second, "session.resume", token=session["resume"]["token"], seq=2)
            assert json.loads(await second.recv())["type"] == "session.resumed"
            await second.send(pcm([0.3]))
            await send_event(second, "session.close")
            assert words(await events_until_closed(second, 3)) == " w20 w30"
        async with connect(url) as connection:  # a goodbye, though without a code, is none of a client that was lost
            connection.protocol.send_close()
            connection.transport.write(b"".join(connection.protocol.data_to_send()))
            await empty(url)


async def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    import wire.handler

    monkeypatch.setattr(wire.handler, "_SEND_TIMEOUT_S", 0.5)
    many = FakeSession._hear

    def hear(self: FakeSession, loudness: float) -> None:
        many(self, loudness)
        self._events[-1] = replace(self._events[-1], delta="x" * 500_000)

    monkeypatch.setattr(FakeSession, "_hear", hear)
    async with running() as url:
        reader, writer = await asyncio.open_connection(*re.findall(r"//([^:/]+):(\d+)", url)[0])
        writer.write(
            f"GET {server.PATH} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        audio = pcm([0.1] * 40, 24_000)
        for start in range(0, len(audio), 60_000):
            part = audio[start : start + 60_000]
            writer.write(b"\x82\xfe" + len(part).to_bytes(2) + bytes(4) + part)
        await empty(url)
        writer.transport.abort()


# ------------------------------------------------------------------------------------------------- recordings


async def test_a_transcription_for_openais_client() -> None:
    async with running() as url, client(url) as openai_client:
        create = openai_client.audio.transcriptions.create
        told = await create(file=wav(LEVELS), model="whisper-1")
        assert told.text == "w10 w20 w30 w40 w50"
        assert await create(file=wav(LEVELS), model="whisper-1", response_format="text") == "w10 w20 w30 w40 w50\n"
        verbose = await create(
            file=wav(LEVELS, form="FLAC"),
            model="whisper-1",
            language="en",
            prompt="numbers",
            temperature=0,
            response_format="verbose_json",
            timestamp_granularities=["word", "segment"],
        )
        assert (verbose.text, verbose.language, verbose.duration) == ("w10 w20 w30 w40 w50", "english", 2.4)
        assert verbose.segments is not None and verbose.words is not None
        assert [(s.id, s.text, s.start, s.end) for s in verbose.segments] == [
            (0, " w10 w20 w30", 0.0, 1.6), (1, " w40 w50", 1.6, 2.4)
        ]  # fmt: skip
        assert [(w.word, w.start) for w in verbose.words][3:] == [("w40", 1.6), ("w50", 2.0)]
        srt = await create(file=wav(LEVELS), model="whisper-1", response_format="srt")
        assert str(srt).startswith("1\n00:00:00,000 --> 00:00:01,200\nw10 w20 w30\n\n2\n00:00:01,600 --> ")
        vtt = await create(file=wav(LEVELS), model="whisper-1", response_format="vtt")
        assert str(vtt).startswith("WEBVTT\n\n00:00:00.000 --> ")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_translation_for_openais_client() -> None:
    async with running(FakeTranslator()) as url, client(url) as openai_client:
        create = openai_client.audio.translations.create
        assert (await create(file=wav(LEVELS), model="x", extra_body={"to": "es"})).text == "es10 es20 es30 es40 es50"
        verbose = await create(
            file=wav(LEVELS), model="x", response_format="verbose_json", extra_body={"language": "de"}
        )
        assert (verbose.text, verbose.language) == ("de10 de20 de30 de40 de50", "german")
        assert verbose.segments is not None and len(verbose.segments) == 2
        srt = await create(file=wav(LEVELS), model="x", response_format="srt", extra_body={"to": "fr"})
        assert "fr40 fr50" in str(srt)
        with pytest.raises(openai.BadRequestError) as refused:
            await create(file=wav(LEVELS), model="x")
        assert refused.value.code == "unsupported_language" and "'en'" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "code", "sentence"),
    [
        ({"response_format": "xml"}, "invalid_value", "json, verbose_json, text, srt, vtt"),
        ({"colour": "red"}, "unknown_field", "no field 'colour'"),
        ({"to": "es"}, "unknown_field", "no field 'to'"),
        ({"stream": "true"}, "invalid_value", "WebSocket"),
        ({"timestamp_granularities[]": "letter"}, "invalid_value", "segment, word"),
    ],
)
async def test_fields_that_are_wrong(fields: dict[str, str], code: str, sentence: str) -> None:
    async with running() as url, client(url) as openai_client:
        with pytest.raises(openai.BadRequestError, match=re.escape(sentence)) as refused:
            await openai_client.audio.transcriptions.create(file=wav([0.1]), model="x", extra_body=fields)
        assert refused.value.code == code


async def post(url: str, body: bytes, kind: str = "multipart/form-data; boundary=x", **headers: str) -> tuple[int, Any]:
    def ask() -> tuple[int, Any]:
        request = urllib.request.Request(url, data=body, headers={"Content-Type": kind, **headers})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]

    return await asyncio.to_thread(ask)


def part(name: str, content: bytes, file: str = "") -> bytes:
    naming = f'; filename="{file}"' if file else ""
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{naming}\r\n\r\n'.encode() + content + b"\r\n"


async def test_requests_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = wav([0.1]).read()
    async with running(max_sessions=2) as url:
        address = f"{http(url)}/v1/audio/transcriptions"
        for body, kind, code in (
            (b"{}", "application/json", "missing_file"),
            (part("model", b"x") + b"--x--\r\n", "multipart/form-data; boundary=x", "missing_file"),
            (part("file", b"not a sound", "a.wav") + b"--x--\r\n", "multipart/form-data; boundary=x", "not_audio"),
            (part("file", b"", "a.wav") + b"--x--\r\n", "multipart/form-data; boundary=x", "file_empty"),
            (part("file", sound) + b"--x--\r\n", "multipart/form-data; boundary=x", "missing_file"),
            (part("other", sound, "a.wav") + b"--x--\r\n", "multipart/form-data; boundary=x", "invalid_value"),
            (b"--y\r\n", "multipart/form-data; boundary=x", "invalid_form"),
            (part("model", b"x" * 100_000) + b"--x--\r\n", "multipart/form-data; boundary=x", "invalid_form"),
            (part("model", b"x") * 50 + b"--x--\r\n", "multipart/form-data; boundary=x", "invalid_form"),
        ):
            status, error = await post(address, body, kind)
            assert (status, error["code"]) == (400, code), error
        good = part("file", sound, "a.wav") + b"--x--\r\n"
        monkeypatch.setattr(asgi, "MAX_WAITING", 1)  # nobody waits any more
        assert (await post(address, good))[0] == 200
        monkeypatch.setattr(asgi, "MAX_UPLOAD_BYTES", 10_000)
        status, error = await post(address, good)
        assert (status, error["code"]) == (413, "upload_too_large")
        monkeypatch.setattr(asgi, "MAX_UPLOAD_BYTES", 1 << 20)
        monkeypatch.setattr(asgi, "MAX_RECORDING_S", 0.2)
        status, error = await post(address, good)
        assert (status, error["code"]) == (400, "recording_too_long")
        monkeypatch.setattr(asgi, "_UPLOAD_TIMEOUT_S", 0.5)
        reader, writer = await asyncio.open_connection(*re.findall(r"//([^:/]+):(\d+)", url)[0])
        head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n"
        writer.write(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode())
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 20)
        writer.close()
        assert (await get(address))[0] == 404
        assert json.loads((await get(f"{http(url)}/healthz"))[1])["sessions"] == 0


async def test_recordings_need_the_token_and_a_place() -> None:
    body = part("file", wav([0.1]).read(), "a.wav") + b"--x--\r\n"
    async with running(tokens=("sesame",), max_sessions=1) as url, client(url, "sesame") as openai_client:
        address = f"{http(url)}/v1/audio/transcriptions"
        assert (await openai_client.audio.transcriptions.create(file=wav([0.1]), model="x")).text == "w10"
        status, error = await post(address, body)
        assert (status, error["code"], error["type"]) == (401, "invalid_token", "invalid_request_error")
        status, error = await post(address, body, Authorization="Bearer sesame", Origin="https://example.org")
        assert (status, error["code"]) == (403, "origin_refused")
        async with connect(url, additional_headers={"Authorization": "Bearer sesame"}):
            status, error = await post(address, body, Authorization="Bearer sesame")
            assert (status, error["code"], error["type"]) == (503, "full", "server_error")


async def test_recordings_wait_for_each_other_and_leave_places_to_speakers(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    tick: Callable[..., None] = fake_tick

    def watched(sessions: list[FakeSession], **options: Any) -> None:
        nonlocal most
        most = max(most, len(sessions))
        tick(sessions, **options)

    monkeypatch.setattr(scheduler, "tick", watched)
    async with running(max_sessions=4) as url, client(url) as openai_client:
        create = openai_client.audio.transcriptions.create
        many = [create(file=wav([(i + 1) / 10] * 30), model="x") for i in range(6)]
        texts = [told.text for told in await asyncio.gather(*many)]
        assert texts == [" ".join([f"w{i + 1}0"] * 30) for i in range(6)]
        assert most == 1
        monkeypatch.setattr(asgi, "MAX_WAITING", 0)
        with pytest.raises(openai.InternalServerError, match="wait: try again later") as refused:
            await create(file=wav([0.1]), model="x")
        assert refused.value.status_code == 503


async def test_a_damaged_recording_is_told_of(tmp_path: Path) -> None:
    sound = wav(LEVELS).read()
    cut = sound[: len(sound) // 2]
    async with running() as url:
        status, text = await post(f"{http(url)}/v1/audio/transcriptions", part("file", cut, "a.wav") + b"--x--\r\n")
        assert status == 200
        told = json.loads(text)
        assert told["text"].startswith("w10 w20") and set(told) <= {"text", "problem"}


async def test_what_the_engine_cannot_do_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeSession, loudness: float) -> None:
        raise RuntimeError("as asked")

    monkeypatch.setattr(FakeSession, "_hear", fail)
    async with running() as url, client(url) as openai_client:
        with pytest.raises(openai.InternalServerError) as refused:
            await openai_client.audio.transcriptions.create(file=wav([0.1]), model="x")
        assert (refused.value.status_code, refused.value.code) == (500, "internal_error")


async def test_no_upload_stays_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with running() as url, client(url) as openai_client:
        await openai_client.audio.transcriptions.create(file=wav(LEVELS), model="x")
        with pytest.raises(openai.BadRequestError):
            await openai_client.audio.transcriptions.create(file=io.BytesIO(b"noise" * 100), model="x")
    assert not os.listdir(tmp_path)


@pytest.mark.model
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_the_embedded_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.checkpoint import load_recognizer
    from models.translator import load_translator
    from streaming.session import Session, SessionConfig, tick

    monkeypatch.setattr(scheduler, "Session", Session)
    monkeypatch.setattr(scheduler, "tick", tick)
    recognizer, sample = load_recognizer(), Path(__file__).parents[1] / "samples" / "jfk.flac"
    service = asgi.AsgiService(recognizer, server.Settings(port=0), load_translator())
    url = await service.start()
    try:
        async with client(url) as openai_client:
            told = await openai_client.audio.transcriptions.create(file=sample, model="x")
            translated = await openai_client.audio.translations.create(file=sample, model="x", extra_body={"to": "es"})
    finally:
        await service.stop()
    samples, rate_hz = soundfile.read(sample, dtype="float32")
    from streaming.audio import AudioFormat

    alone = Session(recognizer, SessionConfig(AudioFormat("f32le", rate_hz, 1)))
    events = alone.push(np.ascontiguousarray(samples)) + alone.finish()
    assert told.text == "".join(getattr(event, "delta", "") for event in events).strip()
    assert translated.text


@pytest.mark.model
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_the_command_with_a_translator_elsewhere(tmp_path: Path) -> None:
    """`dragoman serve --asgi` as a process, whose translator another program runs."""
    with completions(planned, takes_ids=False) as model:
        options = ["--asgi", "--port", "0", "--translator-url", model.url, "--translator-model", "tiny"]
        options += ["--translator", str(plain_folder(tmp_path))]
        command = (sys.executable, "-m", "client.cli", "serve", *options)
        with running_process(command) as address:
            url, sample = f"ws://{address}{server.PATH}", Path(__file__).parents[1] / "samples" / "jfk.flac"
            async with client(url) as openai_client:
                told = await openai_client.audio.transcriptions.create(
                    file=sample, model="x", response_format="verbose_json", timestamp_granularities=["word"]
                )
                create = openai_client.audio.translations.create
                translated = await create(file=sample, model="x", extra_body={"to": "es", "latency": "low"})
                assert translated.text == " ".join(word.word for word in told.words).upper() != ""
                model.faults = [500] * 99
                with pytest.raises(openai.InternalServerError) as refused:
                    await create(file=sample, model="x", extra_body={"to": "es"})
                assert (refused.value.status_code, refused.value.code) == (503, "translator_unavailable")
