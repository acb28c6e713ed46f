"""Conversations over a transport that is only queues: no socket, and every loss where a test wants it."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from models.recognizer import Recognizer
from models.translator import Translator
from tests.fakes import FakeRecognizer, FakeTranslator, pcm
from wire import handler
from wire.dialect import Frame
from wire.handler import Handler, Limits, TransportClosed
from wire.translations import Translations

pytestmark = pytest.mark.usefixtures("fake_sessions")


DECLARATION = json.dumps(
    {
        "type": "session.update",
        "session": {"audio": {"input": {"format": {"rate": 16_000}}, "output": {"languages": ["es"]}}},
    }
)
CLOSE = json.dumps({"type": "session.close"})


@dataclass
class Line:
    """A connection: what the client sends is queued, what it is sent is heard while it is up."""

    heard: list[dict[str, Any]] = field(default_factory=list)
    sent: asyncio.Queue[Frame | None] = field(default_factory=asyncio.Queue)
    close_code: int | None = None
    is_up: bool = True
    answers: bool = True  # the client says goodbye when it is told to

    async def recv(self) -> Frame:
        frame = await self.sent.get() if self.is_up else None
        if frame is None:
            raise TransportClosed
        return frame

    async def send(self, frame: Frame) -> None:
        if not self.is_up:
            raise TransportClosed
        self.heard.append(json.loads(frame))
        await asyncio.sleep(0)

    async def close(self, code: int, reason: str = "") -> None:
        if self.is_up and self.answers:
            self.close_code = code
        self.lose()

    def abort(self) -> None:
        self.lose()

    def lose(self) -> None:
        self.is_up = False
        self.sent.put_nowait(None)

    def say(self, *frames: Frame) -> None:
        for frame in frames:
            self.sent.put_nowait(frame)

    async def hears(self, kind: str, count: int = 1) -> dict[str, Any]:
        for _ in range(1_000):
            found = [event for event in self.heard if event["type"] == kind]
            if len(found) >= count:
                return found[count - 1]
            await asyncio.sleep(0.005)
        pytest.fail(f"no {kind} came in 5 s, but {self.heard}")


class Client:
    """One that goes on with its session: what it has, and its connections."""

    def __init__(self, service: Handler) -> None:
        self.service = service
        self.tasks: list[asyncio.Task[None]] = []
        self.line = self.dial(Translations())
        self.created: dict[str, Any] = {}
        self.told: list[dict[str, Any]] = []

    def dial(self, dialect: Translations) -> Line:
        self.line = Line()
        self.tasks.append(asyncio.create_task(self.service.converse(self.line, dialect)))
        return self.line

    async def begin(self) -> None:
        self.line.say(DECLARATION)
        self.created = (await self.line.hears("session.created"))["session"]

    def keep(self, count: int | None = None) -> None:
        """Take what was heard, or the first of it: the rest is lost with the connection."""
        heard, self.line.heard = self.line.heard[:count], []
        self.told += [event for event in heard if event["type"] != "session.resumed"]

    def resume(self, seq: int | None = None, token: str | None = None) -> Line:
        line = self.dial(Translations(self.created["id"]))
        seq = self.told[-1]["seq"] if seq is None else seq
        token = self.created["resume"]["token"] if token is None else token
        line.say(json.dumps({"type": "session.resume", "token": token, "seq": seq}))
        return line


def words(events: Sequence[dict[str, Any]]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "session.input_transcript.delta")


@asynccontextmanager
async def running(**limits: Any) -> AsyncIterator[Handler]:
    service = Handler(
        cast(Recognizer, FakeRecognizer()), Limits(**{"resume_s": 10.0, **limits}), cast(Translator, FakeTranslator())
    )
    try:
        yield service
    finally:
        service.dismiss()
        await service.stop()


async def none_is_left(service: Handler) -> None:
    for _ in range(1_000):
        if not service.sessions:
            return
        await asyncio.sleep(0.005)
    pytest.fail("the session is still there after 5 s")


async def test_a_session_goes_on_where_its_client_has_lost_it() -> None:
    async with running(max_sessions=1) as service:
        client = Client(service)
        await client.begin()
        assert client.created["resume"]["within_s"] == 10 and len(client.created["resume"]["token"]) >= 24
        client.line.say(pcm([0.2, 0.3]))
        await client.line.hears("session.output_transcript.delta", 2)
        client.keep(4)  # the second word and its translation are lost on their way
        client.line.lose()
        await asyncio.sleep(0.05)
        assert service.sessions == 1 and service.unavailable() is not None
        line = client.resume()
        resumed = await line.hears("session.resumed")
        assert resumed == {"type": "session.resumed", "seq": 3, "messages": 2, "audio_bytes": len(pcm([0.2, 0.3]))}
        line.say(pcm([0.4]), CLOSE)
        await line.hears("session.closed")
        client.keep()
        assert [event["seq"] for event in client.told] == list(range(9))
        assert words(client.told) == " w20 w30 w40"
        await none_is_left(service)
        assert line.close_code == 1000


async def test_a_client_that_is_back_before_its_loss_was_noticed_takes_over() -> None:
    async with running() as service:
        client = Client(service)
        await client.begin()
        client.line.say(pcm([0.2]))
        await client.line.hears("session.input_transcript.delta")
        client.keep()
        before, line = client.line, client.resume()
        await line.hears("session.resumed")
        assert not before.is_up and service.sessions == 1
        before.say(pcm([0.9]))  # nobody listens there any more
        third = client.resume()
        await third.hears("session.resumed")
        assert not line.is_up
        third.say(CLOSE)
        await third.hears("session.closed")
        assert words([*client.told, *third.heard]) == " w20"


async def test_the_last_words_come_again_where_the_goodbye_was_not_heard() -> None:
    async with running() as service:
        client = Client(service)
        await client.begin()
        client.line.answers = False
        client.line.say(pcm([0.2]), CLOSE)
        await client.line.hears("session.closed")
        client.keep(2)
        for _ in range(2):  # and again
            line = client.resume()
            line.answers = len(client.tasks) == 3
            await line.hears("session.closed")
            assert words(line.heard) == " w20"
        await none_is_left(service)
        assert line.close_code == 1000


async def test_a_client_that_left_or_that_says_nothing_is_not_waited_for() -> None:
    async with running() as service:
        left, silent, declared = Client(service), Client(service), Client(service)
        await left.begin()
        left.line.close_code = 1001
        left.line.lose()
        silent.line.lose()
        await declared.begin()
        for _ in range(1_000):
            if service.sessions == 1:
                break
            await asyncio.sleep(0.005)
        assert service.sessions == 1


async def test_the_place_of_a_client_that_does_not_come_back_is_given_away() -> None:
    async with running(resume_s=0.1) as service:
        client = Client(service)
        await client.begin()
        client.keep()
        client.line.lose()
        await none_is_left(service)
        line = client.resume()
        assert (await line.hears("error"))["error"]["code"] == "resume_unknown"
        await asyncio.gather(*client.tasks)


@pytest.mark.parametrize(
    ("token", "seq", "code"),
    [("", 0, "resume_unknown"), ("éé", 0, "resume_unknown"), (None, 99, "resume_impossible")],
)
async def test_what_cannot_be_resumed_is_told(token: str | None, seq: int, code: str) -> None:
    async with running() as service:
        client = Client(service)
        await client.begin()
        client.keep()
        line = client.resume(seq, token)
        error = (await line.hears("error"))["error"]
        assert error["code"] == code and "begin a new one" in error["message"]
        assert not line.is_up
        await client.tasks[-1]
        assert service.sessions == (1 if code == "resume_unknown" else 0), "a stranger changes nothing"


@pytest.mark.parametrize("first", [b"\0\0", "{}", "[", DECLARATION])
async def test_the_first_event_has_to_be_the_one_that_the_address_tells_of(first: Frame) -> None:
    async with running() as service:
        client = Client(service)
        await client.begin()
        line = client.dial(Translations(client.created["id"]))
        line.say(first)
        assert (await line.hears("error"))["error"]["code"] in ("resume_expected", "invalid_json")
        await client.tasks[-1]
        assert service.sessions == 1


async def test_what_is_kept_for_a_client_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "_MAX_SAID", 2_000)
    async with running() as service:
        client = Client(service)
        await client.begin()
        client.keep()
        client.line.say(pcm([0.2] * 20))
        await client.line.hears("session.output_transcript.delta", 20)
        client.line.lose()
        line = client.resume(2)
        assert (await line.hears("error"))["error"]["code"] == "resume_impossible"
        await none_is_left(service)


async def test_at_shutdown_nobody_is_waited_for() -> None:
    async with running() as service:
        client = Client(service)
        await client.begin()
        client.line.lose()
        await asyncio.sleep(0.05)
        service.dismiss()
        await asyncio.wait_for(asyncio.gather(*client.tasks), 5)
        assert service.sessions == 0


@settings(
    max_examples=30,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # what fails takes seconds, too long to be made simpler
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_nothing_is_lost_and_nothing_comes_twice(data: st.DataObject) -> None:
    """Connections that are lost at any time, each with some of what is under way in both directions."""
    levels = data.draw(st.lists(st.sampled_from([0.0, 0.2, 0.3, 0.4]), min_size=1, max_size=12))
    losses = data.draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30), st.integers(1, 6)), max_size=4))
    audio = pcm(levels)
    frames: list[Frame] = [DECLARATION, *(audio[at : at + 9_999] for at in range(0, len(audio), 9_999)), CLOSE]

    async def lossy() -> list[dict[str, Any]]:
        async with running() as service:
            client = Client(service)
            await client.begin()
            await client.line.hears("session.updated")
            begin = 1
            for count, milliseconds, kept in losses:
                client.line.say(*frames[begin : begin + count])
                await asyncio.sleep(milliseconds / 1000)
                if client.line.close_code is not None:  # that was all, and the client has said so
                    break
                client.keep(kept)
                client.line.lose()
                if client.told[-1]["type"] == "session.closed":
                    return client.told
                begin = (await client.resume().hears("session.resumed"))["messages"]
            else:
                client.line.say(*frames[begin:])
            await client.line.hears("session.closed")
            client.keep()
            return client.told

    told = asyncio.run(lossy())
    assert [event["seq"] for event in told] == list(range(len(told)))
    assert words(told) == "".join(f" w{round(100 * level)}" for level in levels if level)
    assert told[-1] == {"type": "session.closed", "seq": len(told) - 1, "audio_ms": 400 * len(levels)}
