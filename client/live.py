"""A client of the service that sends a recording at the pace of speech."""

import asyncio
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from types import FrameType
from typing import Final, Generic, TypeVar, Unpack

import numpy as np
import numpy.typing as npt

from client.connection import LiveSession, ServiceError, SessionSettings, connect, exchange, reported
from client.files import AudioSource
from client.output import Writer
from client.progress import Display
from streaming.audio import SAMPLE_RATE_HZ, AudioNormalizer
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta, TranslationDelta

# 100 ms a message: well below a look-ahead that matters, and few messages.
_MESSAGE_SAMPLES: Final = SAMPLE_RATE_HZ // 10
_ITEMS_AHEAD: Final = 20
_T = TypeVar("_T")


async def stream(
    source: AudioSource,
    url: str,
    writer: Writer,
    display: Display,
    *,
    pace: float | None,
    token: str | None = None,
    **settings: Unpack[SessionSettings],
) -> bool:
    """Send a recording to the service and show what comes back, until the service has told everything.

    Ctrl-C ends the audio; a second one does not wait for the last words. Where the connection is lost the session goes
    on over a new one, and standard error says so. An error that the service tells is written there when it comes: the
    session may go on after it.

    Args:
        source: The audio; it is sent as 16 kHz mono s16le.
        url: The service, ``ws://`` or ``wss://``.
        writer: Form of what is written to the display.
        display: Where it is shown, with the progress.
        pace: Speed of sending in times real time; None sends as fast as the service takes it.
        token: Secret of the service, if it asks for one.
        **settings: What the session is asked for.

    Returns:
        Whether the service told no error.

    Raises:
        DragomanError: The service cannot be reached, refuses the client or its settings, or goes away without a word;
            or the recording cannot be read to its end.
    """
    is_whole = True
    with display:
        async with connect(url, token=token, notice=_notice, **settings) as session:
            told = _Told(writer, display)
            messages = _Ahead(_messages(source))
            with ctrl_c(messages.stop):
                try:
                    await exchange(session, _send(session, messages, source, pace, told), told.hear)
                except ServiceError as error:
                    if error.event is None:
                        raise
                    is_whole = False  # as the user has been told
                finally:
                    messages.stop()
                    told.end()
    if source.problem is not None:
        raise DragomanError("file_damaged", source.problem)
    return is_whole


def _notice(sentence: str) -> None:
    print(f"dragoman: {sentence}", file=sys.stderr, flush=True)


class _Told:
    """Shows what the service tells of one recording, and how far it is."""

    def __init__(self, writer: Writer, display: Display) -> None:
        self._writer = writer
        self._display = display
        self._begun = False
        self._lag = ""

    def hear(self, event: Event) -> None:
        """Show what an event adds."""
        if isinstance(event, TranscriptDelta | TranslationDelta) and event.backlog_ms is not None:
            self._lag = f", {event.backlog_ms / 1000:.1f} s behind"
        if isinstance(event, ErrorEvent):
            _notice(str(reported(event)))
        text = self._writer.push([event])
        self._begun |= bool(text) or isinstance(event, SessionClosed)
        if text:
            self._display.write(text)

    def sent(self, sent_s: float, duration_s: float | None) -> None:
        """Show how much has been sent."""
        self._display.advance(0, sent_s, duration_s, self._lag)

    def end(self) -> None:
        """Write what ends the text, if there is one."""
        if self._begun:
            self._display.write(self._writer.finish())


async def _send(
    session: LiveSession,
    messages: "_Ahead[npt.NDArray[np.int16]]",
    source: AudioSource,
    pace: float | None,
    told: _Told,
) -> None:
    """Send the audio when its time has come, and finish the session."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    sent_samples = 0
    async for message in messages:
        sent_samples += len(message)
        if pace is not None:
            # From the start, not from the last message: delays do not add up.
            due_s = started_s + sent_samples / SAMPLE_RATE_HZ / pace
            with suppress(TimeoutError):
                await asyncio.wait_for(messages.stopped.wait(), max(0.0, due_s - loop.time()))
        if messages.stopped.is_set():
            break
        await session.send(message)
        told.sent(sent_samples / SAMPLE_RATE_HZ, source.duration_s)
    await session.finish()


def _messages(source: AudioSource) -> Iterator[npt.NDArray[np.int16]]:
    """The recording as 16 kHz int16, at most 100 ms at a time."""
    normalizer = AudioNormalizer(source.format)
    for block in chain(source.blocks(source.format.sample_rate_hz // 10), [None]):
        samples = normalizer.finish() if block is None else normalizer.push(block)
        pcm = np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)
        for start in range(0, len(pcm), _MESSAGE_SAMPLES):
            yield pcm[start : start + _MESSAGE_SAMPLES]


class _Ahead(Generic[_T]):
    """The items of a blocking iterator, which a thread of its own makes, a few of them ahead.

    Once stopped there are no more, though the thread may still wait for one: a pipe may have nothing to say for hours.

    Attributes:
        stopped: Whether the rest is no longer wanted.
    """

    def __init__(self, items: Iterator[_T]) -> None:
        self.stopped = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_T | Exception | None] = asyncio.Queue()
        self._room = threading.Semaphore(_ITEMS_AHEAD)
        threading.Thread(target=self._make, args=(items,), name="reader", daemon=True).start()

    def stop(self) -> None:
        """Want no more; called on the event loop."""
        self.stopped.set()
        self._queue.put_nowait(None)
        self._room.release()

    async def __aiter__(self) -> AsyncIterator[_T]:
        while not self.stopped.is_set():
            item = await self._queue.get()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            self._room.release()
            yield item

    def _make(self, items: Iterator[_T]) -> None:
        end = None
        try:
            for item in items:
                self._room.acquire()
                if self.stopped.is_set():
                    break
                self._put(item)
        except Exception as error:
            end = error
        self._put(end)

    def _put(self, item: _T | Exception | None) -> None:
        with suppress(RuntimeError):  # the loop has been closed meanwhile
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


@contextmanager
def ctrl_c(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` on the event loop at the first Ctrl-C, SIGTERM or SIGHUP; a second one does what it always does."""
    loop = asyncio.get_running_loop()
    numbers = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]
    before = {number: signal.getsignal(number) for number in numbers}

    def take(number: int, _: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        loop.call_soon_threadsafe(stop)

    for number in before:
        signal.signal(number, take)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
