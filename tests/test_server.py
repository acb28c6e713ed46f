import asyncio
import base64
import gc
import json
import os
import re
import signal
import ssl
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin, Subprotocol

import server
import wire.handler
from models.recognizer import Recognizer
from streaming import scheduler
from streaming.interpreter import translate_ahead
from streaming.session import Session, tick
from tests import tiny
from tests.fakes import FakeRecognizer, FakeSession, FakeTranslator, fake_tick, pcm, running_service, tone

RATE_16K = {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}}


pytestmark = pytest.mark.usefixtures("fake_sessions")


async def send_event(connection: ClientConnection, kind: str, **fields: Any) -> None:
    await connection.send(json.dumps({"type": kind, **fields}))


async def events_until_closed(connection: ClientConnection, first_seq: int = 0) -> list[dict[str, Any]]:
    events = []
    try:
        async for frame in connection:
            events.append(json.loads(frame))
    except ConnectionClosed:
        pass
    assert [event["seq"] for event in events] == list(range(first_seq, first_seq + len(events)))
    return events


def words(events: list[dict[str, Any]]) -> str:
    return "".join(event.get("delta", "") for event in events)


def errors(events: list[dict[str, Any]]) -> list[str]:
    return [event["error"]["code"] for event in events if event["type"] == "error"]


async def talk(url: str, audio: bytes, message_bytes: int = 3_201) -> list[dict[str, Any]]:
    """A whole session at 16 kHz, its audio cut anywhere."""
    async with connect(url) as connection:
        await send_event(connection, "session.update", session=RATE_16K)
        for start in range(0, len(audio), message_bytes):
            await connection.send(audio[start : start + message_bytes])
        await send_event(connection, "session.close")
        return await events_until_closed(connection)


async def sessions(url: str) -> int:
    """How many sessions the service says it has."""
    _, body = await asyncio.to_thread(get, f"{url.removesuffix(server.PATH)}/healthz")
    count = json.loads(body)["sessions"]
    assert isinstance(count, int)
    return count


async def no_session_is_left(url: str) -> None:
    for _ in range(500):
        if await sessions(url) == 0:
            return
        await asyncio.sleep(0.01)
    pytest.fail("the session is still there after 5 s")


async def test_a_session_from_its_first_to_its_last_event() -> None:
    async with running_service() as url, connect(url) as connection:
        created = json.loads(await connection.recv())
        assert created["type"] == "session.created"
        assert created["session"]["audio"]["input"]["format"]["rate"] == 24_000
        await send_event(connection, "session.update", session=RATE_16K)
        updated = json.loads(await connection.recv())
        assert updated["type"] == "session.updated"
        assert updated["session"]["audio"]["input"]["format"]["rate"] == 16_000
        await connection.send(pcm([0.2, 0.4]))
        first = json.loads(await connection.recv())
        assert 0 <= first.pop("backlog_ms") < 5_000
        assert first == {
            "type": "session.input_transcript.delta",
            "seq": 2,
            "delta": " w20",
            "start_ms": 0,
            "end_ms": 400,
            "emitted_ms": 400,
            "segment": 0,
            "endpoint": False,
            "words": [{"word": "w20", "start_ms": 0, "end_ms": 400, "confidence": 0.5}],
        }
        await connection.send(pcm([0.6]))
        await send_event(connection, "session.close")
        rest = [json.loads(frame) async for frame in connection]
        assert words(rest) == " w40 w60"
        assert rest[-1] == {"type": "session.closed", "seq": 5, "audio_ms": 1200}
        assert connection.close_code == 1000


@pytest.mark.parametrize("path", [server.PATH, "/v1/realtime", "/v1/listen?encoding=linear16&sample_rate=16000"])
async def test_what_a_session_held_goes_with_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = list[weakref.ref[scheduler.Stream]]()

    def stream(notify: Callable[[], object]) -> scheduler.Stream:
        made = scheduler.Stream(notify)
        held.append(weakref.ref(made))
        return made

    monkeypatch.setattr(wire.handler, "Stream", stream)
    gc.collect()
    gc.disable()  # what waits for it waits for minutes, and a session is megabytes
    try:
        async with running_service(resume_s=0.2) as url:
            for ends in (True, False, True):
                async with connect(url.replace(server.PATH, path)) as connection:
                    await connection.send(pcm([0.2, 0.4]))
                    if not ends:
                        connection.transport.abort()
            async with connect(url):  # what the last one held in a frame goes with the next
                for _ in range(100):
                    if not any(one() for one in held[:3]):
                        break
                    await asyncio.sleep(0.05)
                assert [one() for one in held[:3]] == [None] * 3
    finally:
        gc.enable()


async def test_translations_come_with_the_audio_that_they_are_of() -> None:
    async with running_service(translator=FakeTranslator()) as url, connect(url) as connection:
        created = json.loads(await connection.recv())["session"]
        latencies = ["low", "low-medium", "medium", "medium-high", "high", "offline"]
        assert created["translator"] == {
            "model": "fake", "languages": ["es", "de", "fr"], "latencies": latencies, "policy": "interleaved",
        }  # fmt: skip
        assert (created["audio"]["output"], created["latency"], created["glossary"]) == (
            {"languages": []},
            "medium",
            {},
        )
        glossary = {"w40": {"es": "cuarenta"}}
        audio = {**RATE_16K["audio"], "output": {"languages": ["es", "fr"]}}
        await send_event(connection, "session.update", session={"audio": audio, "latency": "low", "glossary": glossary})
        updated = json.loads(await connection.recv())["session"]
        assert updated["audio"]["output"] == {"languages": ["es", "fr"]}
        assert (updated["latency"], updated["glossary"]) == ("low", glossary)
        await connection.send(pcm([0.2, 0.4, 0]))
        await send_event(connection, "session.close")
        events = await events_until_closed(connection, 2)
        deltas = [event for event in events if event["type"] == "session.output_transcript.delta"]
        assert all(0 <= event.pop("backlog_ms") < 5_000 for event in deltas)
        assert [event.pop("seq") for event in deltas] == [3, 4, 6, 7, 9, 10]
        assert deltas[2] == {
            "type": "session.output_transcript.delta",
            "delta": " es40",
            "language": "es",
            "source_start_ms": 400,
            "source_end_ms": 800,
            "emitted_ms": 800,
            "source_words": [1, 1],
            "endpoint": False,
        }
        assert [event["endpoint"] for event in deltas] == [False] * 4 + [True] * 2
        assert "".join(event["delta"] for event in deltas if event["language"] == "fr") == " fr20 fr40"


async def test_what_is_told_does_not_depend_on_translating_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "Session", Session)
    monkeypatch.setattr(scheduler, "tick", tick)
    noise = (3_000 * np.random.default_rng(2).standard_normal(48_000)).clip(-32_768, 32_767).astype("<i2").tobytes()
    told, audio = [], {**RATE_16K["audio"], "output": {"languages": ["es", "de"]}}
    for ahead in (False, True):
        asked: list[bool] = []

        def counted(sessions: Sequence[Session], asked: list[bool] = asked) -> bool:
            asked.append(translate_ahead(sessions))
            return asked[-1]

        monkeypatch.setattr(scheduler, "translate_ahead", counted)
        service = running_service(tiny.recognizer(4), tiny.translator(), translate_ahead=ahead)
        async with service as url, connect(url) as connection:
            await send_event(connection, "session.update", session={"audio": audio, "latency": "low"})
            for start in range(0, len(noise), 12_000):
                before = len(asked)
                await connection.send(noise[start : start + 12_000])
                for _ in range(1_000):  # until there is nothing left to do
                    if not ahead or (len(asked) > before and not asked[-1]):
                        break
                    await asyncio.sleep(0.01)
            await send_event(connection, "session.close")
            events = await events_until_closed(connection)
        told.append([{k: v for k, v in event.items() if k != "backlog_ms"} for event in events[1:]])
        assert any(asked) == ahead
    assert told[0] == told[1] and len(told[0]) > 10


async def test_a_translation_that_cannot_be_ends_the_session_with_a_sentence() -> None:
    for translator, sentence in ((FakeTranslator(), "'xx'; it knows es, de, fr"), (None, "no translator")):
        async with running_service(translator=translator) as url, connect(url) as connection:
            assert json.loads(await connection.recv())["session"].get("translator") is None or translator
            await send_event(connection, "session.update", session={"audio": {"output": {"language": "xx"}}})
            events = await events_until_closed(connection, 1)
            (error,) = (event["error"] for event in events)
            assert error["code"] == "unsupported_language"
            assert sentence in error["message"]
            assert connection.close_code == 1007


async def test_without_a_declaration_audio_is_24_khz() -> None:
    async with running_service() as url, connect(url) as connection:
        await connection.send(pcm([0.2, 0.4, 0.6], 24_000))
        await send_event(connection, "session.close")
        events = await events_until_closed(connection)
        assert words(events) == " w20 w40 w60"
        assert events[-1]["audio_ms"] == 1200


async def test_base64_audio_is_the_same_as_binary() -> None:
    async with running_service() as url, connect(url) as connection:
        await send_event(connection, "session.update", event_id="e1", session=RATE_16K)
        audio = pcm([0.2, 0.4])
        for part in (audio[:1001], audio[1001:]):
            text = base64.b64encode(part).decode()
            await send_event(connection, "session.input_audio_buffer.append", audio=text)
        await send_event(connection, "session.input_audio_buffer.commit")
        await send_event(connection, "session.close")
        assert words(await events_until_closed(connection)) == " w20 w40"


async def test_sessions_side_by_side_get_what_each_has_alone() -> None:
    audios = [pcm([0.1 * (i % 7 + 1) for i in range(start, start + 20)]) for start in range(6)]
    async with running_service() as url:
        alone = [await talk(url, audio) for audio in audios]
        together = await asyncio.gather(*(talk(url, a, 1 + 997 * i) for i, a in enumerate(audios, 1)))
    assert [words(events) for events in together] == [words(events) for events in alone]
    for event in (event for events in (*together, *alone) for event in events):
        event.pop("backlog_ms", None)  # the clock's
    assert [events[2:] for events in together] == [events[2:] for events in alone]
    assert len({words(events) for events in alone}) == len(audios)


@pytest.mark.parametrize(
    "first", ["garbage", "[]", '{"type": "session.begin"}', '{"type": "session.update", "session": {"x": 1}}']
)
async def test_a_wrong_first_event_ends_the_session(first: str) -> None:
    async with running_service() as url, connect(url) as connection:
        await connection.send(first)
        await connection.send(pcm([0.2]))
        events = await events_until_closed(connection)
        assert len(errors(events)) == 1
        assert words(events) == ""
        assert connection.close_code == 1008


async def test_a_wrong_later_event_is_told_and_the_session_goes_on() -> None:
    async with running_service() as url, connect(url) as connection:
        await send_event(connection, "session.update", session=RATE_16K)
        await connection.send(pcm([0.2]))
        await connection.send("{")
        await connection.send("[" * 100_000)
        await send_event(connection, "session.update", session=RATE_16K)
        await send_event(connection, "session.input_audio_buffer.append", audio="%")
        await connection.send(pcm([0.4]))
        await send_event(connection, "session.close")
        events = await events_until_closed(connection)
        assert sorted(errors(events)) == [
            "invalid_json",
            "invalid_json",
            "invalid_value",
            "session_already_declared",
        ]
        assert words(events) == " w20 w40"


async def test_the_look_ahead_may_change_in_mid_stream_and_nothing_else() -> None:
    async with running_service() as url, connect(url) as connection:
        await send_event(connection, "session.update", session={**RATE_16K, "max_lookahead_ms": 480})
        await connection.send(pcm([0.2]))
        await send_event(connection, "session.update", session={"max_lookahead_ms": 160})
        await send_event(connection, "session.update", session={"max_lookahead_ms": -1})
        await send_event(connection, "session.update", session={"max_lookahead_ms": 80, "decoder": "ctc"})
        await connection.send(pcm([0.4]))
        await send_event(connection, "session.close")
        events = await events_until_closed(connection)
        updated = [e["session"]["max_lookahead_ms"] for e in events if e["type"] == "session.updated"]
        assert updated == [480, 160]
        assert sorted(errors(events)) == ["session_already_declared", "unsupported_lookahead"]
        assert words(events) == " w20 w40"


@pytest.mark.parametrize(
    ("encoding", "audio", "code"),
    [
        ("s16le", pcm([0.2, 0.4]) + b"\0", "audio_odd_bytes"),
        ("f32le", tone([0.2, 0.4, np.nan]).tobytes(), "audio_not_finite"),
    ],
)
async def test_bad_audio_is_told_after_the_words_before_it(encoding: str, audio: bytes, code: str) -> None:
    declared = {"audio": {"input": {"format": {"rate": 16_000, "encoding": encoding}}}}
    async with running_service() as url, connect(url) as connection:
        await send_event(connection, "session.update", session=declared)
        for part in (audio[:10_000], audio[10_000:50_000], audio[50_000:]):
            await connection.send(part)
        await send_event(connection, "session.close")
        events = await events_until_closed(connection)
        assert errors(events) == [code]
        assert words(events).startswith(" w20")
        assert connection.close_code == (1000 if code == "audio_odd_bytes" else 1007)
        assert words(await talk(url, pcm([0.3]))) == " w30"


async def test_a_failure_inside_ends_one_session_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Brittle(FakeSession):
        def write(self, audio: Any) -> None:
            if len(audio) == 666:
                raise ZeroDivisionError
            super().write(audio)

    monkeypatch.setattr(scheduler, "Session", Brittle)
    async with running_service() as url, connect(url) as well, connect(url) as ill:
        await well.send(pcm([0.2], 24_000))
        await ill.send(bytes(666))
        assert errors(await events_until_closed(ill)) == ["internal_error"]
        assert ill.close_code == 1011
        await send_event(well, "session.close")
        assert words(await events_until_closed(well)) == " w20"
    assert "ZeroDivisionError" in caplog.text


async def test_a_failing_step_does_not_end_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = True

    def tick(sessions: Sequence[FakeSession], **_: int) -> None:
        if broken:
            raise ZeroDivisionError
        fake_tick(sessions)

    monkeypatch.setattr(scheduler, "tick", tick)
    async with running_service() as url:
        assert errors(await talk(url, pcm([0.2]))) == ["internal_error"]
        broken = False
        assert words(await talk(url, pcm([0.2]))) == " w20"


def get(url: str, **headers: str) -> tuple[int, str]:
    """A plain HTTP request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url.replace("ws:", "http:"), headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_health_and_unknown_paths() -> None:
    async with running_service(max_sessions=3) as url, connect(url):
        root = url.removesuffix(server.PATH)
        status, body = await asyncio.to_thread(get, f"{root}/healthz")
        assert (status, json.loads(body)) == (200, {"status": "ok", "sessions": 1, "max_sessions": 3})
        status, body = await asyncio.to_thread(get, f"{root}/v2")
        assert (status, body) == (404, f"there is no /v2 here: connect to {server.PATH}\n")
        assert (await asyncio.to_thread(get, url))[0] == 426


async def test_readiness() -> None:
    async with running_service(max_sessions=1) as url:
        root = url.removesuffix(server.PATH)
        status, body = await asyncio.to_thread(get, f"{root}/readyz")
        assert (status, json.loads(body)) == (200, {"status": "ok", "sessions": 0, "max_sessions": 1})
        async with connect(url):
            status, body = await asyncio.to_thread(get, f"{root}/readyz")
            assert (status, json.loads(body)) == (503, {"status": "full", "sessions": 1, "max_sessions": 1})
            assert (await asyncio.to_thread(get, f"{root}/healthz"))[0] == 200


async def counted(url: str, **headers: str) -> dict[tuple[str, ...], float]:
    """The samples of the metrics, by their name and the values of their labels."""
    status, text = await asyncio.to_thread(get, f"{url.removesuffix(server.PATH)}/metrics", **headers)
    assert status == 200
    return {
        (sample.name.removeprefix("dragoman_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_what_is_counted() -> None:
    languages = {"audio": {**RATE_16K["audio"], "output": {"languages": ["es", "fr"]}}}
    async with running_service(translator=FakeTranslator(), metrics=True, max_sessions=2) as url:
        async with connect(url) as connection, connect(url):
            await send_event(connection, "session.update", session=languages)
            for part in (pcm([0.2, 0.4]), pcm([0.6])):
                await connection.send(part)
            await connection.send("{")
            assert (await refusal(url))[0] == 503
            assert (await refusal(url, origin="https://evil.example"))[0] == 403
            assert (await asyncio.to_thread(get, url))[0] == 503  # how a page asks why
            now = await counted(url)
            assert (now[("sessions",)], now[("max_sessions",)], now[("sessions_opened_total",)]) == (2, 2, 2)
            await send_event(connection, "session.close")
            assert words([e for e in await events_until_closed(connection) if "words" in e]) == " w20 w40 w60"
        lost = await connect(url)
        lost.transport.abort()
        odd = await connect(url)
        await odd.close(4_567)
        await no_session_is_left(url)
        told = await counted(url)
    assert told[("audio_seconds_total",)] == pytest.approx(1.2)
    assert told[("words_total",)] == 3
    assert (told[("translated_chunks_total", "es")], told[("translated_chunks_total", "fr")]) == (3, 3)
    assert told[("lag_seconds_count", "transcript")] == 3 and told[("lag_seconds_count", "translation")] == 6
    assert 0 <= told[("lag_seconds_sum", "transcript")] < 15
    assert told[("tick_seconds_count",)] == told[("tick_rows_count",)] >= 3
    assert told[("tick_rows_sum",)] >= 3
    closed = {key[1]: n for key, n in told.items() if key[0] == "sessions_closed_total"}
    assert closed == {"1000": 2, "1006": 1, "other": 1}
    refused = {key[1]: n for key, n in told.items() if key[0] == "sessions_refused_total"}
    assert refused == {"full": 1, "origin": 1, "token": 0, "draining": 0}
    assert told[("errors_total", "invalid_json")] == 1
    for name in ("sessions", "input_queue_bytes", "output_queue_events", "slow_readers_dropped_total"):
        assert told[(name,)] == 0


async def test_metrics_are_for_those_who_may_see_them_and_tell_nothing_of_what_was_said() -> None:
    async with running_service() as url:
        assert (await asyncio.to_thread(get, f"{url.removesuffix(server.PATH)}/metrics"))[0] == 404
    secret = {"Authorization": "Bearer sesame"}
    async with running_service(tokens=("sesame",), metrics=True, max_sessions=1) as url:
        root = url.removesuffix(server.PATH)
        assert (await asyncio.to_thread(get, f"{root}/metrics"))[0] == 401
        async with connect(url, additional_headers=secret) as connection:
            await connection.send(pcm([0.33], 24_000))
            await send_event(connection, "session.close")
            assert words(await events_until_closed(connection)) == " w33"
            status, text = await asyncio.to_thread(lambda: get(f"{root}/metrics", **secret))
        assert status == 200 and "w33" not in text and "127.0.0.1" not in text


async def refusal(url: str, **arguments: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(url, **arguments):
            pass
    return caught.value.response.status_code, (caught.value.response.body or b"").decode()


async def test_each_of_several_tokens_lets_in() -> None:
    async with running_service(tokens=("sesame", "poppy")) as url:
        for token in ("sesame", "poppy"):
            async with connect(url, additional_headers={"Authorization": f"Bearer {token}"}) as connection:
                assert json.loads(await connection.recv())["type"] == "session.created"
        for token in ("", "sesamepoppy", "sesame poppy", "Poppy"):
            assert (await refusal(url, additional_headers={"Authorization": f"Bearer {token}"}))[0] == 401


async def test_one_session_too_many_is_refused_until_another_ends() -> None:
    async with running_service(max_sessions=2) as url:
        async with connect(url), connect(url):
            assert await refusal(url) == (503, "all 2 sessions are in use: try again later\n")
            assert await sessions(url) == 2
        assert words(await talk(url, pcm([0.3]))) == " w30"


async def test_a_client_that_is_back_is_let_in_where_every_place_is_taken() -> None:
    async with running_service(max_sessions=1, tokens=("sesame",)) as url:
        secret = {"Authorization": "Bearer sesame"}
        before = await connect(url, additional_headers=secret)
        created = json.loads(await before.recv())["session"]
        await send_event(before, "session.update", session=RATE_16K)
        await before.send(pcm([0.2]))
        assert json.loads(await before.recv())["type"] == "session.updated"
        before.transport.abort()
        again = f"{url}?resume={created['id']}"
        assert (await refusal(url, additional_headers=secret))[0] == 503
        assert (await refusal(again))[0] == 401, "its name alone lets nobody in"
        status, text = await refusal(f"{url}?resume=another", additional_headers=secret)
        assert (status, text) == (410, "there is no session 'another' any more: begin a new one\n")
        async with connect(again, additional_headers=secret) as connection:
            await send_event(connection, "session.resume", token=created["resume"]["token"], seq=0)
            assert json.loads(await connection.recv())["audio_bytes"] == len(pcm([0.2]))
            await connection.send(pcm([0.3]))
            await send_event(connection, "session.close")
            events = await events_until_closed(connection, 1)
        assert words(events) == " w20 w30" and events[0]["type"] == "session.updated"


async def test_a_vanished_client_frees_its_place() -> None:
    async with running_service(max_sessions=1, resume_s=0.3) as url:
        connection = await connect(url)
        await connection.send(pcm([0.2]))
        connection.transport.abort()
        await no_session_is_left(url)
        assert words(await talk(url, pcm([0.3]))) == " w30"


async def test_the_token() -> None:
    async with running_service(tokens=("sesame",)) as url:
        assert (await refusal(url))[0] == 401
        assert (await refusal(url, additional_headers={"Authorization": "Bearer sesam"}))[0] == 401
        assert await connect_as(url, "localhost", more=["Authorization: Bearer \udcff\udcfe"]) == 401
        async with connect(url, additional_headers={"Authorization": "Bearer sesame"}):
            pass


def token_subprotocol(token: str) -> Subprotocol:
    return Subprotocol("dragoman.token." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("="))


async def test_the_token_as_a_browser_sends_it_is_not_sent_back() -> None:
    token = "öffne dich, Sesam! ~~>>??"  # base64 with + and /
    assert "-" in token_subprotocol(token) or "_" in token_subprotocol(token)
    async with running_service(tokens=(token,)) as url:
        for offered in ([], [token_subprotocol(token[:-1])], [Subprotocol("dragoman.token.")]):
            assert (await refusal(url, subprotocols=[server.SUBPROTOCOL, *offered]))[0] == 401
        async with connect(url, subprotocols=[server.SUBPROTOCOL, token_subprotocol(token)]) as connection:
            assert connection.subprotocol == server.SUBPROTOCOL
            assert json.loads(await connection.recv())["type"] == "session.created"
        async with connect(url, subprotocols=[token_subprotocol(token)]) as connection:
            assert connection.subprotocol is None


async def test_web_pages_connect_from_allowed_origins_only() -> None:
    async with running_service(origins=("https://example.org",)) as url:
        assert (await refusal(url, origin="https://evil.example"))[0] == 403
        async with connect(url, origin=Origin("https://example.org")):
            pass
    async with running_service() as url:
        assert await refusal(url, origin="http://localhost") == (
            403, "pages of 'http://localhost' may not connect: --allow-origin lets them\n"
        )  # fmt: skip


async def connect_as(url: str, name: str, more: Sequence[str] = ()) -> int:
    """The status for a page that the service shows under a name, whichever address that name stands for."""
    port = url.split(":")[2].partition("/")[0]
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        lines = [f"GET {server.PATH} HTTP/1.1", f"Host: {name}:{port}", f"Origin: http://{name}:{port}"]
        lines += ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        lines += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", *more, "", ""]
        writer.write("\r\n".join(lines).encode(errors="surrogateescape"))
        status = int((await reader.readline()).split()[1])
        writer.close()
    return status


async def test_the_services_own_page_connects_without_being_allowed() -> None:
    async with running_service() as url:
        assert [await connect_as(url, name) for name in ("127.0.0.1", "localhost", "LocalHost", "[::1]")] == [101] * 4
        assert await connect_as(url, "rebound.example") == 403  # a stranger's name for this machine
        for origin in ("http://evil.example", "\udcff"):
            assert await connect_as(url, "localhost", more=[f"Origin: {origin}"]) == 403
    async with running_service(host="0.0.0.0") as url:
        assert await connect_as(url, "captions.example") == 101
    async with running_service(tokens=("sesame",)) as url:
        assert await connect_as(url, "captions.example") == 401
        assert await connect_as(url, "captions.example", more=["Authorization: Bearer sesame"]) == 101


async def test_the_page_is_served_to_everyone_and_runs_nothing_of_others() -> None:
    def fetch(url: str) -> tuple[Any, str]:
        with urllib.request.urlopen(url.replace("ws:", "http:")) as answer:
            return answer.headers, answer.read().decode()

    async with (
        running_service(tokens=("sesame",), max_sessions=1) as url,
        connect(url, additional_headers={"Authorization": "Bearer sesame"}),
    ):
        root = url.removesuffix(server.PATH)
        for path, (name, kind) in server._PAGE_FILES.items():
            headers, text = await asyncio.to_thread(fetch, f"{root}{path}?x=1")
            assert text == (server._PAGE / name).read_text()
            assert headers.get_all("Content-Type") == [f"{kind}; charset=utf-8"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cache-Control"] == "no-store"
            policy = dict(rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";"))
            assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
            assert not any(
                "unsafe" in rule or "*" in rule or ":" in rule.replace("blob:", "") for rule in policy.values()
            )
        for path in ("/index.html", "/page", "/../server.py", "/%2e%2e/server.py", "//style.css", "/capture.js/"):
            assert (await asyncio.to_thread(get, f"{root}{path}"))[0] == 404


async def test_a_silent_client_is_let_go() -> None:
    async with running_service(idle_timeout_s=0.1) as url, connect(url) as connection:
        assert errors(await events_until_closed(connection)) == ["idle_timeout"]
        assert connection.close_code == 1008


async def test_a_session_that_has_had_its_time_is_told_what_it_said() -> None:
    async with running_service(max_session_s=0.6) as url:
        async with connect(url) as connection:
            await send_event(connection, "session.update", session=RATE_16K)
            await connection.send(pcm([0.2, 0.4])[:-6_400])  # the second word is not complete
            events = []
            async for frame in connection:  # a client that goes on sending
                events.append(json.loads(frame))
                with suppress(ConnectionClosed):
                    if events[-1]["type"] == "error":
                        await connection.send(pcm([0.9]))
            assert errors(events) == ["session_expired"]
            assert "0.01 minutes" in next(e["error"]["message"] for e in events if e["type"] == "error")
            assert words(events) == " w20 w40"
            assert events[-1]["type"] == "session.closed" and events[-1]["audio_ms"] == 600
            assert connection.close_code == 1000
        async with connect(url) as connection:  # that says nothing
            assert errors(events := await events_until_closed(connection)) == ["session_expired"]
            assert events[-1]["audio_ms"] == 0
        assert errors(await talk(url, pcm([0.2]))) == []


async def speak(connection: ClientConnection, count: int) -> None:
    """Words at the pace of speech."""
    with suppress(ConnectionClosed):
        await send_event(connection, "session.update", session=RATE_16K)
        for _ in range(4 * count):
            await connection.send(pcm([0.2])[: 2 * 1_600])
            await asyncio.sleep(0.1)
        await send_event(connection, "session.close")


async def test_the_newest_session_ends_where_all_fall_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    overloaded = True

    def tick(sessions: Sequence[FakeSession], **_: int) -> None:
        if overloaded:
            threading.Event().wait(0.4 * len(sessions))  # two sessions at half the pace of speech
        fake_tick(sessions)

    monkeypatch.setattr(scheduler, "tick", tick)
    monkeypatch.setattr(scheduler, "_LATE_S", 1.0)
    async with running_service(max_lag_s=0.9) as url, connect(url) as older, connect(url) as newer:
        speakers = [asyncio.create_task(speak(older, 14))]
        hearer = asyncio.create_task(events_until_closed(older))
        await asyncio.sleep(0.3)
        speakers.append(asyncio.create_task(speak(newer, 14)))
        told = await events_until_closed(newer)
        overloaded = False
        assert errors(told) == ["overloaded"] and newer.close_code == 1013
        assert re.search(r"this session \d\.\d s behind: connect again", told[-1]["error"]["message"])
        assert words(told) in " w20" * 14
        heard = await hearer
        assert errors(heard) == [] and older.close_code == 1000
        assert words(heard) == " w20" * 14
        await asyncio.gather(*speakers)


async def test_a_message_too_big() -> None:
    async with running_service() as url, connect(url) as connection:
        await connection.send(bytes(2**20 + 1))
        await events_until_closed(connection)
        assert connection.close_code == 1009


async def until_full(stream: scheduler.Stream) -> None:
    for _ in range(500):
        if not stream.has_room:
            return
        await asyncio.sleep(0.01)
    pytest.fail("the session still takes audio after 5 s")


async def test_a_client_that_sends_too_fast_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Event()
    made: list[scheduler.Stream] = []

    class Watched(scheduler.Stream):
        def __init__(self, notify: Callable[[], object]) -> None:
            super().__init__(notify)
            made.append(self)

    def tick(sessions: Sequence[FakeSession], **_: int) -> None:
        may_go_on.wait(10)
        fake_tick(sessions)

    monkeypatch.setattr(scheduler, "tick", tick)
    monkeypatch.setattr(wire.handler, "Stream", Watched)
    audio = pcm([0.2, 0.4, 0.6, 0.8, 0.5])  # 2 s
    async with running_service() as url, connect(url, ping_interval=None) as connection:
        await send_event(connection, "session.update", session=RATE_16K)

        async def send_all() -> None:
            for _ in range(300):
                await connection.send(audio)
            await send_event(connection, "session.close")

        await connection.recv()  # it has begun
        sender = asyncio.create_task(send_all())
        await until_full(made[0])
        await asyncio.sleep(0.2)
        assert 30 * 32_000 <= sum(map(scheduler._size, made[0].inbox)) < 35 * 32_000
        may_go_on.set()
        await sender
        events = [json.loads(frame) async for frame in connection]
        assert words(events) == " w20 w40 w60 w80 w50" * 300
        assert connection.close_code == 1000


async def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = 0

    class Talkative(FakeSession):
        """Says a megabyte about each block."""

        def _hear(self, loudness: float) -> None:
            nonlocal computed
            computed += 1
            super()._hear(loudness)
            event = self._events[-1]
            self._events[-1] = replace(cast(Any, event), delta="x" * 1_000_000)

    monkeypatch.setattr(scheduler, "Session", Talkative)
    monkeypatch.setattr(wire.handler, "_SEND_TIMEOUT_S", 0.5)
    monkeypatch.setattr(scheduler, "MAX_WAITING_EVENTS", 4)
    async with running_service(max_sessions=1, metrics=True) as url:
        async with connect(url, max_queue=1, close_timeout=0.1) as connection:
            await send_event(connection, "session.update", session=RATE_16K)
            for _ in range(20):
                await connection.send(pcm([0.2] * 5))
            await no_session_is_left(url)
        assert (await counted(url))[("slow_readers_dropped_total",)] == 1
        assert computed < 50, "the engine went on for a client that does not read"


async def test_shutdown_is_told() -> None:
    service = server.Service(cast(Recognizer, FakeRecognizer()), server.Settings(port=0))
    async with connect(await service.start()) as connection:
        await connection.send(pcm([0.2], 24_000))
        await connection.recv()
        stopping = asyncio.create_task(service.stop())
        events: list[dict[str, Any]] = []
        try:
            async for frame in connection:
                events.append(json.loads(frame))
        except ConnectionClosed:
            pass
        assert errors(events) == ["server_shutdown"]
        assert connection.close_code == 1001
        await stopping


async def test_at_sigterm_sessions_finish_and_new_ones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    settings = server.Settings(port=0, drain_s=30)
    serving = asyncio.create_task(server.serve(cast(Recognizer, FakeRecognizer()), settings))
    url = await listening_at(capsys)
    async with connect(url) as connection:
        await send_event(connection, "session.update", session=RATE_16K)
        await connection.send(pcm([0.2]))
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)  # the loop hears of the signal
        answer = await asyncio.to_thread(get, f"{url.removesuffix(server.PATH)}/readyz")
        assert (answer[0], json.loads(answer[1])["status"]) == (503, "draining")
        assert await refusal(url) == (503, "the service is shutting down: try again in a while\n")
        await connection.send(pcm([0.4]))
        await send_event(connection, "session.close")
        assert words(await events_until_closed(connection)) == " w20 w40"
        assert connection.close_code == 1000
    await asyncio.wait_for(serving, 10)  # and not 30 s


@pytest.mark.parametrize(("drain_s", "signals"), [(0.2, 1), (30.0, 2)])
async def test_a_session_that_does_not_finish_is_told(
    drain_s: float, signals: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = server.Settings(port=0, drain_s=drain_s)
    serving = asyncio.create_task(server.serve(cast(Recognizer, FakeRecognizer()), settings))
    async with connect(await listening_at(capsys)) as connection:
        await connection.recv()
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.1)
        assert errors(await asyncio.wait_for(events_until_closed(connection, 1), 10)) == ["server_shutdown"]
        assert connection.close_code == 1001
    await asyncio.wait_for(serving, 10)


async def listening_at(capsys: pytest.CaptureFixture[str]) -> str:
    for _ in range(500):
        if found := re.search(r"ws://\S+", capsys.readouterr().err):
            return found[0]
        await asyncio.sleep(0.01)
    pytest.fail("the service does not listen after 5 s")


async def test_tls(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with running_service(tls_cert=cert, tls_key=key) as url:
        assert url.startswith("wss://")
        trusted = ssl.create_default_context(cafile=str(cert))
        async with connect(url, ssl=trusted) as connection:
            assert json.loads(await connection.recv())["type"] == "session.created"


async def test_transcripts_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with running_service() as url:
        await talk(url, pcm([0.33]))
    assert "w33" not in caplog.text
