"""simulstream's messages: a few settings and audio in, text to add out; what is told is never deleted."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final, Self

from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta, TranslationDelta
from streaming.messages import ClientMessage, Command
from streaming.session import SessionConfig
from wire.dialect import Dialect, Frame
from wire.fields import json_object, section, shown, value_at

_SETTINGS: Final = ("sample_rate", "source_lang", "target_lang", "metrics_metadata")


class Simulstream(Dialect):
    """Binary frames are s16le mono, text frames are JSON.

    A client that names a language to translate into is told the translation, another one the transcript.
    """

    PATH: ClassVar[str] = "/v1/simulstream"

    def __init__(self, latency: str) -> None:
        self._config = SessionConfig(latency=latency)
        self._source: str | None = None
        self._target: str | None = None
        self._declared = False

    @classmethod
    def begin(cls, query: Mapping[str, str]) -> Self:
        """The dialect of a session; the query may name its ``latency``, for which simulstream has no setting."""
        for name in query:
            if name != "latency":
                raise DragomanError("unknown_field", f"there is no parameter {shown(name)}: there is only latency")
        return cls(query.get("latency", SessionConfig().latency))

    def greeting(self, session_id: str, defaults: dict[str, Any]) -> list[Frame]:
        """Nothing."""
        return []

    def opening(self) -> list[ClientMessage]:
        """Nothing: settings may come until the audio does."""
        return []

    def take(self, frame: Frame) -> list[ClientMessage]:
        """Audio, settings, or the end."""
        if isinstance(frame, bytes):
            return [*self._declaration(), frame]
        fields = json_object(frame)
        if "end_of_stream" in fields:
            return [*self._declaration(), Command.CLOSE]
        self._set(section(fields, "the message", "end_of_stream", *_SETTINGS))
        return []

    def say(self, event: Event) -> list[Frame]:
        """Text to add, the end, or an error, which simulstream itself would not tell."""
        match event:
            case TranscriptDelta() if not self._config.languages:
                return _added(event.delta)
            case TranslationDelta():
                return _added(event.delta)
            case SessionClosed():
                return [json.dumps({"end_of_processing": True})]
            case ErrorEvent():
                return [json.dumps({"error": {"code": event.code, "message": event.message}}, ensure_ascii=False)]
        return []

    def _set(self, settings: dict[str, Any]) -> None:
        """Note settings. The model knows one source language; to translate into it means to transcribe."""
        rate_hz = value_at(settings, "sample_rate", int, self._config.audio.sample_rate_hz)
        source = value_at(settings, "source_lang", str, self._source)
        target = value_at(settings, "target_lang", str, self._target)
        languages = () if target in (None, source) else (target,)
        config = replace(self._config, audio=AudioFormat(sample_rate_hz=rate_hz), languages=languages)
        if self._declared and config != self._config:
            raise DragomanError(
                "session_already_declared",
                "the audio has begun, and its rate and language stay: connect again to change them",
            )
        self._config, self._source, self._target = config, source, target

    def _declaration(self) -> list[ClientMessage]:
        """The session, when its first audio comes."""
        if self._declared:
            return []
        self._declared = True
        return [self._config]


def _added(text: str) -> list[Frame]:
    return [json.dumps({"new": text, "deleted": ""}, ensure_ascii=False)] if text else []
