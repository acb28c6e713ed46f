"""Our own protocol, which is OpenAI's realtime translation with fields added: ``docs/protocol.md`` describes it."""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from models.recognizer import Recognizer
from models.translator import AnyTranslator
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import Event, SessionCreated, SessionResumed
from streaming.messages import DEFAULT_RATE_HZ, ClientMessage, Command, LookaheadChange, Resume, SessionMessage
from streaming.session import SessionConfig
from wire.dialect import Dialect, Frame
from wire.fields import json_object, section, shown, value_at


class Translations(Dialect):
    """Text frames are JSON events, binary frames are PCM; every event of the service has a number."""

    PATH: ClassVar[str] = "/v1/realtime/translations"
    RESUMABLE: ClassVar[bool] = True

    def __init__(self, resumes: str | None = None) -> None:
        self.resumes = resumes
        self._declared = False
        self._seq = 0

    @classmethod
    def begin(cls, query: Mapping[str, str]) -> Self:
        """The dialect of a session; the query may name one to go on with, and its other fields ask for nothing."""
        return cls(query.get("resume"))

    def greeting(self, session_id: str, defaults: dict[str, Any]) -> list[Frame]:
        """The event ``session.created``."""
        return self.say(SessionCreated({"id": session_id, **defaults}, 0))

    def opening(self) -> list[ClientMessage]:
        """Nothing: the first frame declares the session."""
        return []

    def take(self, frame: Frame) -> list[ClientMessage]:
        """One event, or audio."""
        if self.resumes is not None:
            return [parse_resume(frame)]
        message = frame if isinstance(frame, bytes) else parse_message(frame, declared=self._declared)
        self._declared = True
        return [message]

    def say(self, event: Event) -> list[Frame]:
        """The event with its number; that a session goes on has none of its own."""
        if isinstance(event, SessionResumed):
            return [event.to_json()]
        self._seq += 1
        return [replace(event, seq=self._seq - 1).to_json()]


def describe(config: SessionConfig, recognizer: Recognizer, translator: AnyTranslator | None = None) -> dict[str, Any]:
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


def _describe_translator(translator: AnyTranslator) -> dict[str, Any]:
    return {
        "model": translator.name,
        "languages": list(translator.config.targets),
        "latencies": list(translator.config.latencies),
        "policy": translator.policy,
    }


def parse_resume(frame: Frame) -> Resume:
    """Read the first event of a client that goes on with a session.

    Raises:
        DragomanError: With a code, and a sentence that says what belongs there.
    """
    event = {} if isinstance(frame, bytes) else json_object(frame)
    if event.get("type") != "session.resume":
        raise DragomanError(
            "resume_expected", "the address asks to go on with a session: send session.resume before anything else"
        )
    fields = section(event, "the event", "type", "event_id", "token", "seq")
    return Resume(value_at(fields, "token", str, ""), value_at(fields, "seq", int, -1))


def parse_message(text: str, *, declared: bool = False) -> SessionMessage:
    """Read one JSON event of a client.

    Args:
        text: The event.
        declared: Whether the session has been declared, so that little of it can still be changed.

    Raises:
        DragomanError: With a code, and a sentence that names the field and says what belongs there.
    """
    try:
        event = json.loads(text)
        if "\\u" in text:
            json.dumps(event, ensure_ascii=False).encode()  # half a surrogate pair could not be sent back
    except (ValueError, RecursionError) as error:
        raise DragomanError("invalid_json", f"the message is not JSON: {error}") from None
    kind = event.get("type") if isinstance(event, dict) else None
    match kind:
        case "session.update":
            settings = section(event, "the event", "type", "event_id", "session").get("session")
            return _lookahead_change(settings) if declared else _session_config(settings)
        case "session.input_audio_buffer.append":
            audio = value_at(section(event, "the event", "type", "event_id", "audio"), "audio", str, "")
            try:
                return base64.b64decode(audio, validate=True)
            except (binascii.Error, ValueError):
                raise DragomanError("invalid_value", "audio is not base64") from None
        case Command.FLUSH.value | Command.CLOSE.value:
            section(event, "the event", "type", "event_id")
            return Command(kind)
    raise DragomanError(
        "unknown_event",
        f"the type of the event is {shown(kind)}: send session.update, session.input_audio_buffer.append,"
        f" {Command.FLUSH.value} or {Command.CLOSE.value}",
    )


def _session_config(value: object) -> SessionConfig:
    session = section(
        value,
        "session",
        *("audio", "latency", "glossary", "decoder", "max_lookahead_ms", "lookahead", "endpoint_silence_ms"),
    )
    audio = section(session.get("audio"), "session.audio", "input", "output")
    # What OpenAI's clients may send beside the format asks for nothing that there is a choice of here.
    audio_input = section(audio.get("input"), "session.audio.input", "format", "transcription", "noise_reduction")
    defaults = SessionConfig()
    return SessionConfig(
        audio=_audio_format(audio_input.get("format")),
        max_lookahead_ms=value_at(session, "session.max_lookahead_ms", int, None),
        lookahead=value_at(session, "session.lookahead", str, defaults.lookahead),
        decoder=value_at(session, "session.decoder", str, defaults.decoder),
        endpoint_silence_ms=value_at(session, "session.endpoint_silence_ms", int, defaults.endpoint_silence_ms),
        languages=_languages(audio.get("output")),
        latency=value_at(session, "session.latency", str, defaults.latency),
        glossary={} if session.get("glossary") is None else session["glossary"],
    )


def _audio_format(value: object) -> AudioFormat:
    where, defaults = "session.audio.input.format", AudioFormat()
    fmt = section(value, where, "type", "rate", "channels", "encoding")
    if value_at(fmt, f"{where}.type", str, "audio/pcm") != "audio/pcm":
        raise DragomanError("unsupported_encoding", f"{where}.type is {shown(fmt['type'])}: send audio/pcm")
    return AudioFormat(
        encoding=value_at(fmt, f"{where}.encoding", str, defaults.encoding),
        sample_rate_hz=value_at(fmt, f"{where}.rate", int, DEFAULT_RATE_HZ),
        channels=value_at(fmt, f"{where}.channels", int, defaults.channels),
    )


def _languages(value: object) -> tuple[str, ...]:
    """The languages to translate into, given as a list, or as OpenAI does, as one string."""
    where = "session.audio.output"
    output = section(value, where, "language", "languages")
    one, several = value_at(output, f"{where}.language", str, None), output.get("languages")
    if several is None:
        return () if one is None else (one,)
    if one is not None:
        raise DragomanError("invalid_value", f"{where} has both language and languages: send one of them")
    if not isinstance(several, list) or not all(isinstance(language, str) for language in several):
        raise DragomanError(
            "invalid_value", f'{where}.languages is {shown(several)}: it must be a list of languages, such as ["es"]'
        )
    return tuple(dict.fromkeys(several))


def _lookahead_change(value: object) -> LookaheadChange:
    if not isinstance(value, dict) or value.keys() != {"max_lookahead_ms"}:
        raise DragomanError(
            "session_already_declared",
            "after the first session.update or audio, only session.max_lookahead_ms can be changed: send it alone,"
            " or connect again to change the rest",
        )
    return LookaheadChange(value_at(value, "session.max_lookahead_ms", int, None))
