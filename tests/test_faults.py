"""What can go wrong around a service: the others' output is unchanged, nobody hangs, and everyone is told why.

Beside each fault somebody speaks, at the pace of speech, and is heard to the last word.
"""

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

import server
import streaming.remote
import streaming.session
import wire.handler
from client.connection import ServiceError, connect, exchange
from streaming import scheduler
from streaming.audio import AudioFormat
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta, TranslationDelta
from streaming.remote import load_remote_translator
from streaming.session import Session
from tests import tiny
from tests.completions import completions, plain_folder
from tests.fakes import FakeSession, fake_tick, pcm, running_service, tone
from tests.proxy import Proxy
from tests.streaming.test_remote import planned

ROOT: Final = Path(__file__).parents[1]
DECLARATION: Final = json.dumps(
    {"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}}}
)
CLOSE: Final = json.dumps({"type": "session.close"})


pytestmark = pytest.mark.usefixtures("fake_sessions")


def words(events: Sequence[Event]) -> str:
    return "".join(event.delta for event in events if isinstance(event, TranscriptDelta))


@asynccontextmanager
async def a_speaker(url: str) -> AsyncIterator[None]:
    """Somebody who speaks while something happens to others, and who must be heard as if it did not."""
    spoken: list[float] = []
    events: list[Event] = []
    is_heard, is_enough = asyncio.Event(), asyncio.Event()

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, TranscriptDelta):
            is_heard.set()

    async def speak() -> None:
        async with connect(url) as session:

            async def send() -> None:
                while not is_enough.is_set():
                    spoken.append(0.1 * (len(spoken) % 7 + 1))
                    word = pcm(spoken[-1:])
                    for start in range(0, len(word), 3_200):
                        await session.send(word[start : start + 3_200])
                        await asyncio.sleep(0.1)
                await session.finish()

            await exchange(session, send(), hear)

    speaking = asyncio.create_task(speak())
    try:
        async with asyncio.timeout(20):
            await is_heard.wait()
        yield
    finally:
        is_enough.set()
        async with asyncio.timeout(20):
            await speaking
    assert words(events) == "".join(f" w{round(100 * level)}" for level in spoken)
    assert events[-1] == SessionClosed(len(events) - 1, 400 * len(spoken))


@asynccontextmanager
async def memory_returns() -> AsyncIterator[None]:
    """What happens leaves nothing of a session, and 5 % more memory at the most."""
    gc.collect()
    before = resident_bytes()
    yield
    for _ in range(100):  # a connection takes a moment to end on the other side
        gc.collect()
        kinds = (wire.handler.Conversation, scheduler.Stream, FakeSession)
        left = [type(thing) for thing in gc.get_objects() if type(thing) in kinds]
        if not left:
            break
        await asyncio.sleep(0.05)
    assert left == []
    assert resident_bytes() < 1.05 * before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def only_the_speaker_is_left(url: str, within_s: float = 10) -> None:
    """Wait until the sessions of the others have ended."""
    parts = url.split("/")[2].split(":")
    for _ in range(round(20 * within_s)):
        reader, writer = await asyncio.open_connection(parts[0], int(parts[1]))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        body = (await reader.read()).rpartition(b"\r\n\r\n")[2]
        writer.close()
        if json.loads(body)["sessions"] == 1:
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"there are other sessions after {within_s} s")


async def heard(connection: ClientConnection) -> list[dict[str, Any]]:
    """Everything until the connection ends."""
    events = []
    with suppress(ConnectionClosed):
        async for frame in connection:
            events.append(json.loads(frame))
    return events


def error_codes(events: Sequence[dict[str, Any]]) -> list[str]:
    assert all(event["error"]["message"] for event in events if event["type"] == "error")
    return [event["error"]["code"] for event in events if event["type"] == "error"]


def program(*lines: str, **options: Any) -> "subprocess.Popen[bytes]":
    """A process of its own, which heeds signals even where the tests run in the background of a shell."""
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, preexec_fn=heed, **options)


async def test_a_client_is_killed_in_mid_word(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "talk.wav", tone([0.5] * 100), 16_000, subtype="PCM_16")

    async def kill() -> None:
        arguments = ["live", str(tmp_path / "talk.wav"), "--url", url]
        client = program(
            "import sys", f"sys.argv[1:] = {arguments!r}", "from client.cli import app; app()", stdout=subprocess.PIPE
        )
        assert client.stdout is not None
        assert (await asyncio.to_thread(client.stdout.read, 3)) == b"w50"
        client.kill()
        await asyncio.to_thread(client.communicate)
        await only_the_speaker_is_left(url)

    async with running_service(resume_s=0.5) as url:
        async with a_speaker(url):
            await kill()
        async with memory_returns(), a_speaker(url):
            await kill()


@pytest.mark.parametrize("doing", ["listening", "telling", "ending"])
async def test_a_socket_is_half_open(doing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's machine has gone without a word: nothing comes, nothing is taken, and nobody says so.

    The service listens to it then, or is in the middle of what it tells, or has been told that the audio has ended.
    """

    def tick(sessions: Sequence[FakeSession], **_: int) -> None:
        if sum(len(session._waiting) for session in sessions) > 16_000:  # somebody has sent much at once
            time.sleep(0.02)
        fake_tick(sessions)

    async def vanish() -> None:
        async with Proxy(url) as proxy:
            gone = await connect_websocket(proxy.url)
            await gone.send(DECLARATION)
            await gone.send(pcm([0.3] if doing == "listening" else [0.3] * 60))
            if doing == "ending":
                await gone.send(CLOSE)
            for _ in range(3):
                await gone.recv()
            proxy.stall()
            began_s = time.monotonic()
            await only_the_speaker_is_left(url, within_s=idle_timeout_s + goodbye_s + resume_s + 10)
            took_s.append(time.monotonic() - began_s)
            gone.transport.abort()

    monkeypatch.setattr(scheduler, "tick", tick)
    idle_timeout_s, goodbye_s, resume_s = 1.0, 0.5, 0.5
    monkeypatch.setattr(server, "GOODBYE_TIMEOUT_S", goodbye_s)
    took_s: list[float] = []
    async with running_service(idle_timeout_s=idle_timeout_s, resume_s=resume_s) as url:
        async with a_speaker(url):
            await vanish()
        async with memory_returns(), a_speaker(url):
            for _ in range(3):
                await vanish()
    # Whoever had said goodbye is waited for as for any other who was lost; else nothing has come for a while.
    assert min(took_s) > goodbye_s + (resume_s if doing == "ending" else 0.5 * idle_timeout_s)


async def test_the_server_of_the_translator_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is told and its transcript goes on; a new one is translated when the server is there again."""
    monkeypatch.setattr(scheduler, "Session", Session)
    monkeypatch.setattr(scheduler, "tick", streaming.session.tick)
    monkeypatch.setattr(streaming.remote, "PAUSE_S", 0.01)
    sound = np.random.default_rng(0).normal(0, 0.25, 16_000 * 4) * np.repeat([1, 0, 1, 0], 16_000)
    speech = (8_000 * sound).clip(-32_768, 32_767).astype("<i2").tobytes()

    async def told(*languages: str) -> list[Event]:
        events: list[Event] = []
        async with connect(url, languages=languages, latency="low", endpoint_silence_ms=240) as session:

            async def speak() -> None:
                for start in range(0, len(speech), 6_400):
                    await session.send(speech[start : start + 6_400])
                await session.finish()

            with suppress(ServiceError):  # which is among the events
                await exchange(session, speak(), events.append)
        assert isinstance(events[-1], SessionClosed)
        return events

    def translated(events: Sequence[Event]) -> str:
        return "".join(event.delta for event in events if isinstance(event, TranslationDelta))

    with completions(planned, takes_ids=False) as model:
        translator = load_remote_translator(model.url, "tiny", plain_folder(tmp_path))
        async with running_service(tiny.recognizer(), translator) as url:
            alone = await told()
            assert words(alone) and translated(alone) == ""
            model.faults = [500] * 99
            forsaken, other = await asyncio.gather(told("es"), told())
            codes = [event.code for event in forsaken if isinstance(event, ErrorEvent)]
            assert codes == ["translator_unavailable"] and translated(forsaken) == ""
            assert words(forsaken) == words(other) == words(alone)
            model.faults = []
            again = await told("es")
            assert words(again) == words(alone)
            assert translated(again).split()[0][:40] == words(alone).upper().split()[0][:40]


async def test_a_client_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Talkative(FakeSession):
        """Says a megabyte about each loud block."""

        def _hear(self, loudness: float) -> None:
            super()._hear(loudness)
            event = cast(TranscriptDelta, self._events[-1])
            if loudness > 0.8:
                self._events = [*self._events[:-1], replace(event, delta="x" * 1_000_000)]

    monkeypatch.setattr(scheduler, "Session", Talkative)
    monkeypatch.setattr(scheduler, "MAX_WAITING_EVENTS", 4)
    monkeypatch.setattr(wire.handler, "_SEND_TIMEOUT_S", 0.5)

    async def ignore_all() -> None:
        async with connect_websocket(url, max_queue=1, close_timeout=0.1) as deaf:
            await deaf.send(DECLARATION)
            for _ in range(10):
                await deaf.send(pcm([0.9] * 5))
            await only_the_speaker_is_left(url)

    async with running_service() as url:
        async with a_speaker(url):
            await ignore_all()
        async with memory_returns(), a_speaker(url):
            for _ in range(3):
                await ignore_all()


async def test_two_hundred_clients_come_at_once_where_there_is_no_place() -> None:
    async def come() -> str:
        try:
            async with connect_websocket(url, open_timeout=60, close_timeout=0.1):
                return "came in"
        except InvalidStatus as error:
            return f"{error.response.status_code} {(error.response.body or b'').decode()}"

    async with running_service(max_sessions=1) as url:
        await asyncio.gather(*(come() for _ in range(200)))
        async with memory_returns(), a_speaker(url):
            answers = await asyncio.gather(*(come() for _ in range(200)))
            assert answers == ["503 all 1 sessions are in use: try again later\n"] * 200


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=9), part, max_size=3),
    max_leaves=9,
)
_TYPES = st.sampled_from(["session.update", "session.input_audio_buffer.append", "session.resume", "session.created"])
_GARBAGE = st.one_of(
    st.text(max_size=50),
    _JSON.map(json.dumps),
    st.builds(
        lambda kind, more: json.dumps({**more, "type": kind}), _TYPES, st.dictionaries(st.text(max_size=9), _JSON)
    ),
    st.builds(lambda kind, more: json.dumps({"type": kind, "session": more, "audio": more}), _TYPES, _JSON),
    st.binary(max_size=999),
)


async def send_garbage(messages: Sequence[str | bytes]) -> None:
    async with running_service() as url, connect_websocket(url) as connection:
        await connection.send(DECLARATION)
        for message in messages:
            await connection.send(message)
        await connection.send(CLOSE)
        events = await heard(connection)
        texts = sum(isinstance(message, str) for message in messages)
        assert len(error_codes(events)) <= texts + 1  # half a sample at the end is told, too
        assert set(error_codes(events)) <= {
            "invalid_json", "unknown_event", "unknown_field", "invalid_value", "session_already_declared",
            "audio_odd_bytes", "unsupported_lookahead",
        }  # fmt: skip
        assert events[-1]["type"] == "session.closed" and connection.close_code == 1000
        audio_bytes = sum(len(message) for message in messages if isinstance(message, bytes))
        assert events[-1]["audio_ms"] == round(audio_bytes // 2 / 16)


def sessions_of_garbage(count: int, examples: int) -> list[list[str | bytes]]:
    """Sends so many messages in each of some sessions, and tells which."""
    sent: list[list[str | bytes]] = []

    @settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(_GARBAGE, min_size=count, max_size=count))
    def send(messages: list[str | bytes]) -> None:
        asyncio.run(send_garbage(messages))
        sent.append(messages)

    send()
    return sent


def test_garbage() -> None:
    sessions_of_garbage(20, 10)


@pytest.mark.slow
def test_ten_thousand_messages_of_garbage() -> None:
    sent = sessions_of_garbage(100, 100)

    async def send_again() -> None:  # without Hypothesis, which remembers what it has made
        async with memory_returns():
            for messages in sent:
                await send_garbage(messages)

    asyncio.run(send_again())
    assert sum(map(len, sent)) >= 10_000


async def test_garbage_does_not_disturb_others() -> None:
    async with running_service() as url, a_speaker(url):
        for first in ("", "[", "\0", '{"type": "session.update", "session": 1}', CLOSE[:-1]):
            async with connect_websocket(url) as connection:
                await connection.send(first)
                assert len(error_codes(await heard(connection))) == 1
                assert connection.close_code == 1008
        parts = url.split("/")[2].split(":")
        for noise in (b"\0" * 9_999, b"GET / HTTP/1.1\r\n" + b"x" * 99_999, b"GET /v1 HTTP/9\r\n\r\n"):
            reader, writer = await asyncio.open_connection(parts[0], int(parts[1]))
            writer.write(noise)
            with suppress(ConnectionError):
                async with asyncio.timeout(20):
                    await reader.read()
            writer.close()


async def test_the_declared_rate_is_not_that_of_the_audio() -> None:
    async def declare_wrongly() -> None:
        with pytest.raises(ServiceError) as caught:
            async with connect(url, audio=AudioFormat(sample_rate_hz=192_000)) as session:
                session.audio = AudioFormat()
                await session._send(DECLARATION)  # and says something else later
                async for _ in session:
                    pass
        assert caught.value.code == "session_already_declared"
        async with connect_websocket(url) as connection:
            await connection.send(DECLARATION.replace("16000", "4000"))
            events = await heard(connection)
            assert error_codes(events) == ["unsupported_rate"] and "8000" in events[-1]["error"]["message"]
        for rate_hz in (8_000, 48_000):  # of audio at 16,000: nonsense, of another length, and an end as always
            async with connect(url, audio=AudioFormat(sample_rate_hz=rate_hz)) as session:
                await session.send(pcm([0.5] * 6))
                await session.finish()
                events_told = [event async for event in session]
            assert isinstance(events_told[-1], SessionClosed)
            assert events_told[-1].audio_ms == 2_400 * 16_000 // rate_hz

    async with running_service() as url:
        async with a_speaker(url):
            await declare_wrongly()
        async with memory_returns(), a_speaker(url):
            for _ in range(3):
                await declare_wrongly()


SERVER: Final = (
    "import asyncio, streaming.scheduler as s, server",
    "from tests.fakes import *",
    "s.Session, s.tick = FakeSession, fake_tick",
    "asyncio.run(server.serve(FakeRecognizer(), server.Settings(port=0, drain_s=2.0)))",
)


async def test_sigterm_comes_while_sessions_are_live() -> None:
    service = program(*SERVER, stderr=subprocess.PIPE)
    assert service.stderr is not None
    line = (await asyncio.to_thread(service.stderr.readline)).decode()
    found = re.search(r"ws://\S+", line)
    assert found is not None, line
    async with asyncio.timeout(60):
        finishing, staying = await connect_websocket(found[0]), await connect_websocket(found[0])
        for connection in (finishing, staying):
            await connection.send(DECLARATION)
            await connection.send(pcm([0.3, 0.4])[:-400])
            for _ in range(3):
                await connection.recv()
        service.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        with pytest.raises(InvalidStatus):
            await connect_websocket(found[0])
        await finishing.send(CLOSE)
        last = await heard(finishing)
        assert [event.get("delta") for event in last] == [" w40", None] and finishing.close_code == 1000
        assert error_codes(await heard(staying)) == ["server_shutdown"] and staying.close_code == 1001
        assert await asyncio.to_thread(service.wait) == 0


async def test_the_network_is_gone_for_five_seconds() -> None:
    """Nothing is lost and nothing comes twice, and who speaks without a loss does not notice."""

    async def lose_all(seconds: float) -> None:
        async with a_speaker(url), a_speaker(proxy.url):
            proxy.cut()
            await asyncio.sleep(seconds)
            proxy.mend()
            await asyncio.sleep(1)

    async with running_service(max_sessions=2) as url, Proxy(url) as proxy:
        await lose_all(0.5)
        async with memory_returns():
            await lose_all(5)
    assert proxy.connections == 4


async def test_the_engine_fails_in_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def tick(sessions: Sequence[FakeSession], **_: int) -> None:
        for session in sessions:  # some have been advanced when another one fails
            fake_tick([session])
            if session.config.endpoint_silence_ms == 999:
                raise ZeroDivisionError

    monkeypatch.setattr(scheduler, "tick", tick)
    monkeypatch.setattr(scheduler.logger, "disabled", True)  # pytest keeps what is logged, and sessions with it

    async def fail() -> None:
        async with a_speaker(url), a_speaker(url), a_speaker(url):
            with pytest.raises(ServiceError) as caught:
                async with connect(url, endpoint_silence_ms=999) as session:
                    await session.send(pcm([0.5]))
                    async for _event in session:
                        pass
            assert caught.value.code == "internal_error" and "connect again" in str(caught.value)
            await asyncio.sleep(0.3)

    async with running_service() as url:
        await fail()
        async with memory_returns():
            for _ in range(3):
                await fail()


async def test_a_service_without_its_clients_is_as_it_was() -> None:
    """Clients of every kind that come and go leave nothing behind."""

    async def come_and_go() -> None:
        lost = await connect_websocket(url)
        await lost.send(DECLARATION)
        await lost.send(pcm([0.3] * 40))
        await lost.recv()
        lost.transport.abort()
        async with connect(url) as session:
            await session.send(pcm([0.3] * 40))
            await session.finish()
            assert words([event async for event in session]) == " w30" * 40

    async with running_service(resume_s=0.1, max_sessions=64) as url:
        await asyncio.gather(*(come_and_go() for _ in range(10)))
        async with memory_returns(), a_speaker(url):
            for _ in range(5):
                await asyncio.gather(*(come_and_go() for _ in range(10)))
            await only_the_speaker_is_left(url)
