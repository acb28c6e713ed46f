"""One conversation between a client and the engine, whatever dialect they speak and whatever carries their frames.

    client → transport → read → inbox → engine → outbox → write → transport → client

The event loop only moves messages. A client that sends too fast is not read from until the engine has caught up; one
that does not read is not computed for, and soon dropped.
"""

import asyncio
import hmac
import logging
import secrets
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, Protocol

from metrics import Metrics
from models.recognizer import Recognizer
from models.translator import AnyTranslator
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionResumed
from streaming.messages import DEFAULTS, CloseCode, Resume
from streaming.processes import Engines, Ticked
from streaming.scheduler import Engine, Stream
from streaming.speculation import Speculation
from wire.dialect import Dialect, Frame
from wire.translations import describe

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Size of a frame, above which a transport closes with 1009."""

_SEND_TIMEOUT_S: Final = 20.0
_RESUME_TIMEOUT_S: Final = 10.0  # for a client that is back to say what it has
_MAX_SAID: Final = 1 << 20  # characters of events that are kept for a client that might have to come back

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
        resume_s: Seconds that a session waits for a client that has lost its connection; 0 for not at all.
    """

    max_sessions: int = 16
    translate_ahead: bool = False
    idle_timeout_s: float = 60.0
    max_session_s: float | None = None
    max_lag_s: float | None = None
    drain_s: float = 5.0
    resume_s: float = 30.0


class TransportClosed(Exception):
    """The connection has ended, from whichever side."""


class Models(NamedTuple):
    """What an engine computes with."""

    recognizer: Recognizer
    translator: AnyTranslator | None
    speculation: Speculation | None


@dataclass(frozen=True)
class Processes:
    """Engines in processes of their own.

    Attributes:
        count: How many.
        load: Loads the models, in each of them; can be pickled.
    """

    count: int
    load: Callable[[], Models]


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
        """The code of the client's goodbye, or of its answer to ours; None where there was none."""


class Conversation:
    """One client's session as the event loop sees it: its dialect, and waiting for what the engine does.

    Attributes:
        token: Secret with which its client may go on with it on a new connection.
        dialect: What it speaks.
        stream: Its queues.
        messages: How many frames have come.
        audio_bytes: How much audio was in them.
        claims: How often a connection has asked to carry it; the last one does.
        claimed: Whether one has asked since the present one began to.
        expiry: Ends its audio when it has had its time.
        carried: Held while a connection carries it, or its client is waited for.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.id = str(uuid.uuid4())
        self.token = secrets.token_urlsafe(24)
        self.dialect = dialect
        self.messages = self.audio_bytes = 0
        self.claims, self.claimed, self.carried = 0, asyncio.Event(), asyncio.Lock()
        self.expiry: asyncio.TimerHandle | None = None
        self._said: deque[Frame] = deque()  # what its client may not have yet
        self._said_size = 0  # in characters or bytes
        self._first = 0  # number of the first of it
        self._told, self._room = asyncio.Event(), asyncio.Event()
        # It does not know the conversation: in a cycle, ended sessions would wait for the garbage collector, which is
        # long in coming.
        self.stream = Stream(partial(_notify, asyncio.get_running_loop(), self._told, self._room))

    async def room(self) -> None:
        """Wait until the engine takes more."""
        while not self.stream.has_room:
            self._room.clear()
            await self._room.wait()

    async def told(self) -> Event | CloseCode:
        """The next event, or at last and ever again the code to close with."""
        while not self.stream.outbox:
            self._told.clear()
            await self._told.wait()
        item = self.stream.outbox[0]
        return item if isinstance(item, CloseCode) else self.stream.outbox.popleft()

    def claim(self) -> int:
        """Ask to carry it; whatever does so now ceases to."""
        self.claims += 1
        self.claimed.set()
        return self.claims

    def said(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """Keep frames that are about to be sent, as long as there is room for them."""
        if self.dialect.RESUMABLE:
            self._said.extend(frames)
            self._said_size += sum(map(len, frames))
            while self._said_size > _MAX_SAID:
                self._forget()
        return frames

    def said_after(self, seq: int) -> list[Frame]:
        """The frames after the one with this number; those up to it are not needed any more.

        Raises:
            DragomanError: ``resume_impossible`` if some of them are gone, or there is no such number.
        """
        if not self._first - 1 <= seq < self._first + len(self._said):
            raise DragomanError(
                "resume_impossible",
                f"the session cannot go on after event {seq}: its events {self._first} to"
                f" {self._first + len(self._said) - 1} are kept; begin a new one",
            )
        while self._first <= seq:
            self._forget()
        return list(self._said)

    def _forget(self) -> None:
        self._said_size -= len(self._said.popleft())
        self._first += 1


def _notify(loop: asyncio.AbstractEventLoop, *events: asyncio.Event) -> None:
    """Set events of a loop, from any thread."""

    def look() -> None:
        for event in events:
            event.set()

    with suppress(RuntimeError):  # the loop has been closed meanwhile
        loop.call_soon_threadsafe(look)


def _engine(models: Models, limits: Limits, ticked: Ticked) -> Engine:
    recognizer, translator, speculation = models
    return Engine(
        recognizer,
        translator,
        speculation,
        slots=limits.max_sessions,
        describe=partial(describe, recognizer=recognizer, translator=translator),
        ticked=ticked,
        ahead=limits.translate_ahead,
        max_lag_s=limits.max_lag_s,
    )


def _loaded(load: Callable[[], Models], limits: Limits, ticked: Ticked) -> Engine:
    return _engine(load(), limits, ticked)


class Handler:
    """The sessions of a service, and their engine.

    Args:
        recognizer: The model.
        limits: What sessions may take.
        translator: What translates, if sessions may ask for it.
        speculation: Shared by the sessions; None for none.
        processes: What computes instead of a thread of this process, which then only says what the models can do.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        limits: Limits,
        translator: AnyTranslator | None = None,
        speculation: Speculation | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.limits = limits
        self.metrics = Metrics()
        self._describe = partial(describe, recognizer=recognizer, translator=translator)
        self.engine: Engine | Engines
        if processes is None:
            self.engine = _engine(Models(recognizer, translator, speculation), limits, self.metrics.ticked)
        else:
            self.engine = Engines(partial(_loaded, processes.load, limits), processes.count, ticked=self.metrics.ticked)
        self.engine.start()
        self.metrics.sessions.set_function(lambda: self.sessions)
        self.metrics.max_sessions.set(limits.max_sessions)
        self.metrics.input_queue_bytes.set_function(lambda: self.engine.waiting_bytes)
        self.metrics.output_queue_events.set_function(lambda: self.engine.waiting_events)
        self._conversations: dict[str, Conversation] = {}
        self._draining = False
        self._dismissed = asyncio.Event()
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
        self._dismissed.set()

    async def stop(self) -> None:
        """Stop computing."""
        await asyncio.to_thread(self.engine.stop)

    def resumable(self, session_id: str) -> bool:
        """Whether there is a session that a client could go on with."""
        return session_id in self._conversations

    async def converse(self, transport: Transport, dialect: Dialect) -> None:
        """Serve a client that has been admitted, until its session is over or it has gone."""
        if dialect.resumes is not None:
            await self._resume(transport, dialect, dialect.resumes)
            return
        if unavailable := self.unavailable():  # others were admitted since we looked
            reason, text = unavailable
            self.metrics.refused.labels(reason).inc()
            await transport.close(CloseCode.TRY_AGAIN_LATER, text)
            return
        conversation = self._begin(dialect)
        await self._carry(transport, conversation, conversation.claim(), None)

    async def _resume(self, transport: Transport, dialect: Dialect, session_id: str) -> None:
        """Have a new connection carry a session that another one has carried until now."""
        with suppress(TransportClosed):
            try:
                async with asyncio.timeout(_RESUME_TIMEOUT_S):
                    frame = await transport.recv()
                (message,) = dialect.take(frame)
                assert isinstance(message, Resume)
                conversation = self._conversations.get(session_id)
                if conversation is None or not hmac.compare_digest(conversation.token.encode(), message.token.encode()):
                    sentence = "there is no such session any more, or the token is another's: begin a new one"
                    raise DragomanError("resume_unknown", sentence)
                await self._carry(transport, conversation, conversation.claim(), message.seq)
            except DragomanError as error:
                for frame in dialect.say(ErrorEvent(0, error.code, str(error))):
                    await transport.send(frame)
                await transport.close(CloseCode.POLICY_VIOLATION)
            except TimeoutError:
                await transport.close(CloseCode.POLICY_VIOLATION)

    async def _carry(self, transport: Transport, conversation: Conversation, claim: int, seq: int | None) -> None:
        """Carry a session until it is over or another connection claims it, and wait for its client to come back.

        Args:
            transport: The connection.
            conversation: The session.
            claim: Which of its claims is this connection's.
            seq: Number of the last event that the client has; None for a new session.

        Raises:
            DragomanError: The session cannot go on after that event; it has ended.
        """
        async with conversation.carried:
            if claim != conversation.claims:
                transport.abort()
                return
            conversation.claimed.clear()
            if conversation.dialect.RESUMABLE and self._conversations.get(conversation.id) is not conversation:
                raise DragomanError("resume_unknown", "the session has just ended: begin a new one")
            try:
                first = self._greeting(conversation) if seq is None else self._catch_up(conversation, seq)
                if await self._serve(transport, conversation, first):
                    await self._await_client(conversation)
            finally:
                if claim == conversation.claims:
                    self._end(conversation, transport)

    def _greeting(self, conversation: Conversation) -> Sequence[Frame]:
        defaults = self._describe(DEFAULTS)
        if conversation.dialect.RESUMABLE and self.limits.resume_s:
            defaults["resume"] = {"token": conversation.token, "within_s": self.limits.resume_s}
        return conversation.said(conversation.dialect.greeting(conversation.id, defaults))

    def _catch_up(self, conversation: Conversation, seq: int) -> Sequence[Frame]:
        """What a client that is back is told first."""
        frames = conversation.said_after(seq)
        resumed = SessionResumed(seq, conversation.messages, conversation.audio_bytes)
        logger.info("session %s goes on", conversation.id)
        return [*conversation.dialect.say(resumed), *frames]

    async def _serve(self, transport: Transport, conversation: Conversation, first: Sequence[Frame]) -> bool:
        """Carry a session as long as the connection lives; whether its client might come back."""
        writer = asyncio.create_task(self._write(transport, conversation, first))
        reader = asyncio.create_task(self._read(transport, conversation))
        claimed = asyncio.create_task(conversation.claimed.wait())
        try:
            await asyncio.wait({writer, reader, claimed}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and reader.result():  # all has been said on that side
                await asyncio.wait({writer, claimed}, return_when=asyncio.FIRST_COMPLETED)
            is_lost = not writer.done() or not writer.result()
        finally:
            for task in (writer, reader, claimed):
                task.cancel()
            await asyncio.gather(writer, reader, claimed, return_exceptions=True)
        if conversation.claimed.is_set():
            transport.abort()
        return is_lost and transport.close_code is None

    async def _await_client(self, conversation: Conversation) -> None:
        """Wait a while for a client that has lost its connection, if there is more for it."""
        stream = conversation.stream
        is_dropped = stream.over and CloseCode.NORMAL_CLOSURE not in stream.outbox
        if not conversation.dialect.RESUMABLE or not stream.declared or is_dropped:
            return
        logger.info("session %s waits for its client", conversation.id)
        waits = [asyncio.create_task(event.wait()) for event in (conversation.claimed, self._dismissed)]
        await asyncio.wait(waits, timeout=self.limits.resume_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _begin(self, dialect: Dialect) -> Conversation:
        conversation = Conversation(dialect)
        stream = conversation.stream
        for message in dialect.opening():
            assert not isinstance(message, Resume)
            stream.put(message)
        self.engine.add(stream)
        self.engine.wake()
        self._empty.clear()
        self.metrics.opened.inc()
        if self.limits.max_session_s is not None:
            conversation.expiry = asyncio.get_running_loop().call_later(
                self.limits.max_session_s, self._expire, stream, self.limits.max_session_s
            )
        if dialect.RESUMABLE:
            self._conversations[conversation.id] = conversation
        logger.info("session %s begins", conversation.id)
        return conversation

    def _end(self, conversation: Conversation, transport: Transport) -> None:
        stream = conversation.stream
        stream.over = True
        if conversation.expiry is not None:
            conversation.expiry.cancel()
        self._conversations.pop(conversation.id, None)
        self.engine.remove(stream)
        if not self.sessions:
            self._empty.set()
        self.metrics.ended(transport.close_code)
        logger.info("session %s ends", conversation.id)

    def _expire(self, stream: Stream, limit_s: float) -> None:
        """End the audio when the session has had its time."""
        stream.finish("session_expired", f"a session may take {limit_s / 60:g} minutes: connect again to go on")
        self.engine.wake()

    async def _read(self, transport: Transport, conversation: Conversation) -> bool:
        """Frames of the client → inbox, until it closes the session or leaves; whether it has closed it.

        A frame that cannot be used is answered with an error, and the session goes on. Only the first one
        must be right: audio after a refused declaration would be in a format that was never declared.
        """
        stream = conversation.stream
        try:
            while not stream.ended:
                await conversation.room()
                async with asyncio.timeout(self.limits.idle_timeout_s):
                    frame = await transport.recv()
                conversation.messages += 1
                if not stream.over and not stream.ended:
                    self._take(conversation, frame)
                    self.engine.wake()
        except TimeoutError:
            sentence = f"nothing came for {self.limits.idle_timeout_s:g} s: send audio or session.close"
            stream.fail("idle_timeout", sentence, CloseCode.POLICY_VIOLATION)
        except TransportClosed:
            return False
        return True

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
            assert not isinstance(message, Resume), "only the first frame of a connection is one"
            stream.put(message)
            if isinstance(message, bytes):
                conversation.audio_bytes += len(message)
                self.metrics.audio_s.inc(len(message) / stream.bytes_per_s)

    async def _write(self, transport: Transport, conversation: Conversation, first: Sequence[Frame]) -> bool:
        """Outbox → client, in the words of the dialect, until the session is over; False if the client is gone."""
        try:
            await self._send(transport, first)
            while not isinstance(item := await conversation.told(), CloseCode):
                frames = conversation.said(conversation.dialect.say(item))
                self.metrics.told(item)
                await self._send(transport, frames)
                self.engine.wake()
            await transport.close(item)
        except TimeoutError:
            logger.info("session %s: the client does not read", conversation.id)
            self.metrics.slow_readers.inc()
            transport.abort()
            return True
        except TransportClosed:
            return False
        return transport.close_code is not None

    async def _send(self, transport: Transport, frames: Sequence[Frame]) -> None:
        for frame in frames:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await transport.send(frame)
