"""Deepgram's live transcription: the address declares the session, audio is binary, the answers are ``Results``.

What the transcript has told is never taken back, so that every result is final. The results of a session are about
parts of its audio that follow each other without a gap.
"""

import hashlib
import json
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Self

from streaming.audio import AudioFormat, Encoding
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, SessionUpdated, TranscriptDelta, Word
from streaming.messages import ClientMessage, Command, LookaheadChange
from streaming.session import SessionConfig
from wire.dialect import Dialect, Frame
from wire.fields import json_object, shown
from wire.g711 import Law, to_s16le

_ENCODINGS: Final[dict[str, Encoding]] = {"linear16": "s16le", "linear32": "f32le"}
_LAWS: Final[dict[str, Law]] = {"mulaw": "mulaw", "alaw": "alaw"}
_USED: Final = ("encoding", "sample_rate", "channels", "endpointing", "utterance_end_ms", "vad_events", "punctuate")
_WITHOUT_EFFECT: Final = (
    *("model", "version", "language", "language_hint", "interim_results", "smart_format", "filler_words", "no_delay"),
    *("keyterm", "keywords", "tag", "extra", "mip_opt_out"),
)
"""There is one model, it writes as it writes, and what it has written is final."""
_NOT_THERE: Final = (
    *("callback", "callback_method", "detect_entities", "detect_language", "diarize", "diarize_model", "dictation"),
    *("multichannel", "numerals", "profanity_filter", "redact", "replace", "search"),
)
"""What would change the text or add to it; it may be asked not to be done."""
_DEFAULT_ENDPOINTING_MS: Final = 10
_MIN_SILENCE_MS: Final = 240
_MAX_SILENCE_MS: Final = 10_000
_CHANNEL: Final = [0, 1]  # the first of one
_ECHO: Final = LookaheadChange(None)
"""Changes nothing; its answer comes when everything before it has been told."""


@dataclass(frozen=True)
class _Request:
    """What an address asks for.

    Attributes:
        config: The session.
        law: How a byte stands for a sample of 16 bits; None where samples are sent as they are.
        endpointing: Whether to mark results that end a segment.
        utterance_ends: Whether to tell the end of a segment in a message of its own.
        speech_starts: Whether to tell its start.
        punctuates: Whether words come in a second form, with what the model writes beside letters.
    """

    config: SessionConfig
    law: Law | None
    endpointing: bool
    utterance_ends: bool
    speech_starts: bool
    punctuates: bool

    @property
    def bytes_per_s(self) -> int:
        """Of the audio as the engine is given it."""
        return self.config.audio.sample_rate_hz * self.config.audio.bytes_per_sample


class Deepgram(Dialect):
    """Binary frames are audio, text frames are JSON."""

    PATH: ClassVar[str] = "/v1/listen"

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._about: dict[str, Any] = {}  # what each result says of the session
        self._audio_hash = hashlib.sha256()
        self._audio_bytes = 0
        self._declared = False
        self._told_ms = 0  # end of the last result
        self._speaking = False  # between the start of a segment and its end
        self._finalizing: deque[int] = deque()  # milliseconds of audio at each Finalize that has no answer yet
        self._held: TranscriptDelta | None = None  # told when it is known whether it is the last before that answer

    @classmethod
    def begin(cls, query: Mapping[str, str]) -> Self:
        """The dialect of a session that is declared by the query."""
        return cls(_request(query))

    def greeting(self, session_id: str, defaults: dict[str, Any]) -> list[Frame]:
        """Nothing; what will be said of the session is noted."""
        name = defaults["model"]
        self._about = {
            "request_id": session_id,
            "model_info": {"name": name, "version": "", "arch": "fastconformer"},
            "model_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        }
        return []

    def opening(self) -> list[ClientMessage]:
        """The session that the query declares."""
        return [self._request.config]

    def take(self, frame: Frame) -> list[ClientMessage]:
        """Audio, or ``KeepAlive``, ``Finalize`` or ``CloseStream``; an empty frame is the last, too."""
        if isinstance(frame, bytes):
            return self._audio(frame) if frame else [Command.CLOSE]
        kind = json_object(frame).get("type")
        match kind:
            case "KeepAlive":
                return []
            case "Finalize":
                self._finalizing.append(1000 * self._audio_bytes // self._request.bytes_per_s)
                return [Command.FLUSH, _ECHO]
            case "CloseStream":
                return [Command.CLOSE]
            case "Configure":
                raise DragomanError(
                    "unsupported_configure", "the session stays as the address declared it: connect again to change it"
                )
        raise DragomanError(
            "unknown_event",
            f"the type of the message is {shown(kind)}: send KeepAlive, Finalize or CloseStream; audio is binary",
        )

    def say(self, event: Event) -> list[Frame]:
        """``Results``, and at the end ``Metadata``."""
        match event:
            case TranscriptDelta():
                return self._heard(event)
            case SessionUpdated():
                return self._echoed()
            case SessionClosed():
                return [self._metadata(event)]
            case ErrorEvent():
                return [*self._released(), _error(event, self._about)]
        return []

    def _audio(self, data: bytes) -> list[ClientMessage]:
        self._audio_hash.update(data)
        samples = to_s16le(data, self._request.law) if self._request.law else data
        self._audio_bytes += len(samples)
        return [samples]

    def _heard(self, delta: TranscriptDelta) -> list[Frame]:
        if not self._finalizing:
            return self._results(delta, delta.end_ms)
        frames, self._held = self._released(), delta
        return frames

    def _released(self) -> list[Frame]:
        """What was held, which turned out not to be the last."""
        held, self._held = self._held, None
        return [] if held is None else self._results(held, held.end_ms)

    def _echoed(self) -> list[Frame]:
        """The first answer is to the declaration, of which Deepgram says nothing; the others are to `_ECHO`."""
        if not self._declared:
            self._declared = True
            return []
        audio_ms = self._finalizing.popleft()
        held, self._held = self._held, None
        return self._results(held, audio_ms, from_finalize=True)

    def _results(self, delta: TranscriptDelta | None, until_ms: int, *, from_finalize: bool = False) -> list[Frame]:
        """What became certain about the audio from the last result until a moment, and what it means for the segment.

        Args:
            delta: The words; None for none.
            until_ms: End of the audio that it is about.
            from_finalize: Whether everything is told that the client asked to finalize.
        """
        words = delta.words if delta else ()
        start_ms, self._told_ms = self._told_ms, max(self._told_ms, until_ms)
        is_end = delta is not None and delta.endpoint
        frames: list[Frame] = []
        if words and not self._speaking and self._request.speech_starts:
            frames.append(_json("SpeechStarted", channel=[0], timestamp=_seconds(words[0].start_ms)))
        alternative = {
            "transcript": delta.delta.strip() if delta else "",
            "confidence": round(sum(word.confidence for word in words) / len(words), 4) if words else 0.0,
            "words": [self._word(word) for word in words],
        }
        frames.append(
            _json(
                "Results",
                channel_index=_CHANNEL,
                start=_seconds(start_ms),
                duration=_seconds(self._told_ms - start_ms),
                is_final=True,
                speech_final=is_end and self._request.endpointing,
                from_finalize=from_finalize,
                channel={"alternatives": [alternative]},
                metadata=self._about,
            )
        )
        if is_end and words and self._request.utterance_ends:
            frames.append(_json("UtteranceEnd", channel=_CHANNEL, last_word_end=_seconds(words[-1].end_ms)))
        self._speaking = (self._speaking or bool(words)) and not is_end
        return frames

    def _word(self, word: Word) -> dict[str, Any]:
        said = {
            "word": word.word,
            "start": _seconds(word.start_ms),
            "end": _seconds(word.end_ms),
            "confidence": round(word.confidence, 4),
        }
        return {**said, "punctuated_word": word.word} if self._request.punctuates else said

    def _metadata(self, closed: SessionClosed) -> Frame:
        return _json(
            "Metadata",
            transaction_key="deprecated",
            request_id=self._about["request_id"],
            sha256=self._audio_hash.hexdigest(),
            created=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            duration=_seconds(closed.audio_ms),
            channels=self._request.config.audio.channels,
        )


def _request(query: Mapping[str, str]) -> _Request:
    """Read what an address asks for.

    Raises:
        DragomanError: With a sentence that names the parameter.
    """
    for name, value in query.items():
        if name in _NOT_THERE and value != "false":
            raise DragomanError("unsupported_feature", f"{name} is not there: leave it out")
        if name not in (*_USED, *_WITHOUT_EFFECT, *_NOT_THERE):
            raise DragomanError("unknown_field", f"there is no parameter {shown(name)}: leave it out")
    endpointing, utterance_ends = query.get("endpointing") != "false", "utterance_end_ms" in query
    return _Request(
        config=SessionConfig(audio=_audio_format(query), endpoint_silence_ms=_silence_ms(query)),
        law=_LAWS.get(query["encoding"]),
        endpointing=endpointing,
        utterance_ends=utterance_ends,
        speech_starts=_is_wanted(query, "vad_events"),
        punctuates=_is_wanted(query, "punctuate") or _is_wanted(query, "smart_format"),
    )


def _audio_format(query: Mapping[str, str]) -> AudioFormat:
    encoding = query.get("encoding")
    if encoding not in (*_ENCODINGS, *_LAWS):
        known = ", ".join((*_ENCODINGS, *_LAWS))
        text = "not declared" if encoding is None else shown(encoding)
        raise DragomanError("unsupported_encoding", f"the encoding is {text}: send raw audio, as one of {known}")
    if "sample_rate" not in query:
        raise DragomanError("unsupported_rate", "sample_rate is missing: declare the samples per second, as in 16000")
    rate_hz, channels = _number(query, "sample_rate", 0), _number(query, "channels", 1)
    return AudioFormat(_ENCODINGS.get(encoding, "s16le"), rate_hz, channels)


def _silence_ms(query: Mapping[str, str]) -> int:
    """Silence that ends a segment: the nearest that there is to what the client waits for."""
    wanted_ms = _DEFAULT_ENDPOINTING_MS
    if query.get("endpointing") == "false":
        wanted_ms = _MAX_SILENCE_MS
    elif query.get("endpointing") != "true":
        wanted_ms = _number(query, "endpointing", _DEFAULT_ENDPOINTING_MS)
    wanted_ms = _number(query, "utterance_end_ms", wanted_ms)
    return min(max(wanted_ms, _MIN_SILENCE_MS), _MAX_SILENCE_MS)


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise DragomanError("invalid_value", f"{name} is {shown(text)}: it must be a whole number")
    return int(text)


def _is_wanted(query: Mapping[str, str], name: str) -> bool:
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise DragomanError("invalid_value", f"{name} is {shown(text)}: it must be true or false")
    return text == "true"


def _error(event: ErrorEvent, about: Mapping[str, Any]) -> Frame:
    if event.code == "unsupported_configure":
        failure = "CONFIGURE_KEYTERMS_NOT_SUPPORTED"
        return _json("ConfigureFailure", request_id=about["request_id"], code=failure, description=event.message)
    variant = "SchemaError" if event.code in ("invalid_json", "unknown_event") else event.code
    return _json("Error", variant=variant, code=event.code, description=event.message)


def _seconds(ms: int) -> float:
    return ms / 1000


def _json(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, **fields}, ensure_ascii=False)
