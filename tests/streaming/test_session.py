"""The law, at the level of events: chunking and company change nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.recognizer import Recognizer
from models.tokenizer import SentencePieceTokenizer
from models.translator import OWN_ENDPOINT, TranslationConfig, Translator
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta, TranslationDelta
from streaming.session import Session, SessionConfig, tick
from tests import tiny

LOOKAHEADS_MS = [0, 80, 240, 480]
#: Chunks of one size, chunks as the controller wants them, and a model whose layers decide.
KINDS = st.sampled_from(["fixed", "adaptive", "gates"])


def audio(samples: int, seed: int) -> np.ndarray:
    """Noise in bursts with true silence between them, so that endpoints happen."""
    rng = np.random.default_rng(seed)
    bursts = np.repeat(rng.integers(0, 3, samples // 12000 + 1) > 0, 12000)[:samples]
    return (rng.standard_normal(samples) * bursts * 3000).clip(-32768, 32767).astype(np.int16)


def config(lookahead_ms: int = 480, decoder: str = "rnnt", rate_hz: int = 16000, kind: str = "fixed") -> SessionConfig:
    policy = None if kind == "gates" else kind
    return SessionConfig(AudioFormat("s16le", rate_hz), lookahead_ms, decoder, 400, policy)  # type: ignore[arg-type]


def opened(settings_: SessionConfig) -> Session:
    return Session(tiny.recognizer(gates=0 if settings_.lookahead else 3), settings_)


def alone(pcm: np.ndarray, settings_: SessionConfig) -> list[Event]:
    session = opened(settings_)
    return session.push(pcm.tobytes()) + session.finish()


def text(events: list[Event]) -> str:
    return "".join(event.delta for event in events if isinstance(event, TranscriptDelta))


def wire(events: list[Event]) -> list[str]:
    return [event.to_json() for event in events]


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(0, 60_000),
    seed=st.integers(0, 30),
    lookahead_ms=st.sampled_from(LOOKAHEADS_MS),
    decoder=st.sampled_from(["rnnt", "ctc"]),
    rate_hz=st.sampled_from([8000, 16000, 44100]),
    cuts=st.lists(st.integers(0, 120_000), max_size=10),
    kind=KINDS,
)
def test_any_chunking_gives_identical_events(
    samples: int, seed: int, lookahead_ms: int, decoder: str, rate_hz: int, cuts: list[int], kind: str
) -> None:
    pcm, settings_ = audio(samples, seed), config(lookahead_ms, decoder, rate_hz, kind)
    data = pcm.tobytes()
    session, events, start = opened(settings_), [], 0
    for end in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        events += session.push(data[start:end])
        start = end
    events += session.finish()
    assert events == alone(pcm, settings_)
    assert [event.seq for event in events] == list(range(len(events)))
    assert isinstance(events[-1], SessionClosed)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_company_and_batching_change_nothing(data: st.DataObject) -> None:
    """Sessions of any look-ahead and decoder in common ticks, with audio that comes and ends at any time."""
    gates = data.draw(st.booleans())
    kinds = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 50_000),
                st.sampled_from(LOOKAHEADS_MS),
                st.sampled_from(["rnnt", "ctc"]),
                st.sampled_from(["gates"] if gates else ["fixed", "adaptive"]),
            ),
            min_size=1,
            max_size=4,
        )
    )
    pcms = [audio(samples, i) for i, (samples, *_) in enumerate(kinds)]
    settings_ = [config(ms, decoder, kind=kind) for _, ms, decoder, kind in kinds]
    sessions = [opened(one) for one in settings_]
    sent, events = [0] * len(kinds), [[] for _ in kinds]
    closed = [False] * len(kinds)
    while not all(closed) or any(session.ready() for session in sessions):
        for i, session in enumerate(sessions):
            if closed[i]:
                continue
            n = data.draw(st.sampled_from([500, 7000, 30_000]))
            session.write(pcms[i][sent[i] : sent[i] + n].tobytes())
            sent[i] += n
            if sent[i] >= len(pcms[i]):
                session.close_input()
                closed[i] = True
        tick(sessions, max_chunks=data.draw(st.integers(1, 4)))
    for i, session in enumerate(sessions):
        events[i] += session.take_events()
        assert wire(events[i]) == wire(alone(pcms[i], settings_[i]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 40), at=st.integers(1, 100_000), lookahead_ms=st.sampled_from(LOOKAHEADS_MS), kind=KINDS)
def test_a_flush_changes_no_later_segment(seed: int, at: int, lookahead_ms: int, kind: str) -> None:
    """Words of the segments after the flush point's own are those of the transcript without a flush."""
    pcm = audio(110_000, seed)
    plain = [e for e in alone(pcm, config(lookahead_ms, kind=kind)) if isinstance(e, TranscriptDelta)]
    session = opened(config(lookahead_ms, kind=kind))
    before = session.push(pcm[:at])
    flushed = session.flush()
    events = before + flushed + session.push(pcm[at:]) + session.finish()
    assert [event.seq for event in events] == list(range(len(events)))
    at_ms = at // 16
    segments: dict[int, list[TranscriptDelta]] = {}
    for event in plain:
        segments.setdefault(event.segment, []).append(event)
    # The flush point's own segment is the first that ends after it (its last piece may come in the padding).
    later = [e for part in segments.values() if part[0].start_ms > at_ms + 560 for e in part]
    own = [s for s, part in segments.items() if part[-1].end_ms + 560 >= at_ms]
    later = [e for e in later if e.segment not in own[:1]]
    words = [(w.word, w.start_ms, w.end_ms) for e in later for w in e.words]
    got = [(w.word, w.start_ms, w.end_ms) for e in events if isinstance(e, TranscriptDelta) for w in e.words]
    assert words == (got[-len(words) :] if words else [])
    assert all(not isinstance(event, SessionClosed) for event in flushed)


def test_a_flush_tells_everything_so_far_and_nothing_twice() -> None:
    pcm = audio(64_000, 3)
    session = Session(tiny.recognizer(), config(80))
    first = session.push(pcm) + session.flush()
    assert text(first) == text(alone(pcm, config(80)))
    again = session.flush()
    assert text(again) == ""
    rest = session.finish()
    assert text(rest) == ""
    assert isinstance(rest[-1], SessionClosed)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 40), lookahead_ms=st.sampled_from(LOOKAHEADS_MS), kind=KINDS)
def test_words_come_when_the_audio_that_they_needed_is_there(seed: int, lookahead_ms: int, kind: str) -> None:
    """Replayed in steps of 10 ms, every event comes with the very push that completes ``emitted_ms``."""
    session, pcm = opened(config(lookahead_ms, kind=kind)), audio(40_000, seed)
    for start in range(0, len(pcm), 160):
        for event in session.push(pcm[start : start + 160]):
            assert isinstance(event, TranscriptDelta)
            assert start < event.emitted_ms * 16 <= start + 160 + 15


@settings(max_examples=15, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(1, 20_000), st.sampled_from(LOOKAHEADS_MS)), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 20_000), min_size=1, max_size=4),
    kind=KINDS,
)
def test_the_look_ahead_may_change_while_the_stream_runs(
    changes: list[tuple[int, int]], cuts: list[int], kind: str
) -> None:
    """It holds for the audio that comes after, whenever that is computed."""

    def run(cuts: list[int], *, push: bool) -> list[Event]:
        session, events, start = opened(config(kind=kind)), [], 0
        for samples, lookahead_ms in changes:
            begin = start
            for end in sorted({min(cut, samples) for cut in cuts} | {samples}):
                session.write(pcm[start : begin + end].tobytes())
                start = begin + end
                if push:
                    events += session.push(b"")
            session.set_max_lookahead_ms(lookahead_ms)
        return events + session.push(pcm[start:].tobytes()) + session.finish()

    pcm = audio(60_000, 3)
    assert run(cuts, push=True) == run([1], push=False)


def test_a_chunk_grows_while_the_decoder_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunks(probability: float, *, silent: bool) -> list[int]:
        monkeypatch.setattr("models.vad.are_silent", lambda stretches: [silent] * len(stretches))
        session, reached = opened(replace(config(kind="adaptive"), sure_probability=probability)), [0]
        for _ in range(70):
            session.push(np.zeros(1280, np.int16) if silent else rng.integers(-9999, 9999, 1280, np.int16))
            reached.append(session._decoder.frames[0])
        return [b - a for a, b in itertools.pairwise(reached) if b > a]

    rng = np.random.default_rng(0)
    assert set(chunks(1.0, silent=False)) == {7}  # never sure: the largest
    assert set(chunks(0.0, silent=True)) == {1}  # always sure: the smallest
    assert len(set(chunks(0.1, silent=False))) > 1


def test_a_model_whose_layers_decide_has_no_fixed_look_ahead() -> None:
    with pytest.raises(DragomanError, match="max_lookahead_ms"):
        Session(tiny.recognizer(gates=3), SessionConfig(lookahead="fixed"))
    with pytest.raises(DragomanError, match="'some'"):
        SessionConfig(lookahead="some")  # type: ignore[arg-type]


def test_segments_end_at_pauses_and_nowhere_else() -> None:
    loud, pause = audio(12_000, 1) // 1, np.zeros(24_000, np.int16)
    events = alone(np.concatenate([loud, pause, loud, pause, loud]), config(0))
    deltas = [e for e in events if isinstance(e, TranscriptDelta)]
    closing = [e.segment for e in deltas if e.endpoint]
    assert closing == sorted(set(closing))
    assert [e.segment for e in deltas] == sorted(e.segment for e in deltas)
    assert deltas[-1].endpoint


def test_times_are_ordered_and_inside_the_audio() -> None:
    pcm = audio(50_000, 5)
    for event in alone(pcm, config(240)):
        if isinstance(event, TranscriptDelta):
            assert 0 <= event.start_ms <= event.end_ms <= event.emitted_ms <= 50_000 // 16
            assert event.delta.split() == [word.word for word in event.words]


def test_half_a_sample_at_the_end_is_an_error_that_costs_no_words() -> None:
    pcm = audio(40_000, 6)
    session = Session(tiny.recognizer(), config())
    events = session.push(pcm.tobytes() + b"\x01") + session.finish()
    assert [e.code for e in events if isinstance(e, ErrorEvent)] == ["audio_odd_bytes"]
    assert text(events) == text(alone(pcm, config()))


def test_no_audio_is_an_empty_session() -> None:
    assert [type(event) for event in Session(tiny.recognizer()).finish()] == [SessionClosed]


@pytest.mark.parametrize("samples", [1, 159, 160, 400])
def test_a_moment_of_audio_closes_cleanly(samples: int) -> None:
    events = alone(audio(samples, 1), config())
    assert isinstance(events[-1], SessionClosed)
    assert events[-1].audio_ms == samples // 16


def test_nothing_can_be_said_after_the_end() -> None:
    session = Session(tiny.recognizer())
    session.finish()
    with pytest.raises(DragomanError, match="open a new one"):
        session.push(b"\0\0")


def test_a_look_ahead_below_the_smallest_is_refused_with_both_numbers() -> None:
    with pytest.raises(DragomanError, match=r"-5.*0 ms"):
        Session(tiny.recognizer(), SessionConfig(max_lookahead_ms=-5))


def test_what_a_session_keeps_does_not_grow() -> None:
    session = Session(tiny.recognizer(), config(0))
    sizes = []
    for second in range(40):
        session.push(audio(16_000, second))
        waiting = sum(group.numel() for group in session._encoder.groups)
        sizes.append(len(session._recent) + waiting + len(session._features.pending))
    assert max(sizes[10:]) <= max(sizes[:10]) * 1.05


# ------------------------------------------------------------------------------------------------------------- in bf16


@cache
def in_bf16(gates: int) -> tuple[Recognizer, Translator]:
    tokenizer = SentencePieceTokenizer(tiny.translation_tokenizer())
    return (
        Recognizer(tiny.net(tiny.config(gates=gates)).bfloat16(), tiny.tokenizer()),
        Translator(tiny.translation_llm().bfloat16().freeze(), tokenizer, TranslationConfig(endpoint=OWN_ENDPOINT)),
    )


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 30),
    gates=st.sampled_from([0, 3]),
    decoder=st.sampled_from(["rnnt", "ctc"]),
    cuts=st.lists(st.integers(0, 60_000), max_size=4),
)
def test_a_session_in_bf16_is_the_same_for_any_chunking(seed: int, gates: int, decoder: str, cuts: list[int]) -> None:
    """From the first sample to the last translation, its state in bf16 all the time."""
    models, pcm = in_bf16(gates), audio(30_000, seed)
    settings_ = replace(config(decoder=decoder, kind="gates"), languages=("es", "de"))
    found = []
    for ends in (sorted(cuts), []):
        session, events, start = Session(models[0], settings_, models[1]), list[Event](), 0
        for end in [*ends, len(pcm.tobytes())]:
            events += session.push(pcm.tobytes()[start:end])
            start = end
            state, predictor = session._encoder.state, session._decoder.predictor
            assert {state.attention.dtype, state.conv.dtype, state.subsampling[0].dtype} == {torch.bfloat16}
            assert predictor is None or predictor.cell.dtype == torch.bfloat16
        found.append(events + session.finish())
    assert found[0] == found[1] and isinstance(found[0][-1], SessionClosed)
    words = [word for event in found[0] if isinstance(event, TranscriptDelta) for word in event.words]
    assert all(0 < word.confidence <= 1 for word in words)


def test_sessions_in_bf16_share_ticks() -> None:
    """What rounds otherwise in company may change a word, and ends no session."""
    recognizer, translator = in_bf16(0)
    sessions = [
        Session(recognizer, replace(config(lookahead_ms), languages=("es",)), translator)
        for lookahead_ms in (0, 80, 240, 480)
    ]
    for i, session in enumerate(sessions):
        session.write(audio(20_000 + 5_000 * i, i).tobytes())
        session.close_input()
    while busy := [session for session in sessions if session.ready()]:
        tick(busy)
    for session in sessions:
        events = session.take_events()
        assert isinstance(events[-1], SessionClosed) and text(events)
        assert any(isinstance(event, TranslationDelta) for event in events)
