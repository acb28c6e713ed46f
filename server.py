"""Everything that has a socket: live transcription and translation over WebSocket.

Text frames are JSON events, binary frames are PCM. The event loop only moves messages; one engine thread does
all computing, and takes every session that has enough audio into one batch.

    client → _read → inbox → engine: write, tick → outbox → _write → client

Both queues are bounded. A client that sends too fast is not read from until the engine has caught up; one
that does not read is not computed for, and soon dropped.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import signal
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NamedTuple

from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_websockets
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close, CloseCode
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from metrics import TEXT_FORMAT, Metrics
from models.recognizer import Recognizer
from models.translator import Translator
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import (
    ErrorEvent,
    Event,
    SessionClosed,
    SessionCreated,
    SessionUpdated,
    TranscriptDelta,
    TranslationDelta,
)
from streaming.interpreter import translate_ahead
from streaming.session import Session, SessionConfig, tick
from streaming.speculation import Speculation

PATH: Final = "/v1/realtime/translations"
SUBPROTOCOL: Final = Subprotocol("dragoman.v1")
"""What the service speaks; a client need not offer it, but a browser has to where it sends its token as another."""

METRICS_PATH: Final = "/metrics"

_TOKEN_SUBPROTOCOL: Final = "dragoman.token."

_DEFAULT_RATE_HZ: Final = 24_000  # what a client of OpenAI's protocol means when it declares none
_MAX_MESSAGE_BYTES: Final = 1 << 20
_MAX_WAITING_S: Final = 30  # audio that waits for the engine before the client is no longer read from
_MAX_WAITING_MESSAGES: Final = 1_000
_MAX_WAITING_EVENTS: Final = 256  # events that wait for the client before the engine leaves it alone
_MAX_AHEAD: Final = 4  # sessions that are translated ahead together
_SEND_TIMEOUT_S: Final = 20.0
_GOODBYE_TIMEOUT_S: Final = 5.0
_LATE_S: Final = 5.0  # how long a session may lag by more than it should
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_LOOPBACK_HOST: Final = re.compile(r"(127\.0\.0\.1|\[::1\]|localhost)(:\d+)?")

_PAGE: Final = Path(__file__).parent / "client" / "page"
_PAGE_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("page", "session", "audio", "capture", "captions", "subtitles")
    },
}
_PAGE_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self), display-capture=(self)",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How the service is run.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        max_sessions: Sessions at a time; a further client is refused with HTTP 503.
        translate_ahead: Whether to translate what has not been told yet while there is nothing else to do.
        idle_timeout_s: Seconds without a message after which a session ends.
        max_session_s: Seconds after which a session's audio ends; None sets no limit.
        max_lag_s: Seconds of audio that a session may be behind for a while before the newest that lags is ended;
            more than the model's look-ahead, and less than the 30 s that may wait. None ends none.
        drain_s: Seconds that sessions may still take when the service is told to end.
        metrics: Whether ``/metrics`` shows what is counted, to whoever has the token.
        origins: Web origins whose pages may connect beside the service's own; programs, which send none, always may.
        token: Secret that a client must send, as ``Authorization: Bearer`` or as a subprotocol; None asks for none.
        tls_cert: Certificate chain in PEM, for ``wss``.
        tls_key: Private key in PEM, if the chain's file does not hold it.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    max_sessions: int = 16
    translate_ahead: bool = False
    idle_timeout_s: float = 60.0
    max_session_s: float | None = None
    max_lag_s: float | None = None
    drain_s: float = 5.0
    metrics: bool = False
    origins: tuple[str, ...] = ()
    token: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


class Command(Enum):
    """What a client can ask for beside settings and audio."""

    FLUSH = "session.input_audio_buffer.commit"
    CLOSE = "session.close"


@dataclass(frozen=True)
class LookaheadChange:
    """What a client may still change when its audio has begun; as in `SessionConfig`."""

    max_lookahead_ms: int | None


ClientMessage = SessionConfig | LookaheadChange | bytes | Command


class _Arrival(NamedTuple):
    """Audio that came in."""

    audio_ms: float  # the session's, with this
    at_s: float  # the clock when it came
    due_s: float  # and when it would be over, were it spoken from then on


class Stream:
    """One client's session: its queues on the side of the event loop, its state on the side of the engine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.session: Session | None = None  # the engine's
        self.inbox: deque[ClientMessage] = deque()
        self.outbox: asyncio.Queue[Event | CloseCode] = asyncio.Queue()
        self.declared = False  # the client has said what it will send
        self.ended = False  # no more audio is taken
        self.over = False  # nothing more is to be computed
        self.has_room = asyncio.Event()
        self.has_room.set()
        self._loop = loop
        self.waiting_bytes = 0
        self._max_waiting_bytes = 0
        self._format = AudioFormat()
        self._heard_bytes = 0
        self._arrivals: deque[_Arrival] = deque()
        self._due_s = 0.0

    def put(self, message: ClientMessage) -> None:
        """Queue a message for the engine, after the defaults if it is the first; called on the event loop."""
        if isinstance(message, SessionConfig):
            self.declared = True
            self._format = message.audio
            self._max_waiting_bytes = _MAX_WAITING_S * self.bytes_per_s
        elif not self.declared:
            self.put(SessionConfig(AudioFormat(sample_rate_hz=_DEFAULT_RATE_HZ)))
        if isinstance(message, bytes):
            self._arrive(len(message))
        self.ended |= message is Command.CLOSE
        self.inbox.append(message)
        self._account(_size(message))

    def finish(self, code: str, message: str) -> None:
        """End the audio with an error, unless it has ended; the last words still come. Called on the event loop."""
        if not self.ended and not self.over:
            self.tell(ErrorEvent(0, code, message))
            self.put(Command.CLOSE)

    def _arrive(self, size_bytes: int) -> None:
        now_s = time.monotonic()
        self._heard_bytes += size_bytes
        self._due_s = max(now_s, self._due_s) + size_bytes / self.bytes_per_s
        self._arrivals.append(_Arrival(1000 * self._heard_bytes / self.bytes_per_s, now_s, self._due_s))

    @property
    def bytes_per_s(self) -> int:
        """Of the audio as the client sends it."""
        return self._format.sample_rate_hz * self._format.bytes_per_sample

    def lag_s(self, now_s: float) -> float:
        """Audio that is here, would be over by now at the pace of speech, and is not decided.

        A file that a client sends at once lags no more than the same file spoken would. Called on the engine's thread.
        """
        if self.session is None:
            return 0.0
        due_ms = max((arrival.audio_ms for arrival in self._arrivals.copy() if arrival.due_s <= now_s), default=0.0)
        return max(0.0, due_ms - self.session.decided_ms) / 1000

    def timed(self, events: Sequence[Event]) -> list[Event]:
        """Write into deltas how long the audio that they needed has been here; called on the engine's thread."""
        now, timed, arrivals = time.monotonic(), list(events), self._arrivals.copy()  # the loop may add to it
        for i, event in enumerate(events):
            if isinstance(event, TranscriptDelta | TranslationDelta) and event.emitted_ms is not None:
                needed_ms = event.emitted_ms
                arrived = next((a.at_s for a in arrivals if a.audio_ms >= needed_ms), now)
                timed[i] = replace(event, backlog_ms=round(1000 * (now - arrived)))
        decided_ms = self.session.decided_ms if self.session else 0
        while self._arrivals and self._arrivals[0].audio_ms < decided_ms:
            self._arrivals.popleft()
        return timed

    def took(self, message: ClientMessage) -> None:
        """Tell that the engine is done with a message; called on the engine's thread."""
        self._on_loop(self._account, -_size(message))

    def tell(self, *told: Event | CloseCode) -> None:
        """Queue events for the client, and at last the code to close with; called on any thread."""
        if told:
            self._on_loop(self._put_all, told)

    def fail(self, code: str, message: str, close_code: CloseCode) -> None:
        """End the session with an error; called on any thread."""
        self.over = True
        self.tell(ErrorEvent(0, code, message), close_code)
        self._on_loop(self.has_room.set)  # what still comes is read, and passed over

    def _put_all(self, told: Sequence[Event | CloseCode]) -> None:
        for item in told:
            self.outbox.put_nowait(item)

    def _account(self, change_bytes: int) -> None:
        self.waiting_bytes += change_bytes
        full = self.waiting_bytes > self._max_waiting_bytes or len(self.inbox) > _MAX_WAITING_MESSAGES
        if full and not self.over:
            self.has_room.clear()
        else:
            self.has_room.set()

    def _on_loop(self, function: Callable[..., object], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _size(message: ClientMessage) -> int:
    return len(message) if isinstance(message, bytes) else 0


class Engine:
    """The one thread that computes, for all sessions together."""

    def __init__(
        self,
        recognizer: Recognizer,
        translator: Translator | None,
        speculation: Speculation | None,
        metrics: Metrics,
        *,
        ahead: bool = False,
        max_lag_s: float | None = None,
    ) -> None:
        self._recognizer = recognizer
        self._translator = translator
        self._speculation = speculation
        self._metrics = metrics
        self._ahead = ahead
        self._max_lag_s = max_lag_s
        self._late_since_s: dict[Stream, float] = {}
        self._streams: list[Stream] = []  # replaced as a whole, so that the thread may walk it
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def sessions(self) -> int:
        """How many sessions there are."""
        return len(self._streams)

    @property
    def waiting_bytes(self) -> int:
        """Audio that waits for the engine."""
        return sum(stream.waiting_bytes for stream in self._streams)

    @property
    def waiting_events(self) -> int:
        """Events that wait for their clients."""
        return sum(stream.outbox.qsize() for stream in self._streams)

    def add(self, stream: Stream) -> None:
        """Begin to work for a session."""
        self._streams = [*self._streams, stream]

    def remove(self, stream: Stream) -> None:
        """Forget a session."""
        self._streams = [other for other in self._streams if other is not stream]

    def wake(self) -> None:
        """Tell that there may be something to do: a message came in, or room for events."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread after its present step."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def end_all(self, code: str, message: str, close_code: CloseCode) -> None:
        """End every session with the same error."""
        for stream in self._streams:
            stream.fail(code, message, close_code)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            while not self._stopping and self._step():
                pass

    def _step(self) -> bool:
        """Take in what has come and make one step for all that are ready; False if there was nothing."""
        streams = [s for s in self._streams if not s.over and s.outbox.qsize() < _MAX_WAITING_EVENTS]
        fed = [self._guard([stream], partial(self._feed, stream)) for stream in streams]
        ready = {s: s.session for s in streams if not s.over and s.session and s.session.ready()}
        if ready:
            self._guard(list(ready), partial(self._tick, list(ready.values())))
        for stream in streams:
            self._guard([stream], partial(self._collect, stream))
        self._relieve(streams)
        return any(fed) or bool(ready) or (self._ahead and self._translate_ahead(streams))

    def _tick(self, sessions: Sequence[Session]) -> None:
        began_s = time.perf_counter()
        tick(sessions)
        self._metrics.ticked(len(sessions), time.perf_counter() - began_s)

    def _relieve(self, streams: Sequence[Stream]) -> None:
        """Where one session has lagged for too long, end the newest that lags: the others get its share."""
        if self._max_lag_s is None:
            return
        now_s = time.monotonic()
        lags_s = {s: s.lag_s(now_s) for s in streams if not s.over}
        late = [s for s, lag_s in lags_s.items() if lag_s > self._max_lag_s]
        self._late_since_s = {s: self._late_since_s.get(s, now_s) for s in late}
        if any(now_s - since_s >= _LATE_S for since_s in self._late_since_s.values()):
            # The oldest is late first. One that came after it and will soon be as late goes before it.
            newest = [s for s, lag_s in lags_s.items() if lag_s > self._max_lag_s / 2][-1]
            sentence = f"the service is overloaded, and this session {lags_s[newest]:.1f} s behind:"
            newest.fail("overloaded", f"{sentence} connect again in a while", CloseCode.TRY_AGAIN_LATER)
            self._late_since_s = {}  # it takes a while to see what that did for the others

    def _translate_ahead(self, streams: Sequence[Stream]) -> bool:
        """One forward for a few sessions, so short that what comes meanwhile hardly waits; False if none is needed."""
        expecting = {s: s.session for s in streams if not s.over and s.session and s.session.expects}
        some = dict(list(expecting.items())[:_MAX_AHEAD])
        return self._guard(list(some), partial(translate_ahead, list(some.values())))

    def _feed(self, stream: Stream) -> bool:
        """Hand over messages until the session can make a step; False if there was none."""
        fed = False
        while stream.inbox and not (stream.session is not None and stream.session.ready()):
            message = stream.inbox.popleft()
            stream.took(message)
            fed = True
            if isinstance(message, SessionConfig):
                stream.session = Session(self._recognizer, message, self._translator, self._speculation)
                stream.tell(self._updated(message))
                continue
            assert stream.session is not None, "the first message declares the session"
            if isinstance(message, bytes):
                try:
                    stream.session.write(message)
                except DragomanError:
                    self._flush(stream, stream.session)  # what was said before
                    raise
            elif isinstance(message, LookaheadChange):
                self._change(stream, stream.session, message)
            elif message is Command.FLUSH:
                self._flush(stream, stream.session)
            else:
                stream.session.close_input()
        return fed

    def _change(self, stream: Stream, session: Session, change: LookaheadChange) -> None:
        try:
            session.set_max_lookahead_ms(change.max_lookahead_ms)
        except DragomanError as error:
            stream.tell(ErrorEvent(0, error.code, str(error)))
        else:
            stream.tell(self._updated(session.config))

    def _updated(self, config: SessionConfig) -> SessionUpdated:
        return SessionUpdated(describe(config, self._recognizer, self._translator), 0)

    def _flush(self, stream: Stream, session: Session) -> None:
        stream.tell(*stream.timed([*session.take_events(), *session.flush()]))

    def _collect(self, stream: Stream) -> None:
        if stream.session is None or stream.over:
            return
        events = stream.timed(stream.session.take_events())
        stream.tell(*events)
        if any(isinstance(event, SessionClosed) for event in events):
            stream.over = True
            stream.tell(CloseCode.NORMAL_CLOSURE)

    def _guard(self, streams: Sequence[Stream], work: Callable[[], bool | None]) -> bool:
        """Do some work for some sessions; what goes wrong in it ends these and no others."""
        try:
            return bool(work())
        except DragomanError as error:
            failure = (error.code, str(error), CloseCode.INVALID_DATA)
        except Exception:
            logger.exception("%d sessions end with an internal error", len(streams))
            message = "the server failed while it worked on this session: connect again"
            failure = ("internal_error", message, CloseCode.INTERNAL_ERROR)
        for stream in streams:
            stream.fail(*failure)
        return True


class Service:
    """The WebSocket side: handshakes, messages in, events out."""

    def __init__(
        self,
        recognizer: Recognizer,
        settings: Settings,
        translator: Translator | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """Prepare the service and start its engine; `start` opens the socket."""
        self._recognizer = recognizer
        self._translator = translator
        self._settings = settings
        self._metrics = Metrics()
        self._engine = Engine(
            recognizer,
            translator,
            speculation,
            self._metrics,
            ahead=settings.translate_ahead,
            max_lag_s=settings.max_lag_s,
        )
        self._metrics.sessions.set_function(lambda: self._engine.sessions)
        self._metrics.max_sessions.set(settings.max_sessions)
        self._metrics.input_queue_bytes.set_function(lambda: self._engine.waiting_bytes)
        self._metrics.output_queue_events.set_function(lambda: self._engine.waiting_events)
        self._draining = False
        self._empty = asyncio.Event()  # there is no session
        self._empty.set()
        self._page = {path: (kind, (_PAGE / name).read_text("utf-8")) for path, (name, kind) in _PAGE_FILES.items()}
        self._server: Server | None = None

    async def start(self) -> str:
        """Listen; return the URL of the service.

        Raises:
            OSError: The address is in use or not this machine's, or the certificate cannot be read.
        """
        tls = None
        if self._settings.tls_cert is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(self._settings.tls_cert, self._settings.tls_key)
        self._server = await serve_websockets(
            self._handle,
            self._settings.host,
            self._settings.port,
            process_request=self._admit,
            select_subprotocol=_select_subprotocol,
            compression=None,  # PCM does not compress
            max_size=_MAX_MESSAGE_BYTES,
            # The answer to a ping waits behind audio that is not read yet, so a late one says little about a
            # client that sends fast. One that has gone is noticed by the idle and send timeouts.
            ping_timeout=None,
            ssl=tls,
        )
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        port = self._server.sockets[0].getsockname()[1]
        return f"{'wss' if tls else 'ws'}://{host}:{port}{PATH}"

    async def drain(self) -> None:
        """Take no more sessions, and wait until those that there are have finished, or for `drain_s`."""
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), self._settings.drain_s)

    async def stop(self) -> None:
        """Tell every client that the server goes away, close with 1001 and stop computing."""
        if self._server is not None:
            self._server.close(close_connections=False)
            message = "the server is shutting down: connect again in a while"
            self._engine.end_all("server_shutdown", message, CloseCode.GOING_AWAY)
            try:
                await asyncio.wait_for(self._server.wait_closed(), _GOODBYE_TIMEOUT_S)
            except TimeoutError:
                logger.warning("%d clients did not take the goodbye", self._engine.sessions)
        await asyncio.to_thread(self._engine.stop)

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer what is no session with HTTP; None lets the client in."""
        path = request.path.partition("?")[0]
        if path in self._page:
            return _shown_response(connection, *self._page[path])
        if path in ("/healthz", "/readyz"):
            return self._health(connection, is_ready=path == "/readyz")
        refusal = self._refusal(path, request.headers)
        if refusal is None:
            return None if path == PATH else _shown_response(connection, TEXT_FORMAT, self._metrics.text())
        reason, status, text = refusal
        if reason and path == PATH and "Upgrade" in request.headers:
            self._metrics.refused.labels(reason).inc()
        return connection.respond(status, f"{text}\n")

    def _health(self, connection: ServerConnection, *, is_ready: bool) -> Response:
        """Whether the service runs; with `is_ready`, whether it would take a session."""
        unavailable = self._unavailable() if is_ready else None
        health = {
            "status": unavailable[0] if unavailable else "ok",
            "sessions": self._engine.sessions,
            "max_sessions": self._settings.max_sessions,
        }
        status = HTTPStatus.SERVICE_UNAVAILABLE if unavailable else HTTPStatus.OK
        return connection.respond(status, f"{json.dumps(health)}\n")

    def _refusal(self, path: str, headers: Headers) -> tuple[str, HTTPStatus, str] | None:
        """Why a client may not begin a session or see the metrics, if it may not: reason, status and sentence."""
        is_metrics = path == METRICS_PATH and self._settings.metrics
        if path != PATH and not is_metrics:
            return "", HTTPStatus.NOT_FOUND, f"there is no {path} here: connect to {PATH}"
        if not self._allows_origin(headers):
            origin = _shown(", ".join(headers.get_all("Origin")))
            return "origin", HTTPStatus.FORBIDDEN, f"pages of {origin} may not connect: --allow-origin lets them"
        if self._settings.token is not None and not _has_token(headers, self._settings.token):
            text = "the token is missing or wrong: send Authorization: Bearer TOKEN"
            return "token", HTTPStatus.UNAUTHORIZED, text
        if not is_metrics and (unavailable := self._unavailable()):
            reason, text = unavailable
            return reason, HTTPStatus.SERVICE_UNAVAILABLE, text
        return None

    def _unavailable(self) -> tuple[str, str] | None:
        """Why there is no place for another session, if there is none: reason and sentence."""
        limit = self._settings.max_sessions
        if self._draining:
            return "draining", "the service is shutting down: try again in a while"
        if self._engine.sessions >= limit:
            return "full", f"all {limit} sessions are in use: try again later"
        return None

    def _allows_origin(self, headers: Headers) -> bool:
        """Whether a program asks, or a page that may: of an origin that was named, or our own.

        On a loopback address and without a token, our own is only one with a name of this machine. Another
        name may be one that a stranger has made to point here (DNS rebinding).
        """
        origins, hosts = headers.get_all("Origin"), headers.get_all("Host")
        if not origins or all(origin in self._settings.origins for origin in origins):
            return True
        if [origin.lower().partition("://")[2] for origin in origins] != [host.lower() for host in hosts]:
            return False
        is_private = self._settings.host in _LOOPBACK and self._settings.token is None
        return not is_private or all(_LOOPBACK_HOST.fullmatch(host.lower()) for host in hosts)

    async def _handle(self, connection: ServerConnection) -> None:
        if unavailable := self._unavailable():  # others were admitted since we looked
            reason, text = unavailable
            self._metrics.refused.labels(reason).inc()
            await connection.close(CloseCode.TRY_AGAIN_LATER, text)
            return
        stream = self._begin(connection)
        logger.info("session %s begins", connection.id)
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(connection, stream))
                expiry = tasks.create_task(self._expire(stream))
                await self._write(connection, stream)
                reader.cancel()
                expiry.cancel()
        finally:
            self._end(connection, stream)
            logger.info("session %s ends", connection.id)

    def _begin(self, connection: ServerConnection) -> Stream:
        stream = Stream(asyncio.get_running_loop())
        config = SessionConfig(AudioFormat(sample_rate_hz=_DEFAULT_RATE_HZ))
        defaults = describe(config, self._recognizer, self._translator)
        stream.tell(SessionCreated({"id": str(connection.id), **defaults}, 0))
        self._engine.add(stream)
        self._empty.clear()
        self._metrics.opened.inc()
        return stream

    def _end(self, connection: ServerConnection, stream: Stream) -> None:
        stream.over = True
        self._engine.remove(stream)
        if not self._engine.sessions:
            self._empty.set()
        self._metrics.ended(_first_close(connection))

    async def _expire(self, stream: Stream) -> None:
        """End the audio when the session has had its time."""
        limit_s = self._settings.max_session_s
        if limit_s is not None:
            await asyncio.sleep(limit_s)
            stream.finish("session_expired", f"a session may take {limit_s / 60:g} minutes: connect again to go on")
            self._engine.wake()

    async def _read(self, connection: ServerConnection, stream: Stream) -> None:
        """Messages of the client -> inbox, until it closes the session or leaves.

        A message that cannot be used is answered with an error, and the session goes on. Only the first one
        must be right: audio after a refused `session.update` would be in a format that was never declared.
        """
        message: ClientMessage | None = None
        try:
            while message is not Command.CLOSE:
                await stream.has_room.wait()
                async with asyncio.timeout(self._settings.idle_timeout_s):
                    frame = await connection.recv()
                if stream.over or stream.ended:
                    continue
                try:
                    message = frame if isinstance(frame, bytes) else parse_message(frame, declared=stream.declared)
                except DragomanError as error:
                    if not stream.declared:
                        stream.fail(error.code, str(error), CloseCode.POLICY_VIOLATION)
                    else:
                        stream.tell(ErrorEvent(0, error.code, str(error)))
                    continue
                stream.put(message)
                if isinstance(message, bytes):
                    self._metrics.audio_s.inc(len(message) / stream.bytes_per_s)
                self._engine.wake()
        except TimeoutError:
            sentence = f"nothing came for {self._settings.idle_timeout_s:g} s: send audio or session.close"
            stream.fail("idle_timeout", sentence, CloseCode.POLICY_VIOLATION)
        except ConnectionClosed:
            stream.tell(CloseCode.NORMAL_CLOSURE)  # lets the writer end

    async def _write(self, connection: ServerConnection, stream: Stream) -> None:
        """Outbox -> client, numbered, until the session is over."""
        seq = 0
        try:
            while not isinstance(item := await stream.outbox.get(), CloseCode):
                async with asyncio.timeout(_SEND_TIMEOUT_S):
                    await connection.send(replace(item, seq=seq).to_json())
                self._metrics.told(item)
                seq += 1
                self._engine.wake()
            await connection.close(item)
        except TimeoutError:
            logger.info("session %s: the client does not read", connection.id)
            self._metrics.slow_readers.inc()
            connection.transport.abort()
        except ConnectionClosed:
            pass


def _first_close(connection: ServerConnection) -> Close | None:
    """The close frame of whichever side closed; None where the connection was lost or dropped."""
    protocol = connection.protocol
    return protocol.close_rcvd if protocol.close_rcvd_then_sent else protocol.close_sent


def _shown_response(connection: ServerConnection, kind: str, text: str) -> Response:
    """What a browser may show and not keep: a file of the web page, or the metrics."""
    response = connection.respond(HTTPStatus.OK, text)
    del response.headers["Content-Type"]
    response.headers.update({"Content-Type": f"{kind}; charset=utf-8", **_PAGE_HEADERS})
    return response


def _has_token(headers: Headers, token: str) -> bool:
    """Whether a client sends the token: in a header, or, as browsers cannot, among its subprotocols."""
    encoded = base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")
    offered = [part.strip() for value in headers.get_all("Sec-WebSocket-Protocol") for part in value.split(",")]
    pairs = [(given, f"Bearer {token}") for given in headers.get_all("Authorization")]
    pairs += [(given, f"{_TOKEN_SUBPROTOCOL}{encoded}") for given in offered]
    # What is no UTF-8 comes with surrogates.
    return any(
        [hmac.compare_digest(given.encode(errors="surrogateescape"), wanted.encode()) for given, wanted in pairs]
    )


def _select_subprotocol(_: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Ours, if it is offered; never the one that carries the token, which would be sent back."""
    return SUBPROTOCOL if SUBPROTOCOL in offered else None


def describe(config: SessionConfig, recognizer: Recognizer, translator: Translator | None = None) -> dict[str, Any]:
    """The settings of a session as its client is told them, in the shape of ``session.update``, and what there is.

    Beside the settings stand ``model`` and ``translator``: its ``model``, the ``languages`` and ``latencies`` that it
    knows and the ``policy`` by which it decides when to write; null without one.
    """
    fmt = {
        "type": "audio/pcm",
        "rate": config.audio.sample_rate_hz,
        "channels": config.audio.channels,
        "encoding": config.audio.encoding,
    }
    return {
        "model": recognizer.name,
        "translator": None if translator is None else _describe_translator(translator),
        "audio": {"input": {"format": fmt}, "output": {"languages": list(config.languages)}},
        "latency": config.latency,
        "glossary": config.glossary,
        "decoder": config.decoder,
        "max_lookahead_ms": config.max_lookahead_ms,
        "lookahead": config.lookahead or ("adaptive" if recognizer.adaptive else "fixed"),
        "endpoint_silence_ms": config.endpoint_silence_ms,
    }


def _describe_translator(translator: Translator) -> dict[str, Any]:
    return {
        "model": translator.name,
        "languages": list(translator.config.targets),
        "latencies": list(translator.config.latencies),
        "policy": translator.policy,
    }


def parse_message(text: str, *, declared: bool = False) -> ClientMessage:
    """Read one JSON event of a client.

    Args:
        text: The event.
        declared: Whether the session has been declared, so that little of it can still be changed.

    Raises:
        DragomanError: With a code, and a sentence that names the field and says what belongs there.
    """
    try:
        event = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DragomanError("invalid_json", f"the message is not JSON: {error}") from None
    kind = event.get("type") if isinstance(event, dict) else None
    match kind:
        case "session.update":
            settings = _section(event, "the event", "type", "event_id", "session").get("session")
            return _lookahead_change(settings) if declared else _session_config(settings)
        case "session.input_audio_buffer.append":
            audio = _value(_section(event, "the event", "type", "event_id", "audio"), "audio", str, "")
            try:
                return base64.b64decode(audio, validate=True)
            except (binascii.Error, ValueError):
                raise DragomanError("invalid_value", "audio is not base64") from None
        case Command.FLUSH.value | Command.CLOSE.value:
            _section(event, "the event", "type", "event_id")
            return Command(kind)
    raise DragomanError(
        "unknown_event",
        f"the type of the event is {_shown(kind)}: send session.update, session.input_audio_buffer.append,"
        f" {Command.FLUSH.value} or {Command.CLOSE.value}",
    )


def _session_config(value: object) -> SessionConfig:
    session = _section(
        value,
        "session",
        *("audio", "latency", "glossary", "decoder", "max_lookahead_ms", "lookahead", "endpoint_silence_ms"),
    )
    audio = _section(session.get("audio"), "session.audio", "input", "output")
    audio_input = _section(audio.get("input"), "session.audio.input", "format")
    defaults = SessionConfig()
    return SessionConfig(
        audio=_audio_format(audio_input.get("format")),
        max_lookahead_ms=_value(session, "session.max_lookahead_ms", int, None),
        lookahead=_value(session, "session.lookahead", str, defaults.lookahead),
        decoder=_value(session, "session.decoder", str, defaults.decoder),
        endpoint_silence_ms=_value(session, "session.endpoint_silence_ms", int, defaults.endpoint_silence_ms),
        languages=_languages(audio.get("output")),
        latency=_value(session, "session.latency", str, defaults.latency),
        glossary={} if session.get("glossary") is None else session["glossary"],
    )


def _audio_format(value: object) -> AudioFormat:
    where, defaults = "session.audio.input.format", AudioFormat()
    fmt = _section(value, where, "type", "rate", "channels", "encoding")
    if _value(fmt, f"{where}.type", str, "audio/pcm") != "audio/pcm":
        raise DragomanError("unsupported_encoding", f"{where}.type is {_shown(fmt['type'])}: send audio/pcm")
    return AudioFormat(
        encoding=_value(fmt, f"{where}.encoding", str, defaults.encoding),
        sample_rate_hz=_value(fmt, f"{where}.rate", int, _DEFAULT_RATE_HZ),
        channels=_value(fmt, f"{where}.channels", int, defaults.channels),
    )


def _languages(value: object) -> tuple[str, ...]:
    """The languages to translate into, given as a list, or as OpenAI does, as one string."""
    where = "session.audio.output"
    output = _section(value, where, "language", "languages")
    one, several = _value(output, f"{where}.language", str, None), output.get("languages")
    if several is None:
        return () if one is None else (one,)
    if one is not None:
        raise DragomanError("invalid_value", f"{where} has both language and languages: send one of them")
    if not isinstance(several, list) or not all(isinstance(language, str) for language in several):
        raise DragomanError(
            "invalid_value", f'{where}.languages is {_shown(several)}: it must be a list of languages, such as ["es"]'
        )
    return tuple(dict.fromkeys(several))


def _lookahead_change(value: object) -> LookaheadChange:
    if not isinstance(value, dict) or value.keys() != {"max_lookahead_ms"}:
        raise DragomanError(
            "session_already_declared",
            "after the first session.update or audio, only session.max_lookahead_ms can be changed: send it alone,"
            " or connect again to change the rest",
        )
    return LookaheadChange(_value(value, "session.max_lookahead_ms", int, None))


def _section(value: object, path: str, *keys: str) -> dict[str, Any]:
    """A JSON object with none but these keys; left out or null, an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DragomanError("invalid_value", f"{path} is {_shown(value)}: it must be an object")
    for key in value:
        if key not in keys:
            raise DragomanError("unknown_field", f"{path} has no field {_shown(key)}: it takes {', '.join(keys)}")
    return value


def _value(section: dict[str, Any], path: str, kind: type, default: Any) -> Any:
    """The value at the last key of `path`, of the type `kind`; left out or null, the default."""
    value = section.get(path.rpartition(".")[2])
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {str: "a string", int: "a whole number"}[kind]
        raise DragomanError("invalid_value", f"{path} is {_shown(value)}: it must be {wanted}")
    return value


def _shown(value: object) -> str:
    """A value of the client's, short enough to be repeated to it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


async def serve(
    recognizer: Recognizer,
    settings: Settings,
    translator: Translator | None = None,
    speculation: Speculation | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, let sessions finish until another one comes, and say goodbye to the rest."""
    service = Service(recognizer, settings, translator, speculation)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        url = await service.start()
        page = f"{url.removesuffix(PATH).replace('ws', 'http', 1)}/"
        print(
            f"dragoman: {recognizer.name} is listening at {url} and shows a page at {page}", file=sys.stderr, flush=True
        )
        if settings.token is None and settings.host not in _LOOPBACK:
            logger.warning("whoever reaches %s can use the service: --token asks for a secret", settings.host)
        await stop.wait()
        stop.clear()
        ends = [asyncio.create_task(wait) for wait in (service.drain(), stop.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
    finally:
        await service.stop()
