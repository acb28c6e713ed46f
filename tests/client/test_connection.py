import asyncio
import json
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection

import client.connection
import server
from client.connection import LiveSession, ServiceError, connect, connect_sync, exchange, to_bytes
from streaming import scheduler
from streaming.audio import AudioFormat, AudioNormalizer
from streaming.errors import DragomanError
from streaming.events import (
    ErrorEvent,
    Event,
    SessionClosed,
    SessionCreated,
    SessionUpdated,
    TranslationDelta,
)
from tests.fakes import FakeSession, FakeTranslator, ForsakenSession, fake_tick, running_service, tone
from tests.proxy import Proxy

LEVELS = [0.2, 0.4, 0.6]
TEXT = " w20 w40 w60"


pytestmark = pytest.mark.usefixtures("fake_sessions")


def pcm(levels: Sequence[float] = LEVELS) -> bytes:
    return to_bytes(tone(levels), AudioFormat())


def text(events: Sequence[Event], language: str | None = None) -> str:
    return "".join(getattr(event, "delta", "") for event in events if getattr(event, "language", None) == language)


async def talk(url: str, audio: Any = None, cuts: Sequence[int] = (), **arguments: Any) -> list[Event]:
    """A whole session, its audio cut at the given places."""
    audio = pcm() if audio is None else audio
    async with connect(url, **arguments) as session:
        places = [0, *sorted(cuts), len(audio)]
        for start, end in zip(places, places[1:], strict=False):
            await session.send(audio[start:end])
        await session.finish()
        return [event async for event in session]


async def test_events_are_those_of_the_wire_with_their_types() -> None:
    async with running_service(translator=FakeTranslator()) as url:
        events = await talk(url, languages=["es", "fr"], latency="low", glossary={"w20": {"es": "x"}})
    assert [type(event) for event in events[:2]] == [SessionCreated, SessionUpdated]
    assert isinstance(events[1], SessionUpdated)
    assert events[1].session["audio"]["output"] == {"languages": ["es", "fr"]}
    assert (events[1].session["latency"], events[1].session["glossary"]) == ("low", {"w20": {"es": "x"}})
    assert (text(events), text(events, "es"), text(events, "fr")) == (TEXT, " es20 es40 es60", " fr20 fr40 fr60")
    assert events[-1] == SessionClosed(len(events) - 1, 1200)
    assert [event.seq for event in events] == list(range(len(events)))
    assert sum(isinstance(event, TranslationDelta) for event in events) == 6


async def test_what_the_service_has_is_known_before_the_first_audio() -> None:
    async with running_service(translator=FakeTranslator()) as url, connect(url, languages="es") as session:
        assert session.created.session["translator"]["languages"] == ["es", "de", "fr"]
        assert session.settings.session["audio"]["output"] == {"languages": ["es"]}


@given(cuts=st.lists(st.integers(0, 38_400), max_size=8))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cuts_give_the_same_events(cuts: list[int]) -> None:
    async def told() -> list[dict[str, Any]]:
        async with running_service() as url:
            return [event.to_dict() for event in await talk(url, cuts=cuts)]

    events = asyncio.run(told())
    for event in events:
        event.pop("backlog_ms", None)
    assert "".join(event.get("delta", "") for event in events) == TEXT
    assert [event["seq"] for event in events] == list(range(6))


@pytest.mark.parametrize("encoding", ["s16le", "f32le"])
@pytest.mark.parametrize(("rate_hz", "channels"), [(16_000, 1), (48_000, 2)])
async def test_arrays_go_out_in_the_declared_format(encoding: Any, rate_hz: int, channels: int) -> None:
    fmt = AudioFormat(encoding, rate_hz, channels)
    samples = tone(LEVELS, rate_hz, channels)
    async with running_service() as url:
        for audio in (samples, np.rint(samples * 32767).astype(np.int16)):
            assert text(await talk_in(url, fmt, audio)) == TEXT


async def talk_in(url: str, fmt: AudioFormat, samples: Any) -> list[Event]:
    async with connect(url, audio=fmt) as session:
        await session.send(samples)
        await session.finish()
        return [event async for event in session]


@given(st.lists(st.integers(-32768, 32767), max_size=50), st.sampled_from(["s16le", "f32le"]))
def test_arrays_come_out_of_the_bytes_again(values: list[int], encoding: Any) -> None:
    fmt = AudioFormat(encoding)
    samples = np.array(values, np.int16)
    expected = samples.astype(np.float32) / 32768
    for array in (samples, expected):
        np.testing.assert_array_equal(AudioNormalizer(fmt).push(to_bytes(array, fmt)), expected)


def test_arrays_that_cannot_be_sent() -> None:
    assert to_bytes(np.array([2, -2], np.float32), AudioFormat()) == b"\xff\x7f\x00\x80"
    with pytest.raises(DragomanError, match="not finite"):
        to_bytes(np.array([np.nan], np.float32), AudioFormat())
    for wrong in (np.zeros(4), np.zeros((4, 2), np.int16), np.zeros((4, 1, 1), np.int16)):
        with pytest.raises(ValueError, match="samples"):
            to_bytes(wrong, AudioFormat())  # type: ignore[arg-type]


async def test_a_flush_and_another_look_ahead_in_mid_stream() -> None:
    async with running_service() as url, connect(url) as session:
        await session.send(pcm([0.2])[:6_400])  # 200 ms
        await session.flush()
        events = [await anext(session) for _ in range(3)]
        assert text(events) == " w20"
        await session.set_max_lookahead_ms(80)
        updated = await anext(session)
        assert isinstance(updated, SessionUpdated)
        assert updated.session["max_lookahead_ms"] == 80
        await session.set_max_lookahead_ms(-1)
        with pytest.raises(ServiceError, match="below 0") as caught:
            await anext(session)
        assert caught.value.code == "unsupported_lookahead"
        assert isinstance(caught.value.event, ErrorEvent)
        await session.send(pcm([0.4]))  # the session has lived on
        await session.finish()
        assert text([event async for event in session]) == " w40"
        with pytest.raises(StopAsyncIteration):
            await anext(session)


async def failure(url: str, **arguments: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        async with connect(url, **arguments):
            pass
    assert "\n" not in str(caught.value)
    return caught.value


async def test_what_can_go_wrong_at_the_beginning() -> None:
    assert (await failure("ws://127.0.0.1:9")).code == "unreachable"
    for address in ("http://127.0.0.1:9", "ws://[::1", "nonsense"):
        assert (await failure(address)).code == "unreachable"
    async with running_service(max_sessions=1, tokens=("sesame",)) as url:
        assert (await failure(url)).code == "refused"
        assert "the token is missing" in str(await failure(url, token="sesam"))
        async with connect(url, token="sesame"):
            assert "all 1 sessions are in use" in str(await failure(url, token="sesame"))
        assert (await failure(url, token="sesame", languages=["xx"])).code == "unsupported_language"
        assert (await failure(url, token="sesame", colour="red")).code == "unknown_field"


async def test_audio_after_the_end_is_refused_here() -> None:
    async with running_service() as url, connect(url) as session:
        await session.finish()
        await session.finish()  # twice does no harm
        with pytest.raises(DragomanError) as caught:
            await session.send(bytes(2))
        assert caught.value.code == "session_closed"


@pytest.mark.parametrize("reads", [False, True])
async def test_whoever_sends_is_told_why_the_session_ended(reads: bool) -> None:
    bad = np.array([np.nan], "<f4").tobytes()
    async with running_service() as url, connect(url, audio=AudioFormat("f32le")) as session:
        events: list[Event] = []

        async def read() -> None:
            events.extend([event async for event in session])

        reader = asyncio.create_task(read()) if reads else None
        await session.send(tone([0.2]).tobytes() + bad)
        with pytest.raises(ServiceError) as caught:
            while True:
                await session.send(bytes(4_000))
                await asyncio.sleep(0.01)
        assert caught.value.code == "audio_not_finite"
        with pytest.raises(ServiceError, match="nan at sample index 6400"):
            await (reader or read())
        assert [event async for event in session] == []


async def test_exchange_hears_everything_and_raises_the_first_error() -> None:
    heard: list[Event] = []
    async with running_service() as url, connect(url) as session:

        async def speak() -> None:
            await session.send(pcm([0.2]))
            await session.set_max_lookahead_ms(-1)
            await session.send(pcm([0.4]) + b"\0")
            await session.finish()

        with pytest.raises(ServiceError) as caught:
            await exchange(session, speak(), heard.append)
    assert caught.value.code == "unsupported_lookahead"
    errors = [event.code for event in heard if isinstance(event, ErrorEvent)]
    assert errors == ["unsupported_lookahead", "audio_odd_bytes"]
    assert text(heard) == " w20 w40"
    assert isinstance(heard[-1], SessionClosed)


async def test_exchange_raises_the_end_of_the_connection_whatever_was_told_before() -> None:
    heard: list[Event] = []
    is_heard = asyncio.Event()

    def hear(event: Event) -> None:
        heard.append(event)
        if text(heard) == 2 * TEXT:
            is_heard.set()

    async def speak(session: LiveSession) -> None:
        await session.send(pcm())
        await session._send("what?")
        await session.send(pcm())
        await is_heard.wait()
        session._connection.transport.abort()

    async with running_service(resume_s=0) as url:
        with pytest.raises(ServiceError) as caught:
            async with connect(url) as session:
                await exchange(session, speak(session), hear)
    assert caught.value.code == "connection_lost"
    assert [event.code for event in heard if isinstance(event, ErrorEvent)] == ["invalid_json"]


async def test_a_session_whose_translator_fails_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "Session", ForsakenSession)
    async with running_service(translator=FakeTranslator()) as url, connect(url, languages=["es"]) as session:
        await session.send(pcm([0.2]))
        events: list[Event] = []
        with pytest.raises(ServiceError) as caught:
            async for event in session:
                events.append(event)
        assert caught.value.code == "translator_unavailable" and caught.value.event is not None
        await session.send(pcm([0.4, 0.6]))
        await session.finish()
        events += [event async for event in session]
    assert (text(events), text(events, "es")) == (TEXT, " es20") and isinstance(events[-1], SessionClosed)


async def test_exchange_ends_when_either_side_fails() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    def refuse(event: Event) -> None:
        raise FloatingPointError

    async with running_service() as url:
        async with connect(url) as session:
            with pytest.raises(ZeroDivisionError):
                await exchange(session, fail(), print)
        async with connect(url) as session:
            with pytest.raises(FloatingPointError):
                await exchange(session, asyncio.sleep(60), refuse)
    async with asyncio.timeout(20):
        async with running_service(resume_s=0) as url, connect(url) as session:
            stopping = asyncio.get_running_loop().call_later(0.1, session._connection.transport.abort)
            with pytest.raises(ServiceError) as caught:
                await exchange(session, asyncio.sleep(60), lambda _: None)
            assert caught.value.code == "connection_lost"
            stopping.cancel()


async def test_a_service_that_is_behind_holds_the_sender_back(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Event()

    def tick(sessions: Sequence[FakeSession], **_: int) -> None:
        may_go_on.wait(10)
        fake_tick(sessions)

    monkeypatch.setattr(scheduler, "tick", tick)
    audio = pcm([0.2] * 50)  # 20 s
    sent_s = 0
    async with running_service() as url, connect(url) as session:

        async def speak() -> None:
            nonlocal sent_s
            for _ in range(50):
                await session.send(audio)
                sent_s += 20
            await session.finish()

        events: list[Event] = []
        talking = asyncio.create_task(exchange(session, speak(), events.append))
        before = -1
        while before != sent_s:
            before = sent_s
            await asyncio.sleep(0.5)
        assert 20 <= sent_s < 400
        may_go_on.set()
        await talking
    assert text(events) == " w20" * 2_500


async def test_events_that_nobody_takes_hold_the_service_back(monkeypatch: pytest.MonkeyPatch) -> None:
    told = 0

    class Talkative(FakeSession):
        """Says the same as ever, in 400 kB more."""

        def _hear(self, loudness: float) -> None:
            nonlocal told
            told += 1
            super()._hear(loudness)
            event: Any = self._events[-1]
            self._events[-1] = event.__class__(**{**vars(event), "delta": " " + "x" * 400_000})

    monkeypatch.setattr(scheduler, "Session", Talkative)
    monkeypatch.setattr(scheduler, "MAX_WAITING_EVENTS", 4)
    monkeypatch.setattr("client.connection._WAITING_EVENTS", 4)
    async with running_service() as url, connect(url) as session:
        await session.send(pcm([0.2] * 70))  # fits into what may wait for the engine
        await session.finish()
        before = -1
        while before != told:
            before = told
            await asyncio.sleep(0.3)
        assert told < 70, "everything was told to a client that takes nothing"
        assert len(text([event async for event in session])) == 70 * 400_001


async def test_a_service_that_speaks_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async def babble(self: server.Service, connection: ServerConnection) -> None:
        await connection.send(json.dumps({"type": "hello"}))

    monkeypatch.setattr(server.Service, "_handle", babble)
    async with running_service() as url:
        error = await failure(url)
        assert error.code == "protocol_error"
        assert "'hello'" in str(error)


async def test_a_service_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(self: server.Service, connection: ServerConnection) -> None:
        await connection.wait_closed()

    monkeypatch.setattr(server.Service, "_handle", wait)
    monkeypatch.setattr("client.connection._ANSWER_TIMEOUT_S", 0.1)
    async with running_service() as url:
        assert (await failure(url)).code == "unreachable"


async def test_tls_with_a_token(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with running_service(tls_cert=cert, tls_key=key, tokens=("sesame",)) as url:
        trusted = ssl.create_default_context(cafile=str(cert))
        assert text(await talk(url, tls=trusted, token="sesame")) == TEXT
        assert "certificate" in str(await failure(url, token="sesame"))


@contextmanager
def service_in_a_thread(**settings: Any) -> Iterator[str]:
    """A service that runs beside a test without asyncio."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = running_service(**settings)
    try:
        yield asyncio.run_coroutine_threadsafe(running.__aenter__(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(running.__aexit__(None, None, None), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def threads() -> int:
    return sum(thread.name == "dragoman-client" for thread in threading.enumerate())


def test_without_asyncio() -> None:
    with service_in_a_thread(translator=FakeTranslator()) as url:
        with connect_sync(url, languages=["es"]) as session:
            assert session.created.session["translator"]["model"] == "fake"
            assert session.settings.session["audio"]["output"] == {"languages": ["es"]}
            assert session.audio == AudioFormat()
            events: list[Event | None] = [session.receive(), session.receive(timeout_s=5)]
            assert session.receive(timeout_s=0) is None
            session.send(tone([0.2])[:, 0])
            events += [session.receive(), session.receive()]
            session.set_max_lookahead_ms(-1)
            with pytest.raises(ServiceError, match="below 0"):
                session.receive()
            session.send(pcm([0.4])[:6_400])
            session.flush()
            session.finish()
            events += session
            assert session.receive() is None
        assert text([event for event in events if event]) == " w20 w40"
        assert text([event for event in events if event], "es") == " es20 es40"
        assert isinstance(events[-1], SessionClosed)
        with pytest.raises(ZeroDivisionError), connect_sync(url):
            raise ZeroDivisionError
        with pytest.raises(ServiceError), connect_sync(url, languages=["xx"]):
            pass
    assert threads() == 0


def test_one_thread_sends_and_another_receives() -> None:
    with service_in_a_thread() as url, connect_sync(url) as session:

        def speak() -> None:
            for start in range(0, len(audio), 5_000):
                session.send(audio[start : start + 5_000])
            session.finish()

        audio = pcm([0.2, 0.4] * 40)
        sender = threading.Thread(target=speak)
        sender.start()
        assert text(list(session)) == " w20 w40" * 40
        sender.join()


async def cut_now_and_then(proxy: Proxy, pauses_s: Sequence[float]) -> None:
    for pause_s in pauses_s:
        await asyncio.sleep(pause_s)
        proxy.cut()
        await asyncio.sleep(0.15)
        proxy.mend()


@pytest.mark.parametrize("pauses_s", [[0.0], [0.3, 0.01, 0.4], [0.05] * 6, [0.9]])
async def test_what_is_heard_does_not_depend_on_losses_of_the_connection(pauses_s: list[float]) -> None:
    audio = pcm([0.2, 0.3, 0.4, 0] * 15)

    async def speak(session: LiveSession, losses: Sequence[float]) -> None:
        cutting = asyncio.create_task(cut_now_and_then(proxy, losses))
        for start in range(0, len(audio), 3_201):
            await session.send(audio[start : start + 3_201])
            await asyncio.sleep(0.002)
            if start == 320_100:
                await session.flush()  # in the middle of a word: twice would be heard
        await cutting  # a fast machine may be done before the last loss
        await session.finish()

    told: list[list[Event]] = [[], []]
    sentences: list[str] = []
    for losses, events in zip(([], pauses_s), told, strict=True):
        async with (
            running_service(translator=FakeTranslator(), max_sessions=1) as url,
            Proxy(url) as proxy,
            connect(proxy.url, notice=sentences.append, languages=["es"]) as session,
            asyncio.timeout(60),
        ):
            await exchange(session, speak(session, losses), events.append)
    alone, events = told
    assert sentences and sentences[-1] == "the session goes on" and proxy.connections > 1
    assert [event.seq for event in events] == list(range(len(events)))
    assert untimed(events[2:]) == untimed(alone[2:])


def untimed(events: Sequence[Event]) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.to_dict().items() if key != "backlog_ms"} for event in events]


async def test_a_lost_session_that_does_not_come_back_is_given_up() -> None:
    async with running_service(resume_s=1.0) as url, Proxy(url) as proxy, connect(proxy.url) as session:
        await session.send(pcm([0.2]))
        proxy.cut()
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(ServiceError) as caught:
            async for _ in session:
                pass
        assert caught.value.code == "connection_lost" and "ws://" in str(caught.value)
        assert 0.4 < asyncio.get_running_loop().time() - began_s < 5
        with pytest.raises(ServiceError):
            await session.send(pcm([0.2]))
        assert [event async for event in session] == []


async def test_a_network_that_has_gone_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.connection, "_PING_EVERY_S", 0.1)
    monkeypatch.setattr(client.connection, "_SILENCE_S", 1.5)
    sentences: list[str] = []
    is_noticed = asyncio.Event()

    def notice(sentence: str) -> None:
        sentences.append(sentence)
        is_noticed.set()

    async def speak(session: LiveSession) -> None:
        await session.send(pcm([0.2, 0.3]))
        await asyncio.sleep(2.5)  # nobody speaks, and still somebody is there
        assert not sentences
        proxy.stall()
        await session.send(pcm([0.4]))
        await is_noticed.wait()
        proxy.mend()
        await session.send(pcm([0.5]))
        await session.finish()

    heard: list[Event] = []
    async with (
        running_service() as url,
        Proxy(url) as proxy,
        connect(proxy.url, notice=notice) as session,
        asyncio.timeout(30),
    ):
        await exchange(session, speak(session), heard.append)
    assert text(heard) == " w20 w30 w40 w50" and sentences[-1] == "the session goes on"


async def test_a_caller_that_takes_no_events_loses_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.connection, "_PING_EVERY_S", 0.1)
    monkeypatch.setattr(client.connection, "_SILENCE_S", 2.0)
    async with running_service() as url, Proxy(url) as proxy, connect(proxy.url) as session:
        proxy.stall()
        await session.send(pcm([0.2]))
        await session.finish()
        await asyncio.sleep(1.5)  # a ping is out, and nobody has listened for its answer

        async def listen() -> list[Event]:
            return [event async for event in session]

        listening = asyncio.create_task(listen())
        await asyncio.sleep(1.0)  # the ping is given up
        proxy.mend()
        assert text(await listening) == " w20" and proxy.connections == 1


async def test_a_session_that_the_service_has_forgotten_is_given_up_at_once() -> None:
    async with running_service(resume_s=20) as url, Proxy(url) as proxy, connect(proxy.url) as session:
        session.created.session["id"] = "another"
        proxy.cut()
        proxy.mend()
        async with asyncio.timeout(10):
            with pytest.raises(ServiceError, match="there is no session 'another' any more"):
                async for _ in session:
                    pass


async def test_what_is_sent_and_not_kept_cannot_be_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.connection, "_KEPT_BYTES", 50_000)
    async with running_service() as url, Proxy(url) as proxy, connect(proxy.url) as session:
        await session.send(pcm([0.2]))
        await session.send(pcm([0.3] * 2))
        events = [await anext(session) for _ in range(5)]
        assert text(events) == " w20 w30 w30"
        proxy.stall()  # this does not arrive
        for _ in range(9):
            await session.send(pcm([0.4]))
        assert session._kept_bytes <= 50_000
        proxy.cut()
        proxy.mend()
        with pytest.raises(ServiceError, match="is not kept any more"):
            async for _ in session:
                pass


def test_without_asyncio_a_session_goes_on_too() -> None:
    """A receiver that waits for no more than a moment must not keep the session from going on."""
    loop, running = asyncio.new_event_loop(), threading.Event()
    proxies: list[Proxy] = []
    done = asyncio.Event()

    async def serve() -> None:
        async with running_service() as url, Proxy(url) as proxy:
            proxies.append(proxy)
            running.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    running.wait(20)
    events: list[Event] = []
    with connect_sync(proxies[0].url) as session:
        for i in range(20):
            session.send(pcm([0.2]))
            while event := session.receive(timeout_s=0):
                events.append(event)
            if i == 9:
                loop.call_soon_threadsafe(proxies[0].cut)
                loop.call_soon_threadsafe(proxies[0].mend)
        session.finish()
        events += list(session)
    loop.call_soon_threadsafe(done.set)
    thread.join()
    assert text(events) == " w20" * 20 and proxies[0].connections == 2
