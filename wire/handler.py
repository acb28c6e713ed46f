"""One conversation between a client and the engine, whatever dialect they speak and whatever carries their frames.

    client → transport → read → inbox → engine → outbox → write → transport → client

The event loop only moves messages. A client that sends too fast is not read from until the engine has caught up; one
that does not read is not computed for, and soon dropped.
"""

import asyncio
import logging
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from metrics import Metrics
from models.recognizer import Recognizer
from models.translator import AnyTranslator
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event
from streaming.scheduler import Engine, Stream
from streaming.speculation import Speculation
from wire.dialect import Dialect, Frame
from wire.messages import DEFAULTS, CloseCode
from wire.translations import describe

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Size of a frame, above which a transport closes with 1009."""

_SEND_TIMEOUT_S: Final = 20.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What sessions may take.

    Attributes:
        max_sessions: Sessions at a time; a further client is refused with HTTP 503.
        translate_ahead: Whether to translate what has not been told yet while there is nothing else to do.
        idle_timeout_s: Seconds without a message after which a session ends.
        max_session_s: Seconds after which a session's audio ends; None sets no limit.
        max_lag_s: Seconds of audio that a session may be behind for a while before the newest that lags is ended;
            more than the model's look-ahead, and less than the 30 s that may wait. None ends none.
        drain_s: Seconds that sessions may still take when the service is told to end.
    """

    max_sessions: int = 16
    translate_ahead: bool = False
    idle_timeout_s: float = 60.0
    max_session_s: float | None = None
    max_lag_s: float | None = None
    drain_s: float = 5.0


class TransportClosed(Exception):
    """The connection has ended, from whichever side."""


class Transport(Protocol):
    """What carries the frames of one client; ordered, and closed once."""

    async def recv(self) -> Frame:
        """The next frame of the client.

        Raises:
            TransportClosed: There is none.
        """

    async def send(self, frame: Frame) -> None:
        """Hand a frame over; wait while the client does not read.

        Raises:
            TransportClosed: The connection has ended.
        """

    async def close(self, code: int, reason: str = "") -> None:
        """Say goodbye, and wait a short while for the client to do so."""

    def abort(self) -> None:
        """Drop the connection without a word."""

    @property
    def close_code(self) -> int | None:
        """The code of whichever side closed first; None where the connection was lost or dropped."""


class Conversation:
    """One client's session as the event loop sees it: its dialect, and waiting for what the engine does."""

    def __init__(self, dialect: Dialect) -> None:
        self.id = str(uuid.uuid4())
        self.dialect = dialect
        loop = asyncio.get_running_loop()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(self._look)

        self.stream = Stream(notify)
        self._told, self._room = asyncio.Event(), asyncio.Event()

    def _look(self) -> None:
        self._told.set()
        self._room.set()

    async def room(self) -> None:
        """Wait until the engine takes more."""
        while not self.stream.has_room:
            self._room.clear()
            await self._room.wait()

    async def told(self) -> Event | CloseCode:
        """The next event, or at last the code to close with."""
        while not self.stream.outbox:
            self._told.clear()
            await self._told.wait()
        return self.stream.outbox.popleft()


class Handler:
    """The sessions of a service, and their engine.

    Args:
        recognizer: The model.
        limits: What sessions may take.
        translator: What translates, if sessions may ask for it.
        speculation: Shared by the sessions; None for none.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        limits: Limits,
        translator: AnyTranslator | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.limits = limits
        self.metrics = Metrics()
        self._describe = partial(describe, recognizer=recognizer, translator=translator)
        self.engine = Engine(
            recognizer,
            translator,
            speculation,
            slots=limits.max_sessions,
            describe=self._describe,
            ticked=self.metrics.ticked,
            ahead=limits.translate_ahead,
            max_lag_s=limits.max_lag_s,
        )
        self.engine.start()
        self.metrics.sessions.set_function(lambda: self.sessions)
        self.metrics.max_sessions.set(limits.max_sessions)
        self.metrics.input_queue_bytes.set_function(lambda: self.engine.waiting_bytes)
        self.metrics.output_queue_events.set_function(lambda: self.engine.waiting_events)
        self._draining = False
        self._empty = asyncio.Event()  # there is no session
        self._empty.set()

    @property
    def sessions(self) -> int:
        """How many sessions there are."""
        return self.engine.sessions

    def unavailable(self) -> tuple[str, str] | None:
        """Why there is no place for another session, if there is none: reason and sentence."""
        limit = self.limits.max_sessions
        if self._draining:
            return "draining", "the service is shutting down: try again in a while"
        if self.sessions >= limit:
            return "full", f"all {limit} sessions are in use: try again later"
        return None

    async def drain(self) -> None:
        """Take no more sessions, and wait until those that there are have finished, or for `drain_s`."""
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self.emptied(), self.limits.drain_s)

    async def emptied(self) -> None:
        """Wait until there is no session."""
        await self._empty.wait()

    def dismiss(self) -> None:
        """Tell every client that the service goes away, and have their connections closed with 1001."""
        message = "the server is shutting down: connect again in a while"
        self.engine.end_all("server_shutdown", message, CloseCode.GOING_AWAY)

    async def stop(self) -> None:
        """Stop computing."""
        await asyncio.to_thread(self.engine.stop)

    async def converse(self, transport: Transport, dialect: Dialect) -> None:
        """Serve a client that has been admitted, until its session is over or it has gone."""
        if unavailable := self.unavailable():  # others were admitted since we looked
            reason, text = unavailable
            self.metrics.refused.labels(reason).inc()
            await transport.close(CloseCode.TRY_AGAIN_LATER, text)
            return
        conversation = self._begin(dialect)
        logger.info("session %s begins", conversation.id)
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(transport, conversation))
                expiry = tasks.create_task(self._expire(conversation.stream))
                await self._write(transport, conversation)
                reader.cancel()
                expiry.cancel()
        finally:
            self._end(conversation.stream)
            self.metrics.ended(transport.close_code)
            logger.info("session %s ends", conversation.id)

    def _begin(self, dialect: Dialect) -> Conversation:
        conversation = Conversation(dialect)
        for message in dialect.opening():
            conversation.stream.put(message)
        self.engine.add(conversation.stream)
        self.engine.wake()
        self._empty.clear()
        self.metrics.opened.inc()
        return conversation

    def _end(self, stream: Stream) -> None:
        stream.over = True
        self.engine.remove(stream)
        if not self.sessions:
            self._empty.set()

    async def _expire(self, stream: Stream) -> None:
        """End the audio when the session has had its time."""
        limit_s = self.limits.max_session_s
        if limit_s is not None:
            await asyncio.sleep(limit_s)
            stream.finish("session_expired", f"a session may take {limit_s / 60:g} minutes: connect again to go on")
            self.engine.wake()

    async def _read(self, transport: Transport, conversation: Conversation) -> None:
        """Frames of the client → inbox, until it closes the session or leaves.

        A frame that cannot be used is answered with an error, and the session goes on. Only the first one
        must be right: audio after a refused declaration would be in a format that was never declared.
        """
        stream = conversation.stream
        try:
            while not stream.ended:
                await conversation.room()
                async with asyncio.timeout(self.limits.idle_timeout_s):
                    frame = await transport.recv()
                if not stream.over and not stream.ended:
                    self._take(conversation, frame)
                    self.engine.wake()
        except TimeoutError:
            sentence = f"nothing came for {self.limits.idle_timeout_s:g} s: send audio or session.close"
            stream.fail("idle_timeout", sentence, CloseCode.POLICY_VIOLATION)
        except TransportClosed:
            stream.tell(CloseCode.NORMAL_CLOSURE)  # lets the writer end

    def _take(self, conversation: Conversation, frame: Frame) -> None:
        stream = conversation.stream
        try:
            messages = conversation.dialect.take(frame)
        except DragomanError as error:
            if stream.declared:
                stream.tell(ErrorEvent(0, error.code, str(error)))
            else:
                stream.fail(error.code, str(error), CloseCode.POLICY_VIOLATION)
            return
        for message in messages:
            stream.put(message)
            if isinstance(message, bytes):
                self.metrics.audio_s.inc(len(message) / stream.bytes_per_s)

    async def _write(self, transport: Transport, conversation: Conversation) -> None:
        """Outbox → client, in the words of the dialect, until the session is over."""
        try:
            for frame in conversation.dialect.greeting(conversation.id, self._describe(DEFAULTS)):
                await self._send(transport, frame)
            while not isinstance(item := await conversation.told(), CloseCode):
                for frame in conversation.dialect.say(item):
                    await self._send(transport, frame)
                self.metrics.told(item)
                self.engine.wake()
            await transport.close(item)
        except TimeoutError:
            logger.info("session %s: the client does not read", conversation.id)
            self.metrics.slow_readers.inc()
            transport.abort()
        except TransportClosed:
            pass

    async def _send(self, transport: Transport, frame: Frame) -> None:
        async with asyncio.timeout(_SEND_TIMEOUT_S):
            await transport.send(frame)
