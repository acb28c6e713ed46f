"""OpenAI's realtime transcription: text frames with JSON events, audio in base64, the transcript in items.

An item is what lies between two commits, which the client makes, or the service where the speaker pauses. Its words
are told as soon as they are certain, before its commit.
"""

import base64
import binascii
import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, Self

from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, SessionUpdated, TranscriptDelta, Word
from streaming.messages import DEFAULT_RATE_HZ, ClientMessage, Command, LookaheadChange
from streaming.session import SessionConfig
from wire.dialect import Dialect, Frame
from wire.fields import json_object, section, shown, value_at
from wire.g711 import Law, to_s16le

_LAWS: Final[dict[str, Law]] = {"audio/pcmu": "mulaw", "audio/pcma": "alaw"}
_LAW_RATE_HZ: Final = 8_000
_BETA_FORMATS: Final = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_LOOKAHEADS_MS: Final = {"minimal": 0, "low": 80, "medium": 480, "high": 1_040, "xhigh": None}
"""What a `delay` is here."""
_SILENCES_MS: Final = {"low": 1_600, "medium": 800, "high": 400, "auto": 800}
"""Silence that commits, for each `eagerness`."""
_DEFAULT_SILENCE_MS: Final = 500
_MIN_SILENCE_MS: Final = 240
_MAX_SILENCE_MS: Final = 10_000
_LOGPROBS: Final = "item.input_audio_transcription.logprobs"
_LEAST_PROBABILITY: Final = 1e-6
_TRANSCRIPTION: Final = "conversation.item.input_audio_transcription"
_SERVICE_CODES: Final = ("internal_error", "overloaded", "server_shutdown")
"""Errors that are not the client's."""


@dataclass(frozen=True)
class _Settings:
    """What a client has chosen.

    Attributes:
        encoding: Type of the audio, as OpenAI names it.
        rate_hz: Samples per second.
        detection: Who finds the pauses at which items are committed; None: the client commits.
        silence_ms: Silence that is a pause.
        delay: How long to listen on before a word is told; None: as the model would.
        logprobs: Whether to tell how probable words are.
    """

    encoding: str = "audio/pcm"
    rate_hz: int = DEFAULT_RATE_HZ
    detection: Literal["server_vad", "semantic_vad"] | None = "server_vad"
    silence_ms: int = _DEFAULT_SILENCE_MS
    delay: str | None = None
    logprobs: bool = False

    def config(self) -> SessionConfig:
        """The same for the engine.

        Raises:
            DragomanError: ``unsupported_rate``.
        """
        return SessionConfig(
            audio=AudioFormat(sample_rate_hz=self.rate_hz),
            max_lookahead_ms=None if self.delay is None else _LOOKAHEADS_MS[self.delay],
            endpoint_silence_ms=self.silence_ms,
        )


@dataclass(frozen=True)
class _Reply:
    """What is said when everything before a request of the client has been told.

    Attributes:
        kind: What the client asked for; ``declared`` if it did not, and begins with audio.
        frame: What an update is answered with.
        audio_ms: Audio that had come when it asked.
    """

    kind: Literal["declared", "updated", "committed", "cleared"]
    frame: dict[str, Any] | None = None
    audio_ms: int = 0


class Transcriptions(Dialect):
    """What OpenAI's clients know of a session that transcribes, and nothing of conversations."""

    PATH: ClassVar[str] = "/v1/realtime"

    def __init__(self) -> None:
        self._session_id = self._model = ""
        self._settings = _Settings()
        self._declared = False
        self._audio_bytes = self._uncommitted_bytes = 0
        self._replies: deque[_Reply] = deque()
        self._culprits: deque[tuple[str, str | None]] = deque()  # sentence about a client's event, and its id
        self._events = 0
        # The item that words are now told of.
        self._item = 1
        self._previous: str | None = None
        self._from_ms = 0
        self._words: list[Word] = []
        self._text = ""

    @classmethod
    def begin(cls, query: Mapping[str, str]) -> Self:
        """The dialect of a session; its model is the service's, whatever the query names."""
        intent = query.get("intent", "transcription")
        if intent != "transcription":
            raise DragomanError("unsupported_session", f"intent is {shown(intent)}: only transcription is there")
        return cls()

    def greeting(self, session_id: str, defaults: dict[str, Any]) -> list[Frame]:
        """The event ``session.created``."""
        self._session_id, self._model = session_id, defaults["model"]
        return [self._event("session.created", session=self._described(self._settings))]

    def opening(self) -> list[ClientMessage]:
        """Nothing: the first event declares the session."""
        return []

    def take(self, frame: Frame) -> list[ClientMessage]:
        """One event; a binary frame is audio."""
        if isinstance(frame, bytes):
            return self._append(frame)
        event: dict[str, Any] = {}
        try:
            event = json_object(frame)
            return self._take(event)
        except DragomanError as error:
            name = event.get("event_id")
            known = name.encode(errors="replace").decode() if isinstance(name, str) else None
            self._culprits.append((str(error), known))
            raise

    def say(self, event: Event) -> list[Frame]:
        """What the item brings, replies, and errors."""
        match event:
            case TranscriptDelta():
                return self._heard(event)
            case SessionUpdated() if self._replies:  # a session that ends before it is declared is told of unasked
                return self._reply(self._replies.popleft())
            case ErrorEvent():
                return [self._error(event)]
            case SessionClosed() if self._text:
                return self._commit(event.audio_ms)
        return []

    # ------------------------------------------------------------------------------------------ from the client

    def _take(self, event: dict[str, Any]) -> list[ClientMessage]:
        kind = event.get("type")
        match kind:
            case "session.update":
                session = section(event, "the event", "type", "event_id", "session").get("session")
                settings = _updated(self._settings, session)
                return self._update(settings, "session.updated", self._described(settings))
            case "transcription_session.update":
                session = section(event, "the event", "type", "event_id", "session").get("session")
                settings = _updated_in_beta(self._settings, session)
                return self._update(settings, "transcription_session.updated", self._described_in_beta(settings))
            case "input_audio_buffer.append":
                fields = section(event, "the event", "type", "event_id", "audio")
                return self._append(_from_base64(value_at(fields, "audio", str, "")))
            case "input_audio_buffer.commit":
                section(event, "the event", "type", "event_id")
                return self._end_item("committed")
            case "input_audio_buffer.clear":
                section(event, "the event", "type", "event_id")
                return self._end_item("cleared")
        raise DragomanError(
            "unknown_event",
            f"the type of the event is {shown(kind)}: this address transcribes, and takes session.update and"
            " input_audio_buffer.append, .commit and .clear",
        )

    def _update(self, settings: _Settings, kind: str, session: dict[str, Any]) -> list[ClientMessage]:
        """Declare the session, anew as long as there is no audio; later, what concerns the engine must stay."""
        config = settings.config()
        if self._audio_bytes and (config, settings.encoding) != (self._settings.config(), self._settings.encoding):
            raise DragomanError(
                "session_already_declared",
                "the audio has begun, and its format, the silence and the delay stay: connect again to change them",
            )
        self._settings, self._declared = settings, True
        self._replies.append(_Reply("updated", {"type": kind, "session": session}))
        return [self._echo() if self._audio_bytes else config]

    def _append(self, data: bytes) -> list[ClientMessage]:
        law = _LAWS.get(self._settings.encoding)
        samples = to_s16le(data, law) if law else data
        messages = [*self._declaration(), samples]
        self._audio_bytes += len(samples)
        self._uncommitted_bytes += len(samples)
        return messages

    def _end_item(self, kind: Literal["committed", "cleared"]) -> list[ClientMessage]:
        if kind == "committed" and not self._uncommitted_bytes:
            raise DragomanError("input_audio_buffer_commit_empty", "there is no audio since the last commit: send some")
        messages = [*self._declaration(), Command.FLUSH, self._echo()]
        audio = self._settings.config().audio
        bytes_per_s = audio.sample_rate_hz * audio.bytes_per_sample
        self._replies.append(_Reply(kind, audio_ms=1000 * self._audio_bytes // bytes_per_s))
        self._uncommitted_bytes = 0
        return messages

    def _declaration(self) -> list[ClientMessage]:
        """The defaults, for a client that has not declared anything."""
        if self._declared:
            return []
        self._declared = True
        self._replies.append(_Reply("declared"))
        return [self._settings.config()]

    def _echo(self) -> LookaheadChange:
        """Changes nothing; its answer comes when everything before it has been told."""
        return LookaheadChange(self._settings.config().max_lookahead_ms)

    # -------------------------------------------------------------------------------------------- to the client

    def _heard(self, delta: TranscriptDelta) -> list[Frame]:
        end = next((reply.kind for reply in self._replies if reply.kind in ("committed", "cleared")), None)
        if end == "cleared":  # these words are of the audio that the client has given up
            return []
        text = delta.delta if self._text else delta.delta.lstrip()
        frames: list[Frame] = []
        if text:
            if not self._text and self._settings.detection:
                frames.append(self._item_event("input_audio_buffer.speech_started", audio_start_ms=delta.start_ms))
            frames.append(
                self._item_event(
                    f"{_TRANSCRIPTION}.delta", content_index=0, delta=text, logprobs=self._logprobs(delta.words)
                )
            )
            self._text += text
            self._words += delta.words if self._settings.logprobs else ()
        # A client that has asked for a commit gets this one, and not another beside it.
        if self._text and delta.endpoint and self._settings.detection and end is None:
            ended_ms = delta.emitted_ms
            frames.append(self._item_event("input_audio_buffer.speech_stopped", audio_end_ms=ended_ms))
            frames += self._commit(ended_ms)
        return frames

    def _reply(self, reply: _Reply) -> list[Frame]:
        match reply.kind:
            case "updated":
                assert reply.frame is not None
                return [self._event(**reply.frame)]
            case "committed":
                return self._commit(reply.audio_ms)
            case "cleared":
                self._next_item(reply.audio_ms)
                return [self._event("input_audio_buffer.cleared")]
        return []

    def _commit(self, audio_ms: int) -> list[Frame]:
        """The end of the item, with its transcript."""
        previous, name = self._previous, self._item_id
        item = {
            "id": name,
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_audio", "transcript": self._text}],
        }
        frames: list[Frame] = [
            self._item_event("input_audio_buffer.committed", previous_item_id=previous),
            self._event("conversation.item.added", previous_item_id=previous, item=item),
            self._item_event(
                f"{_TRANSCRIPTION}.completed",
                content_index=0,
                transcript=self._text,
                usage={"type": "duration", "seconds": max(0, audio_ms - self._from_ms) / 1000},
                logprobs=self._logprobs(self._words),
            ),
        ]
        self._next_item(audio_ms)
        self._previous = name
        return frames

    def _next_item(self, from_ms: int) -> None:
        self._item += 1
        self._from_ms, self._text, self._words = max(self._from_ms, from_ms), "", []

    @property
    def _item_id(self) -> str:
        return f"item_{self._item}"

    def _logprobs(self, words: Sequence[Word]) -> list[dict[str, Any]] | None:
        """How probable each word is; the recogniser's confidence, which is of words and not of pieces."""
        if not self._settings.logprobs:
            return None
        return [
            {
                "token": word.word,
                "bytes": list(word.word.encode()),
                "logprob": round(math.log(max(word.confidence, _LEAST_PROBABILITY)), 4),
            }
            for word in words
        ]

    def _error(self, event: ErrorEvent) -> Frame:
        culprit = None
        if self._culprits and self._culprits[0][0] == event.message:
            _, culprit = self._culprits.popleft()
        kind = "server_error" if event.code in _SERVICE_CODES else "invalid_request_error"
        error = {"type": kind, "code": event.code, "message": event.message, "param": None, "event_id": culprit}
        return self._event("error", error=error)

    def _item_event(self, type: str, **fields: Any) -> str:
        return self._event(type, item_id=self._item_id, **fields)

    def _event(self, type: str, **fields: Any) -> str:
        self._events += 1
        return json.dumps({"type": type, "event_id": f"event_{self._events}", **fields}, ensure_ascii=False)

    def _described(self, settings: _Settings) -> dict[str, Any]:
        fmt: dict[str, Any] = {"type": settings.encoding}
        if settings.encoding not in _LAWS:
            fmt["rate"] = settings.rate_hz
        audio_input = {
            "format": fmt,
            "noise_reduction": None,
            "transcription": {"model": self._model, "delay": settings.delay},
            "turn_detection": _described_detection(settings),
        }
        return {
            "type": "transcription",
            "object": "realtime.transcription_session",
            "id": self._session_id,
            "audio": {"input": audio_input},
            "include": [_LOGPROBS] if settings.logprobs else [],
        }

    def _described_in_beta(self, settings: _Settings) -> dict[str, Any]:
        names = {kind: name for name, kind in _BETA_FORMATS.items()}
        return {
            "object": "realtime.transcription_session",
            "id": self._session_id,
            "input_audio_format": names[settings.encoding],
            "input_audio_transcription": {"model": self._model},
            "turn_detection": _described_detection(settings),
            "include": [_LOGPROBS] if settings.logprobs else [],
        }


def _described_detection(settings: _Settings) -> dict[str, Any] | None:
    if settings.detection is None:
        return None
    if settings.detection == "semantic_vad":
        eagerness = next(name for name, silence_ms in _SILENCES_MS.items() if silence_ms == settings.silence_ms)
        return {"type": settings.detection, "eagerness": eagerness}
    return {"type": settings.detection, "silence_duration_ms": settings.silence_ms}


def _updated(settings: _Settings, value: object) -> _Settings:
    """Settings with what ``session.update`` names.

    Raises:
        DragomanError: With a sentence that names the field.
    """
    session = section(value, "session", "type", "audio", "include")
    kind = value_at(session, "session.type", str, "transcription")
    if kind != "transcription":
        raise DragomanError("unsupported_session", f"session.type is {shown(kind)}: only transcription is there")
    audio = section(session.get("audio"), "session.audio", "input")
    where = "session.audio.input"
    given = section(audio.get("input"), where, "format", "transcription", "noise_reduction", "turn_detection")
    if "format" in given:
        settings = _with_format(settings, given["format"])
    return _with_common(settings, where, given, session.get("include"))


def _updated_in_beta(settings: _Settings, value: object) -> _Settings:
    """Settings with what ``transcription_session.update`` names, an earlier form of the same.

    Raises:
        DragomanError: With a sentence that names the field.
    """
    names = ("format", "transcription", "noise_reduction")
    session = section(value, "session", *(f"input_audio_{name}" for name in names), "turn_detection", "include")
    given = {name: session[f"input_audio_{name}"] for name in names if f"input_audio_{name}" in session}
    if "turn_detection" in session:
        given["turn_detection"] = session["turn_detection"]
    if "format" in given:
        name = value_at(session, "session.input_audio_format", str, "pcm16")
        if name not in _BETA_FORMATS:
            raise _unsupported_encoding("session.input_audio_format", name, _BETA_FORMATS)
        settings = _with_format(settings, {"type": _BETA_FORMATS[name]})
    return _with_common(settings, "session", given, session.get("include"))


def _with_common(settings: _Settings, where: str, given: dict[str, Any], include: object) -> _Settings:
    """Settings with what both forms name alike; noise is never reduced, and hints change nothing."""
    if "turn_detection" in given:
        settings = _with_detection(settings, f"{where}.turn_detection", given["turn_detection"])
    hints = ("model", "language", "languages", "prompt", "keywords")
    transcription = section(given.get("transcription"), f"{where}.transcription", "delay", *hints)
    delay = value_at(transcription, f"{where}.transcription.delay", str, settings.delay)
    if delay is not None and delay not in _LOOKAHEADS_MS:
        raise _unknown_choice(f"{where}.transcription.delay", delay, _LOOKAHEADS_MS)
    if include is None:
        return replace(settings, delay=delay)
    if not isinstance(include, list) or any(name != _LOGPROBS for name in include):
        raise DragomanError("invalid_value", f"session.include is {shown(include)}: it may hold {_LOGPROBS}")
    return replace(settings, delay=delay, logprobs=bool(include))


def _with_format(settings: _Settings, value: object) -> _Settings:
    where = "session.audio.input.format"
    fmt = section(value, where, "type", "rate")
    kind = value_at(fmt, f"{where}.type", str, "audio/pcm")
    if kind not in ("audio/pcm", *_LAWS):
        raise _unsupported_encoding(f"{where}.type", kind, ("audio/pcm", *_LAWS))
    rate_hz = value_at(fmt, f"{where}.rate", int, _LAW_RATE_HZ if kind in _LAWS else DEFAULT_RATE_HZ)
    if kind in _LAWS and rate_hz != _LAW_RATE_HZ:
        raise DragomanError("unsupported_rate", f"{where}.rate is {rate_hz}: {kind} has {_LAW_RATE_HZ} Hz")
    return replace(settings, encoding=kind, rate_hz=rate_hz)


def _with_detection(settings: _Settings, where: str, value: object) -> _Settings:
    """Settings with the nearest silence that there is to the one that is asked for."""
    if value is None:
        return replace(settings, detection=None)
    without_effect = ("threshold", "prefix_padding_ms", "create_response", "interrupt_response", "idle_timeout_ms")
    detection = section(value, where, "type", "silence_duration_ms", "eagerness", *without_effect)
    match value_at(detection, f"{where}.type", str, "server_vad"):
        case "server_vad":
            silence_ms = value_at(detection, f"{where}.silence_duration_ms", int, _DEFAULT_SILENCE_MS)
            silence_ms = min(max(silence_ms, _MIN_SILENCE_MS), _MAX_SILENCE_MS)
            return replace(settings, detection="server_vad", silence_ms=silence_ms)
        case "semantic_vad":
            eagerness = value_at(detection, f"{where}.eagerness", str, "auto")
            if eagerness not in _SILENCES_MS:
                raise _unknown_choice(f"{where}.eagerness", eagerness, _SILENCES_MS)
            return replace(settings, detection="semantic_vad", silence_ms=_SILENCES_MS[eagerness])
        case kind:
            raise _unknown_choice(f"{where}.type", kind, ("server_vad", "semantic_vad"))


def _unknown_choice(where: str, value: str, choices: Iterable[str]) -> DragomanError:
    return DragomanError("invalid_value", f"{where} is {shown(value)}: choose one of {', '.join(choices)}")


def _unsupported_encoding(where: str, value: str, choices: Iterable[str]) -> DragomanError:
    return DragomanError("unsupported_encoding", f"{where} is {shown(value)}: send one of {', '.join(choices)}")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DragomanError("invalid_value", "audio is not base64") from None
