"""OpenAI's transcription and translation of files: what a form asks for, and how it is answered.

A recording is a session like any other, whose audio comes at once and whose events are gathered instead of sent.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Final, Self

from client.output import OutputFormat, make_writer
from models.translator import LATENCIES, NAMES
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta, TranslationDelta, Word
from streaming.messages import ClientMessage, Command
from streaming.session import SessionConfig
from wire.dialect import Dialect, Frame
from wire.fields import shown

END: Final = ""
"""The frame that ends the audio of a recording."""

FORMATS: Final = ("json", "verbose_json", "text", "srt", "vtt")
_GRANULARITIES: Final = ("segment", "word")
_WITHOUT_EFFECT: Final = ("model", "prompt", "temperature", "chunking_strategy", "include[]")
"""There is one model, which hears what is said."""


@dataclass(frozen=True)
class Body:
    """An answer: its type and its text."""

    kind: str
    text: str


class Recording(Dialect):
    """One file; its audio is the binary frames, which :data:`END` ends."""

    PATH: ClassVar[str]
    TASK: ClassVar[str]
    FIELDS: ClassVar[tuple[str, ...]]

    def __init__(self, language: str | None, form: str, granularities: Sequence[str], latency: str) -> None:
        self.audio = AudioFormat()
        self.events: list[Event] = []
        self._language = language
        self._form = form
        self._granularities = granularities
        self._latency = latency

    @classmethod
    def begin(cls, query: Mapping[str, str]) -> Self:
        """The recording whose form has these fields; values of the same field are parted by commas.

        Raises:
            DragomanError: ``unknown_field`` or ``invalid_value``.
        """
        known = ("response_format", "stream", *cls.FIELDS, *_WITHOUT_EFFECT)
        if unknown := [name for name in query if name not in known]:
            raise DragomanError(
                "unknown_field", f"the form has no field {shown(unknown[0])}: it takes file, {', '.join(known)}"
            )
        if query.get("stream", "false").lower() not in ("false", "0", ""):
            raise DragomanError("invalid_value", "stream is not to be had here: connect to the WebSocket for live text")
        granularities = [one for one in query.get("timestamp_granularities[]", "segment").split(",") if one]
        return cls(
            cls._target(query),
            _choice("response_format", query.get("response_format", "json"), FORMATS),
            [_choice("timestamp_granularities[]", one, _GRANULARITIES) for one in granularities],
            _choice("latency", query.get("latency", "offline"), LATENCIES),
        )

    @classmethod
    def _target(cls, query: Mapping[str, str]) -> str | None:
        raise NotImplementedError

    @property
    def languages(self) -> tuple[str, ...]:
        """What it is translated into."""
        raise NotImplementedError

    def greeting(self, session_id: str, defaults: dict[str, Any]) -> list[Frame]:
        """Nothing."""
        return []

    def opening(self) -> list[ClientMessage]:
        """The session that the form declares."""
        return [SessionConfig(self.audio, languages=self.languages, latency=self._latency)]

    def take(self, frame: Frame) -> list[ClientMessage]:
        """Audio, or its end."""
        return [frame] if isinstance(frame, bytes) else [Command.CLOSE]

    def say(self, event: Event) -> list[Frame]:
        """Nothing yet; the event is part of the answer."""
        self.events.append(event)
        return []

    @property
    def error(self) -> ErrorEvent | None:
        """What went wrong, if anything did, so that there is no answer; said even if the session just ended."""
        if errors := [event for event in self.events if isinstance(event, ErrorEvent)]:
            return errors[0]
        if not any(isinstance(event, SessionClosed) for event in self.events):
            return ErrorEvent(0, "internal_error", "the service did not finish the recording: send it again")
        return None

    def body(self, problem: str | None = None) -> Body:
        """The answer, when the session is over.

        Args:
            problem: One sentence about audio that could not be decoded; JSON tells it.
        """
        match self._form:
            case "text":
                return Body("text/plain; charset=utf-8", self._written(OutputFormat.TXT))
            case "srt":
                return Body("application/x-subrip; charset=utf-8", self._written(OutputFormat.SRT))
            case "vtt":
                return Body("text/vtt; charset=utf-8", self._written(OutputFormat.VTT))
        told = {"text": self._written(OutputFormat.TXT).rstrip("\n")}
        if self._form == "verbose_json":
            told = self._verbose(told["text"])
        told |= {} if problem is None else {"problem": problem}
        return Body("application/json", json.dumps(told, ensure_ascii=False))

    def _written(self, form: OutputFormat) -> str:
        writer = make_writer(form, "", self.languages)
        return writer.push(self.events) + writer.finish()

    def _verbose(self, text: str) -> dict[str, Any]:
        duration_s = max(event.audio_ms for event in self.events if isinstance(event, SessionClosed)) / 1000
        code = self._language or "und"  # nobody has said, and nothing here tells
        told: dict[str, Any] = {"task": self.TASK, "language": NAMES.get(code, code).lower(), "duration": duration_s}
        told |= {"text": text, "usage": {"type": "duration", "seconds": math.ceil(duration_s)}}
        if "segment" in self._granularities:
            told["segments"] = [_segment(i, deltas) for i, deltas in enumerate(self._segments())]
        if "word" in self._granularities:
            told["words"] = [
                {"word": word.word, "start": word.start_ms / 1000, "end": word.end_ms / 1000} for word in self._words()
            ]
        return told

    def _words(self) -> Iterator[Word]:
        return chain.from_iterable(event.words for event in self.events if isinstance(event, TranscriptDelta))

    def _segments(self) -> Iterator[list[TranscriptDelta | TranslationDelta]]:
        """What was told, up to each endpoint."""
        kind = TranslationDelta if self.languages else TranscriptDelta
        open_: list[TranscriptDelta | TranslationDelta] = []
        for event in self.events:
            if isinstance(event, kind):
                open_.append(event)
                if event.endpoint and any(delta.delta.strip() for delta in open_):
                    yield open_
                    open_ = []
        if any(delta.delta.strip() for delta in open_):
            yield open_


class Transcription(Recording):
    """A recording to be written in its own language."""

    PATH: ClassVar[str] = "/v1/audio/transcriptions"
    TASK: ClassVar[str] = "transcribe"
    FIELDS: ClassVar[tuple[str, ...]] = ("language", "timestamp_granularities[]")

    languages = ()

    @classmethod
    def _target(cls, query: Mapping[str, str]) -> str | None:
        return query.get("language") or None


class Translation(Recording):
    """A recording to be written in another language: OpenAI's endpoint knows English alone, ours has a field for it."""

    PATH: ClassVar[str] = "/v1/audio/translations"
    TASK: ClassVar[str] = "translate"
    FIELDS: ClassVar[tuple[str, ...]] = ("to", "language", "latency")

    @classmethod
    def _target(cls, query: Mapping[str, str]) -> str | None:
        return query.get("to") or query.get("language") or "en"

    @property
    def languages(self) -> tuple[str, ...]:
        """What it is translated into."""
        return () if self._language is None else (self._language,)


def _segment(number: int, deltas: Sequence[TranscriptDelta | TranslationDelta]) -> dict[str, Any]:
    """One segment with all fields that OpenAI's has; what there is no such thing as here is 0 or empty."""
    text = "".join(delta.delta for delta in deltas)
    words = [word for delta in deltas if isinstance(delta, TranscriptDelta) for word in delta.words]
    confidences = [math.log(max(word.confidence, 1e-4)) for word in words]
    starts = [d.start_ms if isinstance(d, TranscriptDelta) else d.source_start_ms for d in deltas]
    ends = [d.end_ms if isinstance(d, TranscriptDelta) else d.source_end_ms for d in deltas]
    content = text.encode()
    return {
        "id": number,
        "seek": 0,
        "start": min(ms for ms in starts if ms is not None) / 1000,
        "end": max(ms for ms in ends if ms is not None) / 1000,
        "text": text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": sum(confidences) / len(confidences) if confidences else 0.0,
        "compression_ratio": len(content) / len(zlib.compress(content)),
        "no_speech_prob": 0.0,
    }


def _choice(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise DragomanError("invalid_value", f"{name} is {shown(value)}: it must be one of {', '.join(known)}")
    return value
