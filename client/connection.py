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

Nothing here grows with the session. A service that falls behind holds `send` back, and events that nobody takes hold
the service back, until it lets the client go: take events while you send.
"""

import asyncio
import json
import ssl
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
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
from streaming.events import ErrorEvent, Event, SessionClosed, SessionCreated, SessionUpdated, parse_event

#: Far below the service's limit of 1 MiB, and so little that no message holds up the next command for long.
_MESSAGE_BYTES: Final = 1 << 16
_WAITING_EVENTS: Final = 256  # events that may wait for the caller before the service is held back
_ANSWER_TIMEOUT_S: Final = 30.0  # for the service to answer the declaration
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
    """

    created: SessionCreated
    settings: SessionUpdated

    def __init__(self, connection: ClientConnection, audio: AudioFormat) -> None:
        """Wrap a fresh connection; `begin` declares the session."""
        self.audio = audio
        self._connection = connection
        self._receiving = asyncio.Lock()
        self._waiting: deque[Event] = deque()  # received, and not yet given to the caller
        self._error: ServiceError | None = None  # if that is what the service told last
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
            raise _reported(event)
        return event

    async def _receive(self) -> Event:
        """The next event of the connection, maybe an error.

        Raises:
            ConnectionClosed: There is none; all that came before has been received.
            ServiceError: ``protocol_error``.
        """
        frame = await self._connection.recv()
        try:
            event = parse_event(frame)
        except ValueError as error:
            raise ServiceError(
                "protocol_error", f"the service sent what is no event of its protocol: {error}"
            ) from None
        self._error = _reported(event) if isinstance(event, ErrorEvent) else None
        self._over |= isinstance(event, SessionClosed)
        return event

    async def _send(self, message: str | bytes) -> None:
        try:
            await self._connection.send(message)
        except ConnectionClosed:
            async with self._receiving:  # why it has closed may stand in what nobody has looked at yet
                with suppress(ConnectionClosed):
                    while True:
                        self._waiting.append(await self._receive())
            raise (self._error or self._lost()) from None

    def _lost(self) -> ServiceError:
        """The error of a connection that ended before the session; here a client that reconnects would begin."""
        reason = self._connection.close_reason or f"code {self._connection.close_code}"
        return ServiceError("connection_lost", f"the connection ended before the session did ({reason})")


@asynccontextmanager
async def connect(
    url: str,
    *,
    audio: AudioFormat | None = None,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    **settings: Unpack[SessionSettings],
) -> AsyncIterator[LiveSession]:
    """Open a session of the service; leaving the context closes the connection, whatever is still to come.

    Args:
        url: The service, such as ``ws://127.0.0.1:8765/v1/realtime/translations``, or ``wss://`` for TLS.
        audio: Format of the audio to be sent; None: 16 kHz mono s16le.
        token: Secret of the service, if it asks for one.
        tls: How to check the service's certificate; None: as this system does.
        **settings: As in `SessionSettings`.

    Raises:
        ServiceError: ``unreachable``, ``refused``, or what the service has against the settings, with its code.
    """
    connection = await _open(url, token, tls)
    try:
        session = LiveSession(connection, audio or AudioFormat())
        await session.begin(settings)
        yield session
    finally:
        await connection.close()


async def _open(url: str, token: str | None, tls: ssl.SSLContext | None) -> ClientConnection:
    options: dict[str, Any] = {} if tls is None else {"ssl": tls}
    if token is not None:
        options["additional_headers"] = {"Authorization": f"Bearer {token}"}
    try:
        return await connect_websocket(
            url,
            compression=None,  # PCM does not compress
            # The answer to a ping waits behind audio that the service has not read yet: it would tell nothing.
            ping_interval=None,
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


def _reported(event: ErrorEvent) -> ServiceError:
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
        ServiceError: The first error that the service told, when all else has been heard; or the end of the connection.
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
                raise first or error from None
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
