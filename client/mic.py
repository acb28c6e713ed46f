"""From the microphone to the terminal and to files, through a session of the service."""

import asyncio
import secrets
import wave
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Unpack

from client.connection import LiveSession, ServiceError, SessionSettings, connect, exchange, reported
from client.live import ctrl_c
from client.microphone import Microphone
from client.output import OutputFormat, Writer, make_writer
from client.view import Level, Status, View, describe_level
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, TranscriptDelta, TranslationDelta

if TYPE_CHECKING:  # they take long to import, and a service elsewhere does without
    from models.recognizer import Recognizer
    from models.translator import AnyTranslator
    from streaming.speculation import Speculation

_FRAME_S: Final = 0.125  # between two drawings of the view
_MAX_WAV_BYTES: Final = 2**32 - 2**16  # sizes in a wav file have 32 bits


class Recording:
    """The files of ``--save``, complete at any moment: ``NAME.wav``, ``NAME.srt`` and ``NAME.es.srt``."""

    def __init__(self, wav: IO[bytes], subtitles: Sequence[tuple[IO[str], Writer]], fmt: AudioFormat) -> None:
        """Write to files that are open; `save_as` opens them."""
        self._file = wav
        self._is_full = False
        self._wav = wave.open(wav, "wb")
        self._wav.setparams((fmt.channels, 2, fmt.sample_rate_hz, 0, "NONE", ""))
        self._subtitles = subtitles
        self._written_bytes = 0

    def hear(self, pcm: bytes) -> None:
        """Add audio."""
        self._is_full |= self._written_bytes + len(pcm) > _MAX_WAV_BYTES
        if self._is_full:
            return
        self._written_bytes += len(pcm)
        self._wav.writeframes(pcm)  # and corrects the sizes in its head
        self._file.flush()

    def tell(self, event: Event) -> None:
        """Add the cues that have become final."""
        for file, writer in self._subtitles:
            if text := writer.push([event]):
                file.write(text)
                file.flush()

    def problems(self) -> list[str]:
        """What went wrong, in one sentence each."""
        return [f"{self._file.name} was full at 4 GiB: the rest of the audio is not in it"] if self._is_full else []

    def finish(self) -> bool:
        """Add the last cues; False if there was no audio."""
        for file, writer in self._subtitles:
            file.write(writer.finish())
        self._wav.close()
        return self._written_bytes > 0


@contextmanager
def save_as(name: str, fmt: AudioFormat, languages: Sequence[str]) -> Iterator[Recording]:
    """Open the files of a recording; they are complete at the end, and gone if there was no audio.

    Args:
        name: What they are called, without the ending.
        fmt: The format of the audio.
        languages: Which translations there are.

    Raises:
        DragomanError: ``file_exists``: nothing is overwritten.
        OSError: The files cannot be made.
    """
    name = name.removesuffix(".wav")
    streams: list[list[str]] = [[], *([language] for language in languages)]
    paths = [Path(f"{name}.wav"), *(Path(".".join([name, *stream, "srt"])) for stream in streams)]
    for path in paths:
        if path.exists():
            raise DragomanError("file_exists", f"{path} is there already: --save under another name")
    with ExitStack() as files:
        wav = files.enter_context(paths[0].open("xb"))
        texts = [files.enter_context(path.open("x", encoding="utf-8")) for path in paths[1:]]
        writers = [make_writer(OutputFormat.SRT, name, stream) for stream in streams]
        recording = Recording(wav, list(zip(texts, writers, strict=True)), fmt)
        try:
            yield recording
        finally:
            if not recording.finish():
                for path in paths:
                    path.unlink()


@asynccontextmanager
async def own_service(
    recognizer: "Recognizer", translator: "AnyTranslator | None", speculation: "Speculation | None"
) -> AsyncIterator[tuple[str, str | None]]:
    """A service within this program and for it alone; gives its URL and its secret."""
    from server import Service, Settings

    token = secrets.token_urlsafe()
    service = Service(recognizer, Settings(port=0, max_sessions=1, tokens=(token,)), translator, speculation)
    try:
        yield await service.start(), token
    finally:
        await service.stop()


async def listen(
    microphone: Microphone,
    view: View,
    recording: Recording | None,
    service: AbstractAsyncContextManager[tuple[str, str | None]],
    **settings: Unpack[SessionSettings],
) -> bool:
    """Interpret what the microphone hears until Ctrl-C, and then to the last word.

    The view tells when the connection is lost and when the session goes on, and what the service reports.

    Args:
        microphone: Where the audio comes from.
        view: Where words and level are shown.
        recording: Where they are kept, if they are.
        service: Gives, while it is entered, the URL of the service that interprets, and its secret if it asks for one.
        **settings: What the session is asked for.

    Returns:
        Whether the service told no error.

    Raises:
        DragomanError: The device cannot be opened; or the service cannot be reached, refuses the client or its
            settings, or goes away without a word.
    """
    async with (
        service as (url, token),
        connect(url, audio=microphone.format, token=token, notice=view.tell, **settings) as session,
    ):
        with ctrl_c(microphone.stop):  # from before the first sound on
            async with microphone:
                return await _interpret(session, microphone, view, recording)


async def _interpret(session: LiveSession, microphone: Microphone, view: View, recording: Recording | None) -> bool:
    """Until the microphone stops, and then to the last word."""
    with view:
        hearing = _Hearing(session, microphone, view, recording)
        drawing = asyncio.create_task(hearing.draw())
        try:
            await exchange(session, hearing.speak(), hearing.hear)
        except ServiceError as error:
            if error.event is None:
                raise
            return False  # as the user has been told
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)  # that a terminal is gone is no loss
    return True


class _Hearing:
    """One session of the microphone."""

    def __init__(self, session: LiveSession, microphone: Microphone, view: View, recording: Recording | None) -> None:
        self._session = session
        self._microphone = microphone
        self._view = view
        self._recording = recording
        self._level = Level()
        self._heard_s = 0.0
        self._lag_s = 0.0
        self._ending = False

    async def speak(self) -> None:
        """Microphone -> files, service."""
        fmt = self._microphone.format
        async for pcm in self._microphone.blocks():
            seconds = len(pcm) / fmt.bytes_per_sample / fmt.sample_rate_hz
            self._heard_s += seconds
            self._level.hear(pcm, seconds)
            if self._recording is not None:
                self._recording.hear(pcm)
            await self._session.send(pcm)
        self._ending = True
        await self._session.finish()

    def hear(self, event: Event) -> None:
        """Service -> view, files."""
        if isinstance(event, TranscriptDelta | TranslationDelta) and event.backlog_ms is not None:
            self._lag_s = event.backlog_ms / 1000
        self._view.hear(event)
        if isinstance(event, ErrorEvent):
            self._view.tell(str(reported(event)))
        if self._recording is not None:
            self._recording.tell(event)

    async def draw(self) -> None:
        """Draw the view again and again; a terminal that is slow to take it holds up nothing else."""
        while True:
            lag_s = self._lag_s + self._microphone.waiting_s
            dropped_s, warning = self._microphone.dropped_s, describe_level(self._level)
            status = Status(self._heard_s, self._level.db, warning, lag_s, dropped_s, self._ending)
            await asyncio.to_thread(self._view.draw, self._view.frame(status))
            await asyncio.sleep(_FRAME_S)
