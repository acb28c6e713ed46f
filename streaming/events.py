"""Last arrow: the events that a session tells, and their one JSON form.

Text is append-only: the `delta`s of a session, concatenated verbatim, are its transcript, and those of a language are
its translation. All times are
milliseconds of audio since the start of the session. Every event has a `seq` that grows by one.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar


@dataclass(frozen=True)
class Word:
    """One recognised word with its place in the audio.

    Attributes:
        word: The word as written, without spaces around it.
        start_ms: Start of its first piece.
        end_ms: End of its last piece, not before `start_ms`.
        confidence: How sure the recogniser is of it, 0 to 1.
    """

    word: str
    start_ms: int
    end_ms: int
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """The word as JSON would have it, the confidence to two decimals."""
        return {
            "word": self.word,
            "start_ms": self.start_ms,
            "end_ms": self.end_ms,
            "confidence": round(self.confidence, 2),
        }

    def clipped(self, limit_ms: int) -> "Word":
        """The word with times not after `limit_ms`."""
        return replace(self, start_ms=min(self.start_ms, limit_ms), end_ms=min(self.end_ms, limit_ms))


class _Json:
    """Gives an event its JSON line: `type`, then `seq`, then what is its own."""

    TYPE: ClassVar[str]
    seq: int

    def to_dict(self) -> dict[str, Any]:
        """The event as a dictionary in the order of the wire."""
        return {"type": self.TYPE, "seq": self.seq, **self._fields()}

    def to_json(self) -> str:
        """The event as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def _fields(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class SessionCreated(_Json):
    """A connection is open; `session` tells its defaults and limits."""

    session: dict[str, Any]
    seq: int

    TYPE: ClassVar[str] = "session.created"

    def _fields(self) -> dict[str, Any]:
        return {"session": self.session}


@dataclass(frozen=True)
class SessionUpdated(_Json):
    """The session runs with these settings."""

    session: dict[str, Any]
    seq: int

    TYPE: ClassVar[str] = "session.updated"

    def _fields(self) -> dict[str, Any]:
        return {"session": self.session}


@dataclass(frozen=True)
class SessionResumed(_Json):
    """A session goes on over a new connection; the events after `seq` come again.

    Attributes:
        seq: Number of the last event that the client says it has; this one has no number of its own.
        messages: How many messages of the client have come, from its first connection on.
        audio_bytes: How much audio was in them, as it was sent.
    """

    seq: int
    messages: int
    audio_bytes: int

    TYPE: ClassVar[str] = "session.resumed"

    def _fields(self) -> dict[str, Any]:
        return {"messages": self.messages, "audio_bytes": self.audio_bytes}


@dataclass(frozen=True)
class TranscriptDelta(_Json):
    """Words that are now certain.

    Attributes:
        seq: Number of this event.
        delta: Text to append verbatim to the transcript; spaces between words are part of it.
        start_ms: Start of its first word.
        end_ms: End of its last word.
        emitted_ms: How much audio had come in when it was decided.
        segment: Number of the segment that it belongs to, from 0.
        endpoint: Whether it is the last of that segment: the speaker paused.
        words: Its words, one by one.
        backlog_ms: Time that passed since that audio came in, where a service has measured it.
    """

    seq: int
    delta: str
    start_ms: int
    end_ms: int
    emitted_ms: int
    segment: int
    endpoint: bool
    words: tuple[Word, ...]
    backlog_ms: int | None = None

    TYPE: ClassVar[str] = "session.input_transcript.delta"

    def _fields(self) -> dict[str, Any]:
        return {
            "delta": self.delta,
            "start_ms": self.start_ms,
            "end_ms": self.end_ms,
            "emitted_ms": self.emitted_ms,
            **({} if self.backlog_ms is None else {"backlog_ms": self.backlog_ms}),
            "segment": self.segment,
            "endpoint": self.endpoint,
            "words": [word.to_dict() for word in self.words],
        }


@dataclass(frozen=True)
class TranslationDelta(_Json):
    """A chunk of translation, which is final.

    Attributes:
        seq: Number of this event.
        delta: Text to append verbatim to the translation into this language; empty only at an endpoint at which
            nothing was left to say.
        language: What it is written in.
        source_words: Indices of the first and the last source word that were read for it, counted from the session's
            start over all words of its transcript.
        endpoint: Whether a segment of the source ended with them.
        source_start_ms: Start of the first of them; None where words came without audio.
        source_end_ms: End of the last of them; None without audio.
        emitted_ms: How much audio had come in when the last of them was decided; None without audio.
        backlog_ms: Time that passed since that audio came in, where a service has measured it.
    """

    seq: int
    delta: str
    language: str
    source_words: tuple[int, int]
    endpoint: bool = False
    source_start_ms: int | None = None
    source_end_ms: int | None = None
    emitted_ms: int | None = None
    backlog_ms: int | None = None

    TYPE: ClassVar[str] = "session.output_transcript.delta"

    def _fields(self) -> dict[str, Any]:
        times = {key: getattr(self, key) for key in ("source_start_ms", "source_end_ms", "emitted_ms", "backlog_ms")}
        return {
            "delta": self.delta,
            "language": self.language,
            **{key: ms for key, ms in times.items() if ms is not None},
            "source_words": list(self.source_words),
            "endpoint": self.endpoint,
        }


@dataclass(frozen=True)
class SessionClosed(_Json):
    """The session is over and everything is told; `audio_ms` is how much audio it had."""

    seq: int
    audio_ms: int

    TYPE: ClassVar[str] = "session.closed"

    def _fields(self) -> dict[str, Any]:
        return {"audio_ms": self.audio_ms}


@dataclass(frozen=True)
class ErrorEvent(_Json):
    """Something that the client sent cannot be used: a code for programs, a sentence for people."""

    seq: int
    code: str
    message: str

    TYPE: ClassVar[str] = "error"

    def _fields(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message}}


Event = (
    SessionCreated | SessionUpdated | SessionResumed | TranscriptDelta | TranslationDelta | SessionClosed | ErrorEvent
)


def parse_event(text: str | bytes) -> Event:
    """Read one line of JSON as the event that it is; the reverse of `to_json`.

    Fields that this version does not know are passed over: an older client understands a newer server.

    Raises:
        ValueError: The text is not JSON, or not an event of a known type with its fields.
    """
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError(f"an event is a JSON object, not {type(data).__name__}")
    try:
        match data.get("type"):
            case SessionCreated.TYPE:
                return SessionCreated(data["session"], data["seq"])
            case SessionUpdated.TYPE:
                return SessionUpdated(data["session"], data["seq"])
            case SessionResumed.TYPE:
                return SessionResumed(data["seq"], data["messages"], data["audio_bytes"])
            case TranscriptDelta.TYPE:
                return _parse_transcript_delta(data)
            case TranslationDelta.TYPE:
                return _parse_translation_delta(data)
            case SessionClosed.TYPE:
                return SessionClosed(data["seq"], data["audio_ms"])
            case ErrorEvent.TYPE:
                return ErrorEvent(data["seq"], data["error"]["code"], data["error"]["message"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"an event of type {data['type']!r} lacks the field {error}") from error
    raise ValueError(f"{data.get('type')!r} is no known type of event")


def _parse_transcript_delta(data: dict[str, Any]) -> TranscriptDelta:
    keys = ("seq", "delta", "start_ms", "end_ms", "emitted_ms", "segment", "endpoint")
    words = tuple(Word(word["word"], word["start_ms"], word["end_ms"], word["confidence"]) for word in data["words"])
    return TranscriptDelta(**{key: data[key] for key in keys}, words=words, backlog_ms=data.get("backlog_ms"))


def _parse_translation_delta(data: dict[str, Any]) -> TranslationDelta:
    first, last = data["source_words"]
    times = {key: data.get(key) for key in ("source_start_ms", "source_end_ms", "emitted_ms", "backlog_ms")}
    return TranslationDelta(data["seq"], data["delta"], data["language"], (first, last), data["endpoint"], **times)
