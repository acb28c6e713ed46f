"""The service as other programs use it: audio in, events out, with asyncio or without.

    async with connect(url, languages=["es"]) as session:
        async def speak() -> None:
            async for pcm in microphone:
                await session.send(pcm)
            await session.finish()
        await exchange(session, speak(), print)

    with connect_sync(url, audio=AudioFormat("s16le", 48_000, 2)) as session:
        for pcm in recording:
            session.send(pcm)
            while event := session.receive(timeout_s=0):
                print(event)
        session.finish()
        for event in session:
            print(event)

A session whose connection is lost goes on over a new one, as long as the service keeps it: what was on its way is sent
again, and what comes twice is passed over.

Nothing here grows with the session. A service that falls behind holds `send` back, and events that nobody takes hold
the service back, until it lets the client go: take events while you send.
"""

import asyncio
import json
import random
import ssl
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, Self, TypedDict, TypeVar, Unpack
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import (
    ErrorEvent,
    Event,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    SessionUpdated,
    parse_event,
)

#: Far below the service's limit of 1 MiB, and so little that no message holds up the next command for long.
_MESSAGE_BYTES: Final = 1 << 16
_WAITING_EVENTS: Final = 256  # events that may wait for the caller before the service is held back
_ANSWER_TIMEOUT_S: Final = 30.0  # for the service to answer the declaration
_KEPT_BYTES: Final = 16 << 20  # sent last, and kept for a service that might not have got it
_MIN_BACKOFF_S: Final = 0.1  # between attempts to connect again, growing
_MAX_BACKOFF_S: Final = 5.0
_PING_EVERY_S: Final = 10.0
_SILENCE_S: Final = 20.0  # without an event or an answer to a ping, after which nobody is there any more
_CLOSE_TIMEOUT_S: Final = 1.0  # for the service to say goodbye, when the session is left before its end
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")

Pcm = bytes | npt.NDArray[np.int16] | npt.NDArray[np.float32]
_T = TypeVar("_T")


class ServiceError(DragomanError):
    """The service cannot be reached, refuses the client, reports an error or has gone.

    Attributes:
        event: The error that the service told, with its code; None where the connection itself is at fault.
    """

    def __init__(self, code: str, message: str, event: ErrorEvent | None = None) -> None:
        """Make the error, of what the service told or of what befell the connection."""
        super().__init__(code, message)
        self.event = event


class SessionSettings(TypedDict, total=False):
    """What a session may be asked for, under the names of the wire; what is left out is as the service has it.

    Attributes:
        languages: Languages to translate into, such as ``["es", "de"]``; none for the transcript only.
        latency: How long the translation waits for more words, ``low`` to ``high`` or ``offline``.
        glossary: Terms whose translations are fixed: ``{term: {language: translation}}``.
        max_lookahead_ms: Audio that may be heard before a sound is decided, in ms.
        lookahead: ``fixed`` or ``adaptive``.
        decoder: ``rnnt`` or ``ctc``.
        endpoint_silence_ms: Silence that closes a segment, 240 to 10,000 ms.
    """

    languages: Sequence[str]
    latency: str | None
    glossary: Mapping[str, Mapping[str, str]]
    max_lookahead_ms: int | None
    lookahead: str | None
    decoder: str | None
    endpoint_silence_ms: int | None


class LiveSession:
    """A session of the service; `connect` opens it. Iterating gives its events, `SessionClosed` as the last.

    An error that the service tells is raised as a `ServiceError` with its code. The session may live on after it, so
    iteration may be taken up again: it ends when nothing more is to come.

    Attributes:
        audio: The format of the audio that is sent.
        created: What the service has: its models, languages and latencies.
        settings: What the session runs with.
        notice: Told in a sentence when the connection is lost, and when the session goes on.
    """

    created: SessionCreated
    settings: SessionUpdated

    def __init__(
        self,
        connection: ClientConnection,
        audio: AudioFormat,
        reopen: Callable[[str], Awaitable[ClientConnection]],
        notice: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        """Wrap a fresh connection; `begin` declares the session, and `reopen` connects again to go on with one."""
        self.audio = audio
        self.notice = notice
        self._connection = connection
        self._reopen = reopen
        self._kept: deque[str | bytes] = deque()  # messages that the service might not have got
        self._kept_bytes = 0
        self._kept_from = 0  # number of the first of them
        self._next = 0  # number of the message that goes next into the present connection
        self._seq = -1  # of the last event
        self._sending = asyncio.Lock()
        self._relinking: asyncio.Task[None] | None = None
        self._catching_up: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._receiving = asyncio.Lock()
        self._listens = False  # for the next frame
        self._frames = 0  # that have come
        self._waiting: deque[Event] = deque()  # received, and not yet given to the caller
        self._error: ServiceError | None = None  # if that is what the service told last
        self._given_up: ServiceError | None = None  # why the session could not be gone on with
        self._begun = False  # the service has taken the declaration
        self._finished = False  # this side has said everything
        self._over = False  # nothing more is to be received

    async def begin(self, settings: SessionSettings) -> None:
        """Declare the session and wait until the service has taken it.

        Raises:
            ServiceError: The service cannot do what is asked, with its code.
        """
        await self._send(_declaration(self.audio, settings))
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                while not isinstance(event := await self._receive(), SessionUpdated):
                    self._waiting.append(event)
                    if isinstance(event, SessionCreated):
                        self.created = event
                    elif self._error is not None:
                        raise self._error
        except ConnectionClosed:
            raise self._lost() from None
        except TimeoutError:
            raise ServiceError("unreachable", f"the service did not answer for {_ANSWER_TIMEOUT_S:g} s") from None
        self._waiting.append(event)
        self.settings = event
        self._begun = True
        self._watching = asyncio.create_task(self._watch())

    async def send(self, pcm: Pcm) -> None:
        """Send audio of any length; wait while the service is behind.

        Args:
            pcm: Bytes in the declared format, cut anywhere; or an array of int16 or of float32 (full scale 1),
                ``[samples]`` when mono, else ``[samples, channels]``, which is sent in the declared encoding.

        Raises:
            DragomanError: ``session_closed`` after `finish`; ``audio_not_finite``.
            ServiceError: The session has ended, and why.
            ValueError: The array has another shape or type.
        """
        if self._finished:
            raise DragomanError("session_closed", "audio came after the end of the session: open a new one")
        data = to_bytes(pcm, self.audio)
        for start in range(0, len(data), _MESSAGE_BYTES):
            await self._send(data[start : start + _MESSAGE_BYTES])

    async def flush(self) -> None:
        """Have all words so far decided, as if the speaker had paused; the session goes on."""
        await self._send(json.dumps({"type": "session.input_audio_buffer.commit"}))

    async def set_max_lookahead_ms(self, max_lookahead_ms: int | None) -> None:
        """Change the look-ahead for the audio that comes after this."""
        await self._send(json.dumps({"type": "session.update", "session": {"max_lookahead_ms": max_lookahead_ms}}))

    async def finish(self) -> None:
        """End the audio; the last events still come."""
        if not self._finished:
            self._finished = True
            await self._send(json.dumps({"type": "session.close"}))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        async with self._receiving:
            if not self._waiting and self._over:
                raise StopAsyncIteration
            try:
                event = self._waiting.popleft() if self._waiting else await self._receive()
            except ConnectionClosed:
                self._over = True
                if self._error is not None:  # told already: it was the end
                    raise StopAsyncIteration from None
                raise self._lost() from None
        if isinstance(event, ErrorEvent):
            raise reported(event)
        return event

    async def _receive(self) -> Event:
        """The next event of the session, maybe an error.

        Raises:
            ConnectionClosed: There is none; all that came before has been received.
            ServiceError: ``protocol_error``, or why the session cannot go on.
        """
        while True:
            connection = self._connection
            self._listens = True
            try:
                frame = await connection.recv()
            except ConnectionClosed:
                await self._relink(connection)
                continue
            finally:
                self._listens = False
            self._frames += 1
            event = _parsed(frame)
            if event.seq > self._seq:
                break
        self._seq = event.seq
        self._error = reported(event) if isinstance(event, ErrorEvent) else None
        self._over |= isinstance(event, SessionClosed)
        return event

    async def _watch(self) -> None:
        """Give a connection up behind which nobody is any more, as when a network has gone without a word.

        The answer to a ping waits behind audio that the service has not read yet. So it is the silence that counts:
        neither an event nor an answer, while somebody waits for one.
        """
        while True:
            await asyncio.sleep(_PING_EVERY_S)
            connection, listened, frames = self._connection, self._listens, self._frames
            with suppress(ConnectionClosed):
                try:
                    async with asyncio.timeout(_SILENCE_S):
                        await (await connection.ping())
                except TimeoutError:
                    if listened and self._listens and self._frames == frames:
                        connection.transport.abort()

    async def _send(self, message: str | bytes) -> None:
        self._kept.append(message)
        self._kept_bytes += len(message)
        while self._kept_bytes > _KEPT_BYTES and self._kept_from < self._next:
            self._kept_bytes -= len(self._kept.popleft())
            self._kept_from += 1
        try:
            await self._put_on()
        except ConnectionClosed:
            async with self._receiving:  # why it has closed may stand in what nobody has looked at yet
                with suppress(ConnectionClosed):
                    while True:
                        self._waiting.append(await self._receive())
            raise (self._error or self._lost()) from None

    async def _put_on(self) -> None:
        """Send what has not been sent on the present connection, or on the next one."""
        async with self._sending:
            while self._next < self._kept_from + len(self._kept):
                connection, number = self._connection, self._next
                try:
                    await connection.send(self._kept[number - self._kept_from])
                except ConnectionClosed:
                    await self._relink(connection)
                    continue
                if self._connection is connection:
                    self._next = number + 1

    async def _catch_up(self) -> None:
        with suppress(ConnectionClosed, ServiceError):  # whoever receives is told the same
            await self._put_on()

    async def _relink(self, lost: ClientConnection) -> None:
        """Wait until the session goes on over a new connection, if it can.

        Raises:
            ConnectionClosed: The session has ended, or cannot be gone on with; as `lost` says.
            ServiceError: The service does not take it up again, and why.
        """
        if self._connection is not lost:
            return
        offer = self.created.session.get("resume") if self._begun else None
        if self._over or offer is None or lost.protocol.close_rcvd is not None:
            raise lost.protocol.close_exc
        if self._relinking is None or self._relinking.done():
            self._relinking = asyncio.create_task(self._go_on(offer["token"], offer["within_s"]))
        await asyncio.shield(self._relinking)  # whoever waits for it now may have no time

    async def _go_on(self, token: str, within_s: float) -> None:
        """Connect again, and send what has not arrived."""
        self.notice("the connection was lost: connecting again")
        loop, backoff_s = asyncio.get_running_loop(), _MIN_BACKOFF_S
        give_up_s = loop.time() + within_s
        while True:
            try:
                async with asyncio.timeout_at(give_up_s):
                    self._connection, self._next = await self._resumed(token)
                break
            except (ServiceError, ConnectionClosed, TimeoutError) as error:
                is_final = isinstance(error, ServiceError) and error.code != "unreachable"
                if is_final or loop.time() + backoff_s > give_up_s:
                    self._over, self._given_up = True, self._lost(str(error) or f"no connection for {within_s:g} s")
                    raise self._given_up from None
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # not all clients of a service at once
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        self.notice("the session goes on")
        # Whoever receives must not wait until the service takes what is sent: it may wait for its events to be taken.
        if self._catching_up is None or self._catching_up.done():
            self._catching_up = asyncio.create_task(self._catch_up())

    async def _resumed(self, token: str) -> tuple[ClientConnection, int]:
        """A new connection that carries the session, and the number of the message that the service wants next."""
        connection = await self._reopen(self.created.session["id"])
        try:
            await connection.send(json.dumps({"type": "session.resume", "token": token, "seq": self._seq}))
            event = _parsed(await connection.recv())
            if isinstance(event, ErrorEvent):
                raise reported(event)
            if not isinstance(event, SessionResumed) or event.messages < self._kept_from:
                raise ServiceError("resume_impossible", "what the service has not got is not kept any more")
            return connection, event.messages
        except BaseException:
            connection.transport.abort()
            raise

    def _lost(self, reason: str = "") -> ServiceError:
        """The error of a connection that ended before the session."""
        reason = reason or self._connection.close_reason or f"code {self._connection.close_code}"
        return self._given_up or ServiceError(
            "connection_lost", f"the connection ended before the session did ({reason})"
        )

    async def close(self) -> None:
        """Close the connection, whatever is still to come."""
        self._over = True
        tasks = [task for task in (self._watching, self._relinking, self._catching_up) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.close()


def _parsed(frame: str | bytes) -> Event:
    try:
        return parse_event(frame)
    except ValueError as error:
        raise ServiceError("protocol_error", f"the service sent what is no event of its protocol: {error}") from None


@asynccontextmanager
async def connect(
    url: str,
    *,
    audio: AudioFormat | None = None,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    notice: Callable[[str], object] = lambda sentence: None,
    **settings: Unpack[SessionSettings],
) -> AsyncIterator[LiveSession]:
    """Open a session of the service; leaving the context closes the connection, whatever is still to come.

    Args:
        url: The service, such as ``ws://127.0.0.1:8765/v1/realtime/translations``, or ``wss://`` for TLS.
        audio: Format of the audio to be sent; None: 16 kHz mono s16le.
        token: Secret of the service, if it asks for one.
        tls: How to check the service's certificate; None: as this system does.
        notice: Told in a sentence when the connection is lost, and when the session goes on.
        **settings: As in `SessionSettings`.

    Raises:
        ServiceError: ``unreachable``, ``refused``, or what the service has against the settings, with its code.
    """

    def reopen(session_id: str) -> Awaitable[ClientConnection]:
        return _open(f"{url}{'&' if urlsplit(url).query else '?'}resume={session_id}", token, tls)

    session = LiveSession(await _open(url, token, tls), audio or AudioFormat(), reopen, notice)
    try:
        await session.begin(settings)
        yield session
    finally:
        await session.close()


async def _open(url: str, token: str | None, tls: ssl.SSLContext | None) -> ClientConnection:
    options: dict[str, Any] = {} if tls is None else {"ssl": tls}
    if token is not None:
        options["additional_headers"] = {"Authorization": f"Bearer {token}"}
    try:
        return await connect_websocket(
            url,
            compression=None,  # PCM does not compress
            ping_interval=None,  # the session has pings of its own
            max_queue=_WAITING_EVENTS,
            close_timeout=_CLOSE_TIMEOUT_S,
            proxy=None if urlsplit(url).hostname in _LOOPBACK else True,
            **options,
        )
    except InvalidStatus as error:
        body = (error.response.body or b"").decode(errors="replace").strip()
        raise ServiceError("refused", f"the service refused the connection: {body or error}") from None
    except (InvalidURI, InvalidHandshake, ValueError) as error:
        raise ServiceError("unreachable", f"{url} is not the service: {error}") from None
    except (OSError, TimeoutError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ServiceError(
            "unreachable", f"no service answers at {url} ({reason}): start one with dragoman serve"
        ) from None


def _declaration(audio: AudioFormat, settings: SessionSettings) -> str:
    """The event that declares a session."""
    fields: dict[str, Any] = {**settings}
    languages = fields.pop("languages", ())
    fmt = {
        "type": "audio/pcm",
        "rate": audio.sample_rate_hz,
        "channels": audio.channels,
        "encoding": audio.encoding,
    }
    output = {"languages": [languages] if isinstance(languages, str) else list(languages)}
    session = {**fields, "audio": {"input": {"format": fmt}, "output": output}}
    return json.dumps({"type": "session.update", "session": session})


def reported(event: ErrorEvent) -> ServiceError:
    """What the service has told, in a sentence."""
    return ServiceError(event.code, f"the service reports: {event.message}", event)


def to_bytes(pcm: Pcm, fmt: AudioFormat) -> bytes:
    """Audio as bytes of a format; see `LiveSession.send`."""
    if not isinstance(pcm, np.ndarray):
        return bytes(pcm)
    if pcm.dtype not in (np.int16, np.float32):
        raise ValueError(f"samples are {pcm.dtype}: convert them to float32 (full scale 1) or int16")
    if pcm.ndim > 2 or (pcm.shape[1] if pcm.ndim == 2 else 1) != fmt.channels:
        raise ValueError(f"samples have the shape {pcm.shape}, and the session has {fmt.channels} channels")
    if fmt.encoding == "f32le":
        samples = pcm.astype(np.float32) / 32768 if pcm.dtype == np.int16 else pcm
        return samples.astype("<f4").tobytes()
    if pcm.dtype == np.float32:
        if not np.isfinite(pcm).all():
            raise DragomanError("audio_not_finite", "the audio holds samples that are not finite numbers")
        pcm = np.clip(np.rint(pcm * 32768), -32768, 32767)
    return pcm.astype("<i2").tobytes()


async def exchange(session: LiveSession, speak: Coroutine[Any, Any, None], hear: Callable[[Event], object]) -> None:
    """Send and receive at the same time, until the service has told everything.

    Args:
        session: A session that has just begun.
        speak: Sends the audio and finishes the session.
        hear: Takes each event as it comes; errors that the service tells, too.

    Raises:
        ServiceError: The first error that the service told, when all else has been heard; or the end of the connection,
            whatever was told before.
        Exception: What `speak` or `hear` raised.
    """
    sender = asyncio.create_task(_speak(speak))
    receiver = asyncio.create_task(_hear(session, hear))
    try:
        await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_COMPLETED)
        if sender.done():
            sender.result()
        await receiver
    finally:
        sender.cancel()
        receiver.cancel()
        await asyncio.gather(sender, receiver, return_exceptions=True)


async def _speak(speak: Coroutine[Any, Any, None]) -> None:
    with suppress(ServiceError):  # the receiver is told the same
        await speak


async def _hear(session: LiveSession, hear: Callable[[Event], object]) -> None:
    first: ServiceError | None = None
    while True:
        try:
            async for event in session:
                hear(event)
            break
        except ServiceError as error:
            if error.event is None:
                raise
            hear(error.event)
            first = first or error
    if first is not None:
        raise first


class SyncSession:
    """A session of the service for programs without asyncio; `connect_sync` opens it.

    It does what `LiveSession` does, and each call waits. One thread may send while another receives.
    """

    def __init__(self, session: LiveSession, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        """Wrap a session whose coroutines `run` runs elsewhere, to their end."""
        self._session = session
        self._run = run

    @property
    def audio(self) -> AudioFormat:
        """The format of the audio that is sent."""
        return self._session.audio

    @property
    def created(self) -> SessionCreated:
        """What the service has: its models, languages and latencies."""
        return self._session.created

    @property
    def settings(self) -> SessionUpdated:
        """What the session runs with."""
        return self._session.settings

    def send(self, pcm: Pcm) -> None:
        """Send audio of any length; wait while the service is behind."""
        self._run(self._session.send(pcm))

    def flush(self) -> None:
        """Have all words so far decided, as if the speaker had paused; the session goes on."""
        self._run(self._session.flush())

    def set_max_lookahead_ms(self, max_lookahead_ms: int | None) -> None:
        """Change the look-ahead for the audio that comes after this."""
        self._run(self._session.set_max_lookahead_ms(max_lookahead_ms))

    def finish(self) -> None:
        """End the audio; the last events still come."""
        self._run(self._session.finish())

    def receive(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None at the end of the session, or if none comes within `timeout_s` seconds."""
        event: Event | None = self._run(self._next(timeout_s))
        return event

    def __iter__(self) -> Iterator[Event]:
        while (event := self.receive()) is not None:
            yield event

    async def _next(self, timeout_s: float | None) -> Event | None:
        # At 0 s too, the loop looks once at what has come.
        with suppress(TimeoutError):
            async with asyncio.timeout(None if timeout_s is None else max(timeout_s, 1e-3)):
                return await anext(self._session, None)
        return None


@contextmanager
def connect_sync(
    url: str,
    *,
    audio: AudioFormat | None = None,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    **settings: Unpack[SessionSettings],
) -> Iterator[SyncSession]:
    """Open a session of the service without asyncio; as `connect`, whose work a thread of its own does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="dragoman-client", daemon=True)
    thread.start()

    def run(work: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, for one: the work must not go on when nobody waits for it
            future.cancel()
            raise

    opening = connect(url, audio=audio, token=token, tls=tls, **settings)
    try:
        session = run(opening.__aenter__())
        try:
            yield SyncSession(session, run)
        finally:
            run(opening.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
