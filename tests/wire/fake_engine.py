"""What the engine makes of a client's messages, at once and without threads, with the sessions of `tests.fakes`."""

import json
from collections.abc import Sequence
from typing import Any

from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionUpdated
from streaming.messages import ClientMessage, Command, LookaheadChange
from streaming.session import SessionConfig
from tests.fakes import FakeSession, FakeTranslator
from wire.dialect import Dialect, Frame


class Talk:
    """A client's talk with the service: its frames go in, the answers to each come out."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.session: FakeSession | None = None
        self.configs: list[SessionConfig] = []
        self.greeting = told(dialect.greeting("id-1", {"model": "fake"}))
        self.opening = self._say([event for message in dialect.opening() for event in self._events(message)])

    def send(self, *frames: Frame | dict[str, Any]) -> list[dict[str, Any]]:
        """Send frames one by one; what is told of them all."""
        return [answer for frame in frames for answer in self._send(frame)]

    def together(self, *frames: Frame | dict[str, Any]) -> list[dict[str, Any]]:
        """Send frames before the engine looks at the first of them."""
        messages = [m for frame in frames for m in self.dialect.take(_frame(frame))]
        return self._say([event for message in messages for event in self._events(message)])

    def _send(self, frame: Frame | dict[str, Any]) -> list[dict[str, Any]]:
        try:
            messages = self.dialect.take(_frame(frame))
        except DragomanError as error:
            return self._say([ErrorEvent(0, error.code, str(error))])
        return self._say([event for message in messages for event in self._events(message)])

    def _events(self, message: ClientMessage) -> list[Event]:
        if isinstance(message, SessionConfig):
            self.session = FakeSession(None, message, FakeTranslator())
            self.configs.append(message)
            return [SessionUpdated({}, 0)]
        assert self.session is not None, "the session was not declared"
        if isinstance(message, LookaheadChange):
            self.session.set_max_lookahead_ms(message.max_lookahead_ms)
            return [SessionUpdated({}, 0)]
        if isinstance(message, bytes):
            self.session.write(message)
        elif message is Command.CLOSE:
            self.session.close_input()
        if message is not Command.FLUSH:
            return _stepped(self.session)
        fork = self.session.begin_flush()
        while fork.ready():
            fork.step()
        return self.session.end_flush(fork)

    def _say(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        return told([frame for event in events for frame in self.dialect.say(event)])


def _stepped(session: FakeSession) -> list[Event]:
    while session.ready():
        session.step()
    return session.take_events()


def _frame(frame: Frame | dict[str, Any]) -> Frame:
    return json.dumps(frame) if isinstance(frame, dict) else frame


def told(frames: Sequence[Frame]) -> list[dict[str, Any]]:
    return [json.loads(frame) for frame in frames]
