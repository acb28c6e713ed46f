import platform
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.graphs import ROW_BUCKETS
from models.recognizer import Recognizer
from models.translator import Translator
from streaming import scheduler
from streaming.audio import AudioFormat
from streaming.events import ErrorEvent, Event, SessionClosed, SessionUpdated, TranscriptDelta, TranslationDelta
from streaming.messages import ClientMessage, CloseCode, Command, LookaheadChange
from streaming.scheduler import Engine, EngineBounds, Stream
from streaming.session import Session, SessionConfig
from tests import tiny
from tests.fakes import FakeRecognizer, FakeSession, FakeTranslator, fake_tick, pcm, tone


def engine(
    recognizer: object = FakeRecognizer(),
    translator: object = None,
    *,
    slots: int = 64,
    ticked: Callable[[int, float], object] = lambda rows, duration_s: None,
    bounds: EngineBounds | None = None,
) -> Engine:
    """An engine that has not been started: a test makes its steps."""
    return Engine(
        cast(Recognizer, recognizer),
        cast(Translator, translator),
        None,
        slots=slots,
        describe=lambda config: {"max_lookahead_ms": config.max_lookahead_ms},
        ticked=ticked,
        bounds=bounds,
    )


DEFAULT: Final = SessionConfig()


def begun(worker: Engine, config: SessionConfig = DEFAULT) -> Stream:
    """A new session of an engine."""
    stream = Stream(lambda: None)
    stream.put(config)
    worker.add(stream)
    return stream


def run(worker: Engine) -> None:
    while worker.step():
        pass


def told(events: Sequence[Event | CloseCode]) -> list[dict[str, Any]]:
    """What text there is, without numbers and without what depends on the clock."""
    texts = [event.to_dict() for event in events if isinstance(event, TranscriptDelta | TranslationDelta)]
    return [{key: value for key, value in text.items() if key not in ("seq", "backlog_ms")} for text in texts]


def words(stream: Stream) -> str:
    return "".join(event.delta for event in stream.outbox if isinstance(event, TranscriptDelta))


# ------------------------------------------------------------------ the law: whoever is served beside, text is the same

_SPEECH = (3_000 * np.random.default_rng(3).standard_normal(64_000)).clip(-32_768, 32_767).astype("<i2").tobytes()
_LANGUAGES = ((), ("es",), ("de", "fr"))


@st.composite
def scripts(draw: st.DrawFn) -> tuple[SessionConfig, list[ClientMessage]]:
    """What one client asks for: audio in messages of any length, flushes and changes among it, and the end."""
    config = SessionConfig(
        max_lookahead_ms=draw(st.sampled_from([None, 0, 80, 240])),
        lookahead=draw(st.sampled_from([None, "adaptive"])),
        decoder=draw(st.sampled_from(["rnnt", "rnnt", "ctc"])),
        languages=draw(st.sampled_from(_LANGUAGES)),
        latency="low",
    )
    begin = 2 * draw(st.integers(0, 16_000))
    messages: list[ClientMessage] = []
    for size_bytes in draw(st.lists(st.sampled_from([1, 999, 3_200, 9_601, 20_000]), min_size=1, max_size=6)):
        messages.append(_SPEECH[begin : begin + size_bytes])
        begin += size_bytes
        messages += draw(st.sampled_from([[], [], [], [Command.FLUSH], [LookaheadChange(80)]]))
    return config, [*messages, Command.CLOSE]


def alone(config: SessionConfig, messages: Sequence[ClientMessage]) -> list[Event]:
    session = Session(tiny.recognizer(4), config, tiny.translator())
    events: list[Event] = []
    for message in messages:
        if isinstance(message, bytes):
            events += session.push(message)
        elif isinstance(message, LookaheadChange):
            session.set_max_lookahead_ms(message.max_lookahead_ms)
        else:
            events += session.flush() if message is Command.FLUSH else session.finish()
    return events


@settings(max_examples=15, deadline=None)
@given(st.lists(scripts(), min_size=2, max_size=4), st.data())
def test_the_events_of_a_session_are_those_of_the_same_audio_alone(
    clients: list[tuple[SessionConfig, list[ClientMessage]]], data: st.DataObject
) -> None:
    worker = engine(tiny.recognizer(4), tiny.translator(), slots=len(clients))
    waiting: list[tuple[Stream | None, SessionConfig, list[ClientMessage]]] = [
        (None, config, list(messages)) for config, messages in clients
    ]
    streams: list[Stream | None] = [None] * len(clients)
    while any(messages for _, _, messages in waiting):
        at = data.draw(st.sampled_from([i for i, (_, _, messages) in enumerate(waiting) if messages]))
        stream, config, messages = waiting[at]
        if stream is None:
            stream = streams[at] = begun(worker, config)
        for _ in range(data.draw(st.integers(1, 12))):  # a live client's one, or an upload at once
            if messages:
                stream.put(messages.pop(0))
        waiting[at] = (stream, config, messages)
        for _ in range(data.draw(st.integers(0, 3))):
            worker.step()
    run(worker)
    for (config, messages), stream in zip(clients, streams, strict=True):
        assert stream is not None
        *events, code = stream.outbox
        assert code is CloseCode.NORMAL_CLOSURE and stream.over
        expected = alone(config, messages)
        assert told(events) == told(expected)
        assert events[-1] == expected[-1]


# ------------------------------------------------------------------------------------------------- bounded work, fairly


@pytest.mark.usefixtures("fake_sessions")
def test_a_slot_is_taken_and_given_back() -> None:
    worker = engine(slots=2)
    first, _ = begun(worker), begun(worker)
    with pytest.raises(ValueError):
        worker.add(Stream(lambda: None))
    worker.remove(first)
    third = begun(worker)
    third.put(pcm([0.3]))
    run(worker)
    assert worker.sessions == 2 and words(third) == " w30" and words(first) == ""


@pytest.mark.usefixtures("fake_sessions")
def test_a_burst_of_uploads_never_keeps_a_live_session_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s, rows = 100.0, []
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: clock_s)
    worker = engine(ticked=lambda count, duration_s: rows.append(count))
    uploads = [begun(worker) for _ in range(40)]
    live = [begun(worker) for _ in range(3)]
    for upload in uploads:
        upload.put(pcm([0.5] * 50))  # 20 s at once
    for count in range(1, 26):
        clock_s += 0.4
        for stream in live:
            stream.put(pcm([0.2]))
        worker.step()
        assert [words(stream) for stream in live] == [" w20" * count] * 3
    assert max(rows) <= 3 + worker.bounds.uploads
    heard = [words(upload).count("w50") for upload in uploads]
    assert sum(heard) == 25 * worker.bounds.uploads and max(heard) - min(heard) <= 1
    clock_s += scheduler._PAUSE_S  # nobody speaks: the uploads have the engine for themselves
    rows.clear()
    worker.step()
    assert rows == [worker.bounds.rows]
    run(worker)
    assert all(words(upload) == " w50" * 50 for upload in uploads)


@pytest.mark.usefixtures("fake_sessions")
def test_more_live_sessions_than_a_step_takes_have_their_turns() -> None:
    worker = engine()
    streams = [begun(worker) for _ in range(50)]
    for stream in streams:
        stream.put(pcm([0.2, 0.3]))
    worker.step()
    worker.step()
    assert all(words(stream).startswith(" w20") for stream in streams)
    run(worker)
    assert all(words(stream) == " w20 w30" for stream in streams)


@pytest.mark.usefixtures("fake_sessions")
def test_a_gpu_takes_as_many_sessions_into_a_step_as_its_graphs_have_rows() -> None:
    assert EngineBounds.of(torch.device("cpu")) == engine().bounds == EngineBounds(rows=32)
    bounds, rows = EngineBounds.of(torch.device("cuda", 1)), list[int]()
    assert bounds.rows == ROW_BUCKETS[-1] == 256
    worker = engine(slots=300, ticked=lambda count, duration_s: rows.append(count), bounds=bounds)
    for _ in range(300):
        begun(worker).put(pcm([0.2]))
    worker.step()
    worker.step()
    assert rows == [256, 44]


@pytest.mark.usefixtures("fake_sessions")
def test_a_step_takes_in_little_of_much(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Watched(FakeSession):
        def write(self, pcm: Any) -> None:
            taken.append(len(pcm))
            super().write(pcm)

    monkeypatch.setattr(scheduler, "Session", Watched)
    worker = engine()
    stream = begun(worker)
    stream.put(pcm([0.2] * 75))  # 30 s in one message
    worker.step()
    assert taken == [32_000]
    for _ in range(200):
        stream.put(b"\0\0")
    run(worker)
    assert words(stream) == " w20" * 75 and sum(taken) == 75 * 12_800 + 400
    taken.clear()
    for _ in range(200):
        stream.put(b"\0\0")
    worker.step()
    assert taken == [400], "small pieces are taken in as one"
    taken.clear()
    stream = begun(worker, SessionConfig(AudioFormat("f32le")))
    for _ in range(200):
        stream.put(b"\0\0\0\0")
    worker.step()
    assert taken == [4] * (scheduler._MAX_MESSAGES - 1), "beside the settings"
    run(worker)
    assert stream.waiting_bytes == 0 and stream.has_room


@pytest.mark.parametrize("speaks", [True, False])
def test_an_upload_takes_several_chunks_where_nobody_speaks(monkeypatch: pytest.MonkeyPatch, speaks: bool) -> None:
    chunks: list[int] = []

    def tick(sessions: Sequence[FakeSession], *, max_chunks: int = 1) -> None:
        chunks.append(max_chunks)
        fake_tick(sessions)

    monkeypatch.setattr(scheduler, "Session", FakeSession)
    monkeypatch.setattr(scheduler, "tick", tick)
    worker = engine()
    for _ in range(3):
        begun(worker).put(pcm([0.2] * 20))
    if speaks:
        begun(worker).put(b"\0\0")
    worker.step()
    assert chunks == [1 if speaks else worker.bounds.chunks // 3]


def test_flushes_and_ends_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    worker = engine(tiny.recognizer(4), ticked=lambda count, duration_s: rows.append(count))
    streams = [begun(worker) for _ in range(4)]
    for stream in streams:
        stream.put(_SPEECH[:20_000])
    run(worker)
    rows.clear()
    for stream in streams[:3]:
        stream.put(Command.FLUSH)
    streams[3].put(Command.CLOSE)
    run(worker)
    assert rows and set(rows) <= {3, 4} and rows[0] == 4
    assert isinstance(streams[3].outbox[-2], SessionClosed)
    flushed = alone(SessionConfig(), [_SPEECH[:20_000], Command.FLUSH])
    assert all(told(stream.outbox) == told(flushed) for stream in streams[:3])


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_failure_in_one_row_changes_nothing_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of all has advanced some of them when it fails: what it did is done again, and told once."""
    worker = engine(tiny.recognizer(4), tiny.translator())
    configs = [SessionConfig(languages=languages, latency="low") for languages in _LANGUAGES]
    streams = [begun(worker, config) for config in configs]
    ill = begun(worker, SessionConfig(endpoint_silence_ms=999))
    decoded = Session._decoded

    def decode(session: Session, done: Any, tokens: Any) -> Generator[np.ndarray, bool, None]:
        yield from decoded(session, done, tokens)
        if session.config.endpoint_silence_ms == 999 and session._audio_samples > 16_000:
            raise ZeroDivisionError

    monkeypatch.setattr(Session, "_decoded", decode)
    for start in range(0, len(_SPEECH), 8_000):
        for stream in (ill, *streams) if start else (*streams, ill):
            stream.put(_SPEECH[start : start + 8_000])
        run(worker)
    for stream in streams:
        stream.put(Command.CLOSE)
    run(worker)
    error, code = list(ill.outbox)[-2:]
    assert isinstance(error, ErrorEvent) and error.code == "internal_error" and code is CloseCode.INTERNAL_ERROR
    for stream, config in zip(streams, configs, strict=True):
        assert told(stream.outbox) == told(alone(config, [_SPEECH, Command.CLOSE]))


@pytest.mark.usefixtures("fake_sessions")
def test_audio_that_cannot_be_read_ends_the_session_after_the_words_before_it() -> None:
    worker = engine(translator=FakeTranslator())
    stream = begun(worker, SessionConfig(AudioFormat("f32le"), languages=("es",)))
    stream.put(tone([0.2, 0.3]).tobytes()[:-400])
    stream.put(np.full(9, np.nan, np.float32).tobytes())
    run(worker)
    _, *events, error, code = stream.outbox
    assert "".join(event.delta for event in events if isinstance(event, TranslationDelta)) == " es20 es30"
    assert isinstance(error, ErrorEvent) and error.code == "audio_not_finite" and code is CloseCode.INVALID_DATA


@pytest.mark.usefixtures("fake_sessions")
def test_the_look_ahead_changes_or_its_sentence_comes() -> None:
    worker = engine()
    stream = begun(worker)
    for change_ms in (160, -1):
        stream.put(LookaheadChange(change_ms))
    run(worker)
    _, updated, error = stream.outbox
    assert isinstance(updated, SessionUpdated) and updated.session == {"max_lookahead_ms": 160}
    assert isinstance(error, ErrorEvent) and error.code == "unsupported_lookahead"


# ------------------------------------------------------------------------------------------------------------ the clock


def test_what_is_kept_of_arrivals_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: float(next(clock)))
    stream = Stream(lambda: None)
    stream.session = cast(Any, FakeSession(None, SessionConfig()))
    stream.put(SessionConfig())
    for _ in range(1_000):
        stream.put(pcm([0.0]))
        cast(Any, stream.session).write(pcm([0.0]))
        cast(Any, stream.session).step()
        stream.timed(cast(Any, stream.session).take_events())
    assert len(stream._arrivals) < 3


def test_the_lag_of_a_file_sent_at_once_is_that_of_its_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = 100.0
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: clock_s)
    stream = Stream(lambda: None)
    stream.put(SessionConfig())
    stream.session = cast(Any, FakeSession(None, SessionConfig()))
    for _ in range(50):  # 20 s
        stream.put(pcm([0.2]))
        stream.session.write(pcm([0.2]))
    assert stream.lag_s(clock_s) == 0.0
    assert stream.lag_s(clock_s + 4.2) == pytest.approx(4.0)
    for _ in range(11):
        cast(Any, stream.session).step()
    assert stream.lag_s(clock_s + 4.2) == 0.0
    clock_s += 60  # what waits now has been due for long
    assert stream.lag_s(clock_s) == pytest.approx(20 - 4.4)
    stream.timed([])
    assert stream.lag_s(clock_s) == pytest.approx(20 - 4.4)
    while stream.session.ready():
        cast(Any, stream.session).step()
    clock_s += 60  # in a pause nothing becomes due
    stream.put(pcm([0.2] * 10))
    stream.session.write(pcm([0.2] * 10))
    assert stream.lag_s(clock_s + 3.9) == 0.0
    assert stream.lag_s(clock_s + 4.1) == pytest.approx(4.0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_stay_in_the_process() -> None:
    """In a process of its own, since what is tested cannot be undone."""
    script = """
import resource, torch
from streaming.scheduler import prepare_process
prepare_process()
faults = []
for _ in range(8):
    torch.empty(16 << 20).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[7] - faults[3])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000  # 64 MiB are 16,384 pages
