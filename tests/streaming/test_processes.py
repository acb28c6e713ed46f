"""Engines in processes of their own: the same events, the same bounds, and a process that dies takes only its own."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.recognizer import Recognizer
from models.translator import Translator
from streaming import scheduler
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, TranscriptDelta
from streaming.messages import ClientMessage, CloseCode, Command
from streaming.processes import EngineProcess, Engines, Ticked
from streaming.scheduler import MAX_WAITING_EVENTS, Engine, Stream
from streaming.session import SessionConfig
from tests import tiny
from tests.fakes import FakeRecognizer, FakeSession, FakeTranslator, fake_tick, pcm
from tests.streaming.test_scheduler import alone, scripts, told

WAIT_S: Final = 30.0


def make(recognizer: object, translator: object, ticked: Ticked) -> Engine:
    return Engine(
        cast(Recognizer, recognizer),
        cast(Translator, translator),
        None,
        slots=64,
        describe=lambda config: {},
        ticked=ticked,
    )


def make_fake(ticked: Ticked) -> Engine:
    """In the engine's process, where nobody else is disturbed."""
    scheduler.Session, scheduler.tick = FakeSession, fake_tick  # type: ignore[misc,assignment]
    return make(FakeRecognizer(), FakeTranslator(), ticked)


def make_tiny(ticked: Ticked) -> Engine:
    return make(tiny.recognizer(4), tiny.translator(), ticked)


def make_none(ticked: Ticked) -> Engine:
    raise FileNotFoundError("no model")


def until(done: Callable[[], object]) -> None:
    """Wait for something that another process does."""
    end_s = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end_s, "nothing came"
        time.sleep(0.005)


class Client:
    """A session as the server's process has it, whose client reads or does not."""

    def __init__(self, engines: Engines, config: SessionConfig | None = None) -> None:
        self.engines = engines
        self.room = threading.Event()
        self.stream = Stream(self.room.set)
        self.events: list[Event] = []
        self.stream.put(config or SessionConfig())
        engines.add(self.stream)

    def put(self, *messages: Any) -> None:
        for message in messages:
            until(lambda: self.stream.has_room)
            self.stream.put(message)
            self.engines.wake()

    def read(self) -> CloseCode | None:
        """What has been told; the code at last."""
        while self.stream.outbox:
            item = self.stream.outbox.popleft()
            if isinstance(item, CloseCode):
                return item
            self.events.append(item)
            self.engines.wake()
        return None

    def read_all(self) -> CloseCode:
        codes: list[CloseCode | None] = [None]
        until(lambda: codes.append(self.read()) or codes[-1])
        assert codes[-1] is not None
        self.engines.remove(self.stream)
        return codes[-1]

    @property
    def words(self) -> str:
        return "".join(event.delta for event in self.events if isinstance(event, TranscriptDelta))


@pytest.fixture(scope="module")
def fake() -> Iterator[Engines]:
    engines = Engines(make_fake, 2, ticked=lambda rows, duration_s: None)
    engines.start()
    yield engines
    engines.stop()


@pytest.fixture(scope="module")
def real() -> Iterator[Engines]:
    engines = Engines(make_tiny, 2, ticked=lambda rows, duration_s: None)
    engines.start()
    yield engines
    engines.stop()


@settings(max_examples=10, deadline=None)
@given(st.lists(scripts(), min_size=2, max_size=5))
def test_the_events_of_a_session_are_those_of_the_same_audio_alone(
    real: Engines, talks: list[tuple[SessionConfig, list[ClientMessage]]]
) -> None:
    clients = [Client(real, config) for config, _ in talks]
    assert {real._of[client.stream] for client in clients} == set(real.processes)
    speakers = [
        threading.Thread(target=client.put, args=messages) for client, (_, messages) in zip(clients, talks, strict=True)
    ]
    for speaker in speakers:
        speaker.start()
    for client, (config, messages), speaker in zip(clients, talks, speakers, strict=True):
        assert client.read_all() is CloseCode.NORMAL_CLOSURE and client.stream.over
        speaker.join()
        expected = alone(config, messages)
        assert told(client.events) == told(expected) and client.events[-1] == expected[-1]
        assert client.stream.waiting_bytes == 0
    assert real.sessions == 0 and not any(process.streams for process in real.processes)


def test_a_client_that_does_not_read_is_not_computed_for(fake: Engines) -> None:
    lazy, other = Client(fake), Client(fake)
    spoken = [0.1 * (i % 7 + 1) for i in range(4 * MAX_WAITING_EVENTS)]
    speaker = threading.Thread(target=lazy.put, args=[*(pcm(spoken[i : i + 8]) for i in range(0, len(spoken), 8))])
    speaker.start()
    until(lambda: not lazy.stream.has_room)
    other.put(pcm([0.5]), Command.CLOSE)
    assert other.read_all() is CloseCode.NORMAL_CLOSURE and other.words == " w50"
    time.sleep(0.5)
    # One bound here, one there.
    assert len(lazy.stream.outbox) <= MAX_WAITING_EVENTS and fake.waiting_events <= MAX_WAITING_EVENTS
    assert fake.waiting_bytes > 30 * 32_000
    reader = threading.Thread(target=lazy.read_all)
    reader.start()
    speaker.join(WAIT_S)
    lazy.put(Command.CLOSE)
    reader.join(WAIT_S)
    assert lazy.words == "".join(f" w{round(100 * level)}" for level in spoken)


def test_small_messages_are_taken_in_though_no_step_comes_of_them(fake: Engines) -> None:
    client = Client(fake)
    client.put(*[b"\0\0"] * 2_500)
    until(lambda: client.stream.waiting_bytes == 0)
    client.put(Command.CLOSE)
    assert client.read_all() is CloseCode.NORMAL_CLOSURE


def test_steps_are_told_and_the_process_ends_with_its_engine() -> None:
    steps: list[tuple[int, float]] = []
    engines = Engines(make_fake, 1, ticked=lambda rows, duration_s: steps.append((rows, duration_s)))
    engines.start()
    client = Client(engines)
    client.put(pcm([0.3, 0.4]), Command.CLOSE)
    client.read_all()
    until(lambda: len(steps) >= 2)
    assert all(rows == 1 and duration_s > 0 for rows, duration_s in steps)
    pid = cast(int, engines.processes[0].pid)
    os.kill(pid, 0)
    engines.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_dies_ends_its_sessions_and_no_others(fake: Engines) -> None:
    lost, other = Client(fake), Client(fake)
    for client in (lost, other):
        client.put(pcm([0.3]))
        until(lambda client=client: client.read() or client.words)
    dead = cast(int, fake._of[lost.stream].pid)
    os.kill(dead, signal.SIGKILL)
    assert lost.read_all() is CloseCode.INTERNAL_ERROR
    assert isinstance(lost.events[-1], ErrorEvent) and "connect again" in lost.events[-1].message
    other.put(pcm([0.5]), Command.CLOSE)
    assert other.read_all() is CloseCode.NORMAL_CLOSURE and other.words == " w30 w50"
    again = [Client(fake), Client(fake)]  # one of them where it died
    for client in again:
        client.put(pcm([0.7]), Command.CLOSE)
        assert client.read_all() is CloseCode.NORMAL_CLOSURE and client.words == " w70"
    assert dead not in [process.pid for process in fake.processes]


def test_what_is_said_while_a_process_starts_again_is_not_lost() -> None:
    engine = EngineProcess(make_fake, lambda rows, duration_s: None, threads=1)
    engine.start()
    lost, following = Stream(lambda: None), Stream(lambda: None)
    engine.add(lost)
    os.kill(cast(int, engine.pid), signal.SIGKILL)
    until(lambda: lost.over)
    engine.add(following)
    for message in (SessionConfig(), pcm([0.3, 0.4]), Command.CLOSE):
        following.put(message)
        engine.wake()
        time.sleep(0.05)
    until(lambda: following.over)
    events = [event for event in following.outbox if isinstance(event, TranscriptDelta)]
    assert "".join(event.delta for event in events) == " w30 w40"
    engine.stop()


def test_a_session_that_is_removed_is_forgotten_there_too() -> None:
    engine = EngineProcess(partial(make_few, 1), lambda rows, duration_s: None, threads=1)
    engine.start()
    for level in (0.2, 0.4):  # with one slot, the second has none if the first has not gone
        stream = Stream(lambda: None)
        stream.put(SessionConfig())
        engine.add(stream)
        stream.put(pcm([level]))
        engine.wake()
        until(lambda stream=stream: any(isinstance(event, TranscriptDelta) for event in stream.outbox))
        engine.remove(stream)
    assert not engine.streams
    engine.stop()


def make_few(slots: int, ticked: Ticked) -> Engine:
    engine = make_fake(ticked)
    engine._slots = [None] * slots
    return engine


def test_models_that_cannot_be_loaded_are_told() -> None:
    engines = Engines(make_none, 2, ticked=lambda rows, duration_s: None)
    with pytest.raises(DragomanError, match="before its models were loaded"):
        engines.start()
    engines.stop()


def test_all_sessions_end_with_the_same_error(fake: Engines) -> None:
    clients: Sequence[Client] = [Client(fake) for _ in range(3)]
    fake.end_all("server_shutdown", "goodbye", CloseCode.GOING_AWAY)
    assert [client.read_all() for client in clients] == [CloseCode.GOING_AWAY] * 3
