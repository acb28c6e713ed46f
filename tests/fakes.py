"""A session without a model, for tests of files, formats and sockets.

It has the interface of `streaming.session`. Each 400 ms of sound become one word that says how loud they
were, so a test knows what to expect from its audio, and is translated at once; 400 ms of silence are an endpoint.
Like the real one it gives the same events for any chunking of its audio.
"""

import copy
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch

import server
from models.recognizer import Recognizer
from models.translator import TranslationConfig, Translator
from streaming.audio import AudioNormalizer, Samples
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta, TranslationDelta, Word
from streaming.speculation import Speculation

WORD_MS: Final = 400
_WORD_SAMPLES: Final = 16 * WORD_MS


class FakeRecognizer:
    """Stands where the weights would be."""

    name = "fake"
    adaptive = False
    device = torch.device("cpu")


class FakeTranslator:
    """And where its would be."""

    name = "fake"
    policy = "interleaved"
    config = TranslationConfig()
    tokenizer = SimpleNamespace(size=1 << 16)  # as many tokens as any seed of drafts has

    def direction(self, target: str, latency: str) -> None:
        for value, known, code in (
            (target, self.config.targets, "unsupported_language"),
            (latency, self.config.latencies, "unsupported_latency"),
        ):
            if value not in known:
                raise DragomanError(code, f"model 'fake' cannot {value!r}; it knows {', '.join(known)}")


@asynccontextmanager
async def running_service(
    recognizer: object = FakeRecognizer(),
    translator: object = None,
    speculation: Speculation | None = None,
    **settings: Any,
) -> AsyncIterator[str]:
    """A service on a free port; gives its URL."""
    service = server.Service(
        cast(Recognizer, recognizer), server.Settings(port=0, **settings), cast(Translator, translator), speculation
    )
    try:
        yield await service.start()
    finally:
        await service.stop()


class FakeSession:
    """Words from loudness, ``w30``, and their translations, ``es30``."""

    def __init__(self, recognizer: object, config: Any, translator: Any = None, speculation: Any = None) -> None:
        self.config = config
        for language in config.languages:
            if translator is None:
                raise DragomanError("unsupported_language", "there is no translator")
            translator.direction(language, config.latency)
        self._normalizer = AudioNormalizer(config.audio)
        self._rate_hz = config.audio.sample_rate_hz
        self._waiting: Samples = np.empty(0, np.float32)
        self._words = self._heard_words = 0
        self._segment = 0
        self._seq = 0
        self._events: list[Event] = []
        self._ending = self._closed = self._flushing = False

    def write(self, pcm: bytes | npt.NDArray[Any]) -> None:
        self._waiting = np.concatenate([self._waiting, self._normalizer.push(pcm)])

    def close_input(self) -> None:
        self._ending = True
        try:
            self._waiting = np.concatenate([self._waiting, self._normalizer.finish()])
        except DragomanError as error:
            self._tell(ErrorEvent(self._seq, error.code, str(error)))

    def ready(self) -> bool:
        if self._flushing:
            return len(self._waiting) > 0
        return not self._closed and (self._ending or len(self._waiting) >= _WORD_SAMPLES)

    @property
    def decided_ms(self) -> int:
        return self._words * WORD_MS

    def set_max_lookahead_ms(self, max_lookahead_ms: int | None) -> None:
        if max_lookahead_ms is not None and max_lookahead_ms < 0:
            raise DragomanError("unsupported_lookahead", f"{max_lookahead_ms} is below 0")
        self.config = replace(self.config, max_lookahead_ms=max_lookahead_ms)

    def flush(self) -> list[Event]:
        fork = self.begin_flush()
        if fork.ready():
            fork.step()
        return self.end_flush(fork)

    def begin_flush(self) -> "FakeSession":
        fork = copy.copy(self)
        fork._events, fork._flushing = [], True
        return fork

    def end_flush(self, fork: "FakeSession") -> list[Event]:
        events = fork.take_events()
        vars(self).update(vars(fork), _flushing=False)
        return events

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def step(self) -> None:
        block, self._waiting = self._waiting[:_WORD_SAMPLES], self._waiting[_WORD_SAMPLES:]
        if len(block):
            self._hear(float(np.abs(block).max()))
        if self._ending and not len(self._waiting):
            self._closed = True
            audio_ms = round(1000 * self._normalizer.received_samples / self._rate_hz)
            self._tell(SessionClosed(self._seq, audio_ms))

    def _hear(self, loudness: float) -> None:
        start_ms = self._words * WORD_MS
        end_ms = start_ms + WORD_MS
        self._words += 1
        is_sound = loudness > 0.01
        words = (Word(f"w{round(100 * loudness)}", start_ms, end_ms, 0.5),) if is_sound else ()
        delta = "".join(f" {word.word}" for word in words)
        self._tell(TranscriptDelta(self._seq, delta, start_ms, end_ms, end_ms, self._segment, not is_sound, words))
        self._segment += not is_sound
        self._heard_words += is_sound
        last = self._heard_words - 1
        for language in self.config.languages if self._heard_words else ():
            text = f" {language}{round(100 * loudness)}" if is_sound else ""
            times = {"source_start_ms": start_ms, "source_end_ms": end_ms, "emitted_ms": end_ms}
            self._tell(TranslationDelta(self._seq, text, language, (last, last), not is_sound, **times))

    def _tell(self, event: Event) -> None:
        self._events = [*self._events, event]
        self._seq += 1


class ForsakenSession(FakeSession):
    """Its translator fails after the first word."""

    def _hear(self, loudness: float) -> None:
        super()._hear(loudness)
        if self._heard_words == 1 and self.config.languages:
            self.config = replace(self.config, languages=())
            self._tell(ErrorEvent(self._seq, "translator_unavailable", "it is gone: nothing more is translated"))


def fake_tick(sessions: Sequence[FakeSession], *, max_chunks: int = 1) -> None:
    for session in sessions:
        if session.ready():
            session.step()


def tone(levels: Sequence[float], rate_hz: int = 16_000, channels: int = 1) -> Samples:
    """400 ms of sound for each level, float32 ``[samples, channels]``; level 0.3 is heard as ``w30``."""
    samples = np.repeat(np.asarray(levels, np.float32), rate_hz * WORD_MS // 1000)
    samples *= np.sin(2 * np.pi * 440 * np.arange(len(samples)) / rate_hz).astype(np.float32)
    return np.repeat(samples[:, None], channels, axis=1)


def pcm(levels: Sequence[float], rate_hz: int = 16_000) -> bytes:
    """`tone` as s16le."""
    return (tone(levels, rate_hz) * 32_767).astype("<i2").tobytes()
