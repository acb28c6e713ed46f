"""What the service counts, in the text form of Prometheus.

Labels take few values, all of them the service's own: nothing that was said, and nothing about who said it.
"""

from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from websockets.frames import CloseCode

from streaming.events import ErrorEvent, Event, TranscriptDelta, TranslationDelta

TEXT_FORMAT: Final = "text/plain; version=0.0.4"
REFUSALS: Final = ("origin", "token", "draining", "full")

_CLOSE_CODES: Final = frozenset(map(int, CloseCode))
_LAG_BUCKETS_S: Final = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30)
_TICK_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROW_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counts of one service, in a registry of their own; they may be changed on any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="dragoman", registry=self.registry)
        gauge = partial(Gauge, namespace="dragoman", registry=self.registry)
        histogram = partial(Histogram, namespace="dragoman", registry=self.registry)
        self.sessions = gauge("sessions", "Sessions now.")
        self.max_sessions = gauge("max_sessions", "Sessions that there may be at a time.")
        self.input_queue_bytes = gauge("input_queue_bytes", "Audio that waits for the engine.")
        self.output_queue_events = gauge("output_queue_events", "Events that wait for their clients.")
        self.opened = counter("sessions_opened", "Sessions that have begun.")
        self.refused = counter("sessions_refused", "Handshakes that were refused, by reason.", ["reason"])
        self.closed = counter("sessions_closed", "Sessions that have ended, by the close code.", ["code"])
        self.slow_readers = counter("slow_readers_dropped", "Sessions that ended as the client did not read.")
        self.audio_s = counter("audio_seconds", "Audio that came in.")
        self.words = counter("words", "Words that were told.")
        self.chunks = counter("translated_chunks", "Chunks of translation that were told.", ["language"])
        self.errors = counter("errors", "Errors that were told, by code.", ["code"])
        self.lag_s = histogram(
            "lag_seconds",
            "Time from the arrival of the audio that a text needed to the text.",
            ["text"],
            buckets=_LAG_BUCKETS_S,
        )
        self.tick_s = histogram("tick_seconds", "Time of a step of the engine.", buckets=_TICK_BUCKETS_S)
        self.tick_rows = histogram("tick_rows", "Sessions that a step advanced.", buckets=_ROW_BUCKETS)
        ProcessCollector(registry=self.registry)
        for reason in REFUSALS:
            self.refused.labels(reason)  # a rate begins at 0, not at the first refusal

    def text(self) -> str:
        """All of it, for an HTTP response of the type `TEXT_FORMAT`."""
        return generate_latest(self.registry).decode()

    def ticked(self, rows: int, duration_s: float) -> None:
        """Count a step of the engine."""
        self.tick_rows.observe(rows)
        self.tick_s.observe(duration_s)

    def told(self, event: Event) -> None:
        """Count an event that a client was sent."""
        if isinstance(event, ErrorEvent):
            self.errors.labels(event.code).inc()
        if not isinstance(event, TranscriptDelta | TranslationDelta):
            return
        if isinstance(event, TranscriptDelta):
            self.words.inc(len(event.words))
        elif event.delta:
            self.chunks.labels(event.language).inc()
        if event.backlog_ms is not None:
            text = "transcript" if isinstance(event, TranscriptDelta) else "translation"
            self.lag_s.labels(text).observe(event.backlog_ms / 1000)

    def ended(self, close_code: int | None) -> None:
        """Count a session's end by the code of the close frame that came first; None where there was none."""
        code = int(CloseCode.ABNORMAL_CLOSURE) if close_code is None else close_code
        self.closed.labels(str(code) if code in _CLOSE_CODES else "other").inc()  # a client may choose any
